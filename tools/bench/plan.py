"""`reelmae bench plan`: time and memory of planning, resuming and joining a job of many sources.

The sources are generated: a manifest in random order, or a filesystem that can only list. Planning runs in a process of
its own, so that its peak memory does not include this process's. Measured are
- plan: list or read, check, sort, shuffle, write;
- resume, with half of the tasks committed: read the plan, list the commits, read one task's sources;
- join, the end of the job, with generated commits: from commits to index.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq

from reelmae.pipeline.errors import ReelmaeError
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.ffmpeg import find_ffmpeg
from reelmae.pipeline.ingest.plan import parts
from reelmae.pipeline.ingest.shards.commits import committed_tasks
from reelmae.pipeline.ingest.shards.ledger import finish
from reelmae.pipeline.storage.store import Store
from reelmae.tools.bench.commits import write_commit
from reelmae.tools.bench.config import BenchPlanConfig
from reelmae.tools.bench.processes import peak_bytes
from reelmae.tools.machine import machine, versions

LISTING = "bench-listing"
_FOLDER = 1000  # files in a folder of the generated listing
_LABELS = 400


class ListingOnly(fsspec.AbstractFileSystem):
    """`bench-listing://N`: N files of no content in folders of 1000."""

    protocol = LISTING
    cachable = False

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """The folders, or the files of one."""
        root, _slash, folder = self._strip_protocol(path).partition("/")
        sources = int(root)
        if folder:
            first = int(folder.removeprefix("folder_")) * _FOLDER
            names = [_file(path, i) for i in range(first, min(first + _FOLDER, sources))]
            found = [{"name": n, "size": 1 << 20, "type": "file", "etag": "0" * 32} for n in names]
        else:
            names = [f"{root}/folder_{i:05d}" for i in range(-(-sources // _FOLDER))]
            found = [{"name": n, "size": 0, "type": "directory"} for n in names]
        return found if detail else names

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Says that it is a folder: only the root is looked up."""
        return {"name": self._strip_protocol(path), "size": 0, "type": "directory"}


def bench_plan(config: BenchPlanConfig) -> dict[str, Any]:
    """Measure once; raises ReelmaeError if planning fails."""
    with tempfile.TemporaryDirectory(prefix="reelmae-") as folder:
        src = f"{LISTING}://{config.sources}"
        if config.kind == "manifest":
            src = str(Path(folder, "manifest.csv"))
            write_manifest(Path(src), config.sources)
        argv = [sys.executable, "-m", "reelmae.tools.bench.plan", src, str(Path(folder, "dst"))]
        child = subprocess.run(argv, capture_output=True, text=True, check=False)
    if child.returncode:
        raise ReelmaeError(f"planning {config.sources} sources failed: {child.stderr.strip()[-2000:]}")
    return {**config.model_dump(), **json.loads(child.stdout), "machine": machine(), "versions": versions()}


def _file(folder: str, i: int) -> str:
    return f"{folder}/{i * 2654435761 % 2**32:08x}-{i:09d}_{'clip_of_a_video' * 2}.mp4"


def write_manifest(path: Path, sources: int) -> None:
    """Rows in random order, each with a label and a path of about 80 characters."""
    order = list(range(sources))
    random.Random(0).shuffle(order)
    with path.open("w", encoding="utf-8") as file:
        file.write("path,label\n")
        for i in order:
            label = f"some_label_{i % _LABELS:03d}"
            file.write(f"{_file(f'train/{label}', i)},{label}\n")


def measure(src: str, dst: str) -> dict[str, Any]:
    """Plan, resume and join in this process: sources, tasks, seconds of each, peak memory after each."""
    store, tool, seconds, peaks = Store(dst), find_ffmpeg(), {}, {}

    def lap(name: str, began: float) -> None:
        seconds[name] = time.perf_counter() - began
        peaks[name] = peak_bytes()

    config, began = ShardConfig(encoder="x264").resolve(), time.perf_counter()
    plan = parts.new_plan(src, store, config, tool, None)
    lap("plan", began)
    with parts.part_file(store, plan.parts[0]) as file:
        _write_commits(store, file, range(0, plan.tasks, 2))
        began = time.perf_counter()
        there = parts.read_plan(store)
        assert there is not None
        waiting = sorted(set(range(there.tasks)) - committed_tasks(store, there.format))
        parts.sources_in(store, there, set(waiting))
        file.read_row_group(waiting[0] if waiting else 0)
        lap("resume", began)
        _write_commits(store, file, waiting)
    began = time.perf_counter()
    finish(store, plan)
    lap("join", began)
    return {
        "sources": plan.sources,
        "tasks": plan.tasks,
        "waiting": len(waiting),
        "seconds": seconds,
        "peak_rss_bytes": peaks,
    }


def _write_commits(store: Store, file: pq.ParquetFile, tasks: Iterable[int]) -> None:
    """Commits of these tasks as if they had run."""
    per_task = file.metadata.row_group(0).num_rows
    for task in tasks:
        urls = file.read_row_group(task, columns=["url"]).column("url").to_pylist()
        write_commit(store, task, task * per_task, urls)


if __name__ == "__main__":
    fsspec.register_implementation(LISTING, ListingOnly)
    print(json.dumps(measure(*sys.argv[1:])))
