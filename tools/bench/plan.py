"""`reelmae bench plan`: what planning a job of many sources takes, and what resuming it takes.

The sources are made up: a manifest in random order, or a filesystem that only lists. The planning runs in a process of
its own, so that the peak of memory is that of planning and the packages it imports, not of this process. Measured are
list (list or read, check, sort), plan (shuffle, write one row group a task) and resume (read the plan's footer,
list the commits where half of the tasks have one, read one task's sources).
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import fsspec
import pyarrow.parquet as pq

from reelmae.pipeline.errors import ConfigError, ReelmaeError
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.plan import plan, sources_per_task, write_plan
from reelmae.pipeline.ingest.sources import list_sources
from reelmae.pipeline.schema import PLAN_SOURCES, commit_name
from reelmae.pipeline.storage import Store
from reelmae.tools.machine import machine, versions

LISTING = "bench-listing"
_FOLDER = 1000  # files of a folder of the made-up listing
_LABELS = 400


@dataclass(frozen=True)
class BenchPlanConfig:
    """What is planned."""

    sources: int = 1_000_000
    """Number of sources."""
    kind: Literal["manifest", "listing"] = "manifest"
    """manifest: a CSV file with a label for each source. listing: folders of 1000 files."""


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
        """Everything is a folder: only the root is asked for."""
        return {"name": self._strip_protocol(path), "size": 0, "type": "directory"}


def bench_plan(config: BenchPlanConfig) -> dict[str, Any]:
    """Measure once; ConfigError where there is nothing to plan, ReelmaeError where the planning fails."""
    if config.sources < 1:
        raise ConfigError(f"sources={config.sources}: give at least 1")
    with tempfile.TemporaryDirectory(prefix="reelmae-") as folder:
        src = f"{LISTING}://{config.sources}"
        if config.kind == "manifest":
            src = str(Path(folder, "manifest.csv"))
            _write_manifest(Path(src), config.sources)
        child = subprocess.run(
            [sys.executable, "-m", "reelmae.tools.bench.plan", src, str(Path(folder, "dst"))],
            capture_output=True,
            text=True,
            check=False,
        )
    if child.returncode:
        raise ReelmaeError(f"planning {config.sources} sources failed: {child.stderr.strip()[-2000:]}")
    return {
        **asdict(config),
        **json.loads(child.stdout),
        "machine": machine(),
        "versions": versions(),
    }


def _file(folder: str, i: int) -> str:
    return f"{folder}/{i * 2654435761 % 2**32:08x}-{i:09d}_{'clip_of_a_video' * 2}.mp4"


def _write_manifest(path: Path, sources: int) -> None:
    """Rows in random order, a label each; their paths are some 80 characters long."""
    order = list(range(sources))
    random.Random(0).shuffle(order)
    with path.open("w", encoding="utf-8") as file:
        file.write("path,label\n")
        for i in order:
            label = f"some_label_{i % _LABELS:03d}"
            file.write(f"{_file(f'train/{label}', i)},{label}\n")


def measure(src: str, dst: str) -> dict[str, Any]:
    """Plan and resume in this process: sources, tasks, seconds of each part, peak memory of the process in bytes."""
    store, path = Store(dst), Path(dst, PLAN_SOURCES)
    path.parent.mkdir(parents=True)
    config, begin = ShardConfig(), time.perf_counter()
    listing = list_sources(src, config)
    listed = time.perf_counter()
    n = listing.table.num_rows
    per_task = sources_per_task(n, config.sources_per_task)
    write_plan(plan(listing.table, seed=config.seed, per_task=per_task), path, per_task)
    planned = time.perf_counter()
    del listing
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    tasks = -(-n // per_task)
    store.local_path("commits").mkdir()
    for task in range(0, tasks, 2):
        store.local_path(commit_name(task)).touch()
    resuming = time.perf_counter()
    with pq.ParquetFile(path) as file:
        done = {int(Path(e.path).stem) for e in store.list("commits") if e.path.endswith(".parquet")}
        waiting = [task for task in range(file.metadata.num_row_groups) if task not in done]
        file.read_row_group(waiting[0] if waiting else 0)
    resumed = time.perf_counter()
    return {
        "sources": n,
        "tasks": tasks,
        "waiting": len(waiting),
        "seconds": {"list": listed - begin, "plan": planned - listed, "resume": resumed - resuming},
        "peak_rss_bytes": max(peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),
    }


if __name__ == "__main__":
    fsspec.register_implementation(LISTING, ListingOnly)
    print(json.dumps(measure(*sys.argv[1:])))
