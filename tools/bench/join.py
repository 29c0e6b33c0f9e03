"""`reelmae bench join`: time and memory of the end of a job of ten million clips, on one machine.

The end of a job joins the commits of all tasks to one index, checks the ledger, and marks near repeats. The commits are
generated (commits.py), so what is counted is known. The join runs in a process of its own, so that its peak memory does
not include this process's; the commits are in the page cache.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from reelmae.pipeline.errors import ReelmaeError
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.ffmpeg import find_ffmpeg
from reelmae.pipeline.ingest.plan.parts import Plan, PlanPart, read_plan
from reelmae.pipeline.ingest.plan.source_files import name_file
from reelmae.pipeline.ingest.shards.ledger import finish
from reelmae.pipeline.schema import DATASET_JSON, FORMAT, INDEX, PLAN_JSON, SOURCES
from reelmae.pipeline.storage.scratch import scratch_folder
from reelmae.pipeline.storage.store import Store
from reelmae.tools.bench.commits import REJECTED, expected_counts, write_commit
from reelmae.tools.bench.config import BenchJoinConfig
from reelmae.tools.bench.processes import peak_bytes
from reelmae.tools.machine import machine, versions

_PER_TASK = 256  # sources


def bench_join(config: BenchJoinConfig) -> dict[str, Any]:
    """Measure once; ReelmaeError if the join fails, or counts other than what was generated."""
    sources = config.clips + (config.clips - 1) // (REJECTED - 1)
    with tempfile.TemporaryDirectory(prefix="reelmae-") as folder:
        write_job(Store(folder), sources)
        argv = [sys.executable, "-m", "reelmae.tools.bench.join", folder]
        child = subprocess.run(argv, capture_output=True, text=True, check=False)
        if child.returncode:
            raise ReelmaeError(f"joining {config.clips} clips failed: {child.stderr.strip()[-2000:]}")
        index_bytes = Path(folder, INDEX).stat().st_size
        counts = check_counts(Path(folder), sources)
    tasks = -(-sources // _PER_TASK)
    return counts | {
        "tasks": tasks,
        "index_bytes": index_bytes,
        **json.loads(child.stdout),
        "machine": machine(),
        "versions": versions(),
    }


def check_counts(dst: Path, sources: int) -> dict[str, int]:
    """What a joined dataset of generated commits counts; ReelmaeError where that is not what was generated."""
    facts = json.loads((dst / DATASET_JSON).read_text(encoding="utf-8"))
    expected = expected_counts(sources)
    found = {**facts, "rejected": sum(facts["rejected"].values())}
    if any(found[name] != n for name, n in expected.items()):
        raise ReelmaeError(
            f"the join counted { ({name: found[name] for name in expected}) }; generated were {expected}"
        )
    return expected


def write_job(store: Store, sources: int) -> None:
    """A job at a local folder of which all tasks are committed."""
    tasks = -(-sources // _PER_TASK)
    with scratch_folder() as folder:
        path = folder / "sources.parquet"
        with pq.ParquetWriter(path, SOURCES) as writer:
            for task in range(tasks):
                first, end = task * _PER_TASK, min((task + 1) * _PER_TASK, sources)
                urls = [f"s3://bucket/raw/{n % 1000:03d}/video_{n:010d}.mp4" for n in range(first, end)]
                writer.write_table(_planned(urls, task))
                write_commit(store, task, first, urls)
        file = name_file(path, 0, FORMAT)
        store.publish(path, file)
    part = PlanPart(
        src="s3://bucket/raw",
        file=file,
        first_task=0,
        tasks=tasks,
        sources=sources,
        listed=sources,
        limit=None,
        retry=None,
        ffmpeg=find_ffmpeg().version,
    )
    config = ShardConfig(encoder="x264", duplicates="near").resolve()
    digest = config.digest()
    plan = Plan(format=FORMAT, config=config, config_digest=digest, encoder="x264", columns={}, parts=(part,))
    store.publish_bytes(plan.data(), PLAN_JSON)


def _planned(urls: list[str], task: int) -> pa.Table:
    n = len(urls)
    own = {"url": pa.array(urls), "size": pa.array(np.full(n, 1 << 24)), "etag": pa.repeat("0" * 32, n)}
    own["task"] = pa.array(np.full(n, task, np.int32))
    return pa.Table.from_arrays(
        [own[f.name] if f.name in own else pa.nulls(n, f.type) for f in SOURCES], schema=SOURCES
    )


def measure(dst: str) -> dict[str, Any]:
    """Join the commits at `dst` in this process: seconds, processor seconds and peak memory."""
    store = Store(dst)
    plan = read_plan(store)
    assert plan is not None
    began, cpu = time.perf_counter(), time.process_time()
    finish(store, plan)
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "peak_rss_bytes": peak_bytes(),
    }


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
