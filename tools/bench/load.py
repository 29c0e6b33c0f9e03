"""`reelmae bench load DATA`: what the loader gives when nothing else happens.

The consumer takes batches as fast as they come, so `clips_per_s` is the loader's own rate. The first batches
(start-up of workers, opening of files) are not counted. `decoded_per_used` is the frames decoded for each frame
that went into a batch: 1 where the stride is 1, more where frames between the wanted ones must be decoded too.
"""

from __future__ import annotations

import resource
import time
from typing import Any

import pydantic

from reelmae.pipeline.errors import ConfigError
from reelmae.pipeline.loading.draws import SamplePolicy
from reelmae.pipeline.loading.index import ClipIndex
from reelmae.pipeline.loading.loader import ClipLoader, LoaderConfig
from reelmae.tools.bench.config import BenchLoadConfig
from reelmae.tools.machine import machine, versions


def bench_load(config: BenchLoadConfig) -> dict[str, Any]:
    """Measure one backend; ConfigError where the dataset has fewer clips than a batch."""
    index = ClipIndex.open(config.data)
    try:
        loader_config = LoaderConfig(
            backend=config.backend,
            batch_videos=config.batch_videos,
            repeats=config.repeats,
            sample=SamplePolicy(frames=config.frames, size=config.size, fps=config.fps),
            workers=config.workers,
        )
    except pydantic.ValidationError as e:
        raise ConfigError("; ".join(f"{'.'.join(map(str, d['loc']))}: {d['msg']}" for d in e.errors())) from e
    with ClipLoader(index, loader_config) as loader:
        batches = iter(loader)
        for _ in range(config.warmup):
            next(batches)
        decoded = loader.stats.frames_decoded
        cpu, began = _cpu_seconds(), time.perf_counter()
        clips = sum(len(next(batches)) for _ in range(config.batches))
        seconds = time.perf_counter() - began
        decoded = loader.stats.frames_decoded - decoded
        backend, bad = loader.backend, len(loader.stats.bad)
    # the processes of a loader that is closed are counted too: only now are their seconds known
    cpu = _cpu_seconds() - cpu
    return {
        "backend": backend,
        "clips_per_s": clips / seconds,
        "decoded_per_used": decoded / (clips * config.frames),
        "clips": clips,
        "seconds": seconds,
        "cpu_seconds_with_startup": cpu,
        "bad_clips": bad,
        "config": config.model_dump(),
        "machine": machine(),
        "versions": versions(),
    }


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usages)
