"""One way of sharding against another, by `reelmae bench shard SRC`:

- `--runner ray`: tasks on a Ray of this machine against threads of the job, on as many cores.
- `--tars N`: the same videos in tars of N members against loose files.

Each job is the command line, timed from start-up to end. Both run in turn, `rounds` times, in every other round the
other one first. `ratio` is the sum of the usual way's times over that of the other's: 1 is as fast, less is slower.

Processor time and memory are those of all processes of a job, looked at every LOOK_S seconds. What began and ended
between two looks shows in its parent's processor time, and not in the memory; what several processes share counts for
each of them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from reelmae.pipeline import schema
from reelmae.pipeline.errors import InputError, ReelmaeError
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.plan.sources import list_sources
from reelmae.tools.bench.config import BenchShardConfig
from reelmae.tools.bench.processes import family_cost

LOOK_S = 0.5


@dataclass(frozen=True)
class Way:
    """What differs in the command line."""

    name: str
    src: Path
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cost:
    """Of one job, from start-up to end."""

    seconds: float
    cpu_s: float
    """Processor seconds of all its processes."""
    peak_bytes: int
    """The most memory that its processes held at a time."""


def compare_ways(config: BenchShardConfig, src: Path, folder: Path, workers: int) -> dict[str, Any]:
    """Measure; ReelmaeError, in the job's own words, if one fails or the two do not keep the same clips."""
    if config.tars:
        ways = (Way("loose", src), Way("tars", _pack_tars(src, folder / "tars", config.tars, config.shard)))
    else:
        ways = (Way("local", src), Way("ray", src, ("--runner=ray",)))
    facts: dict[str, dict[str, int]] = {}
    rounds: list[dict[str, Cost]] = []
    for number in range(config.rounds):
        costs = {}
        for way in ways[:: -1 if number % 2 else 1]:
            dst = folder / "dst"
            costs[way.name] = time_job([str(way.src), str(dst), f"--workers={workers}", *way.flags], config.shard)
            facts[way.name] = read_facts(dst)
            shutil.rmtree(dst)
        rounds.append(costs)
    usual, other = (way.name for way in ways)
    if facts[usual] != facts[other]:
        raise ReelmaeError(f"{usual} gives {facts[usual]}, {other} gives {facts[other]}: not comparable")
    seconds = {name: sum(costs[name].seconds for costs in rounds) for name in (usual, other)}
    return {
        "ratio": seconds[usual] / seconds[other],
        "ways": [usual, other],
        "rounds": [{name: asdict(costs[name]) for name in (usual, other)} for costs in rounds],
        **facts[usual],
        "sources_per_s": {name: facts[usual]["sources"] * config.rounds / spent for name, spent in seconds.items()},
    }


def time_job(args: list[str], settings: ShardConfig) -> Cost:
    """Run `reelmae shard` with these arguments to its end."""
    argv = [sys.executable, "-m", "reelmae.tools.cli", "shard", *args, "--json", *flags_of(settings)]
    cpu_s, peak = 0.0, 0
    begin = time.perf_counter()
    here = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}  # a Ray of this machine
    with subprocess.Popen(argv, env=here, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as job:
        while True:
            spent, held = family_cost(job.pid)
            cpu_s, peak = max(cpu_s, spent), max(peak, held)
            try:
                _, words = job.communicate(timeout=LOOK_S)
            except subprocess.TimeoutExpired:
                continue
            break
    seconds = time.perf_counter() - begin
    if job.returncode:
        last = words.strip().rpartition("\n")[2] or f"exit status {job.returncode}"
        raise ReelmaeError(f"reelmae {' '.join(argv[3:])} failed: {last}")
    return Cost(seconds, cpu_s, peak)


def flags_of(settings: ShardConfig) -> list[str]:
    """Flags of `reelmae shard` that give these settings. Switches are off unless they are named."""
    given = settings.model_dump(exclude_defaults=True).items()
    return [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in given]


def read_facts(dst: Path) -> dict[str, int]:
    """Number of clips and of sources of a dataset."""
    index = pq.read_table(dst / schema.INDEX, columns=["source"])
    rejects = pq.read_table(dst / schema.REJECTS_FILE, columns=["source"])
    sources = set(index.column("source").to_pylist()) | set(rejects.column("source").to_pylist())
    return {"clips": index.num_rows, "sources": len(sources)}


def _pack_tars(src: Path, to: Path, members: int, settings: ShardConfig) -> Path:
    """A folder of tars that hold the sources at `src`, so many in each, in the order of names."""
    urls = list_sources(str(src), settings).table.column("url").to_pylist()
    if not urls:
        raise InputError(f"{src}: holds no video")
    to.mkdir()
    for first in range(0, len(urls), members):
        with tarfile.open(to / f"{first // members:06d}.tar", "w", dereference=True) as tar:
            for url in sorted(urls)[first : first + members]:
                tar.add(url, os.path.relpath(url, src))
    return to
