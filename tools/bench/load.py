"""`reelmae bench load DATA`: what the loader gives when nothing else happens.

The consumer takes batches as fast as they come, so `clips_per_s` is the loader's own rate. The first batches
(start-up of workers, opening of files) are not counted. `decoded_per_used` is the frames decoded for each frame
that went into a batch: 1 where the stride is 1, more where frames between the wanted ones must be decoded too.
"""

from __future__ import annotations

import resource
import time
from typing import Annotated, Any, Literal

import pydantic
import tyro


class BenchLoadConfig(pydantic.BaseModel):
    """What is loaded, and how."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """Folder or fsspec URL of shards."""
    backend: Literal["auto", "av", "dali-cpu", "dali-gpu"] = "auto"
    """Decoder."""
    repeats: int = pydantic.Field(default=1, ge=1, le=64)
    """Samples of each decoded clip."""
    batch_videos: int = pydantic.Field(default=8, ge=1)
    """Videos in a batch; a batch has batch_videos × repeats clips."""
    frames: int = pydantic.Field(default=16, ge=1)
    """Frames of a sample."""
    size: int = pydantic.Field(default=224, ge=16)
    """Side of a sample in pixels."""
    fps: float = pydantic.Field(default=7.5, gt=0)
    """Sampled frames a second."""
    workers: int | None = pydantic.Field(default=None, ge=0)
    """Decoding processes or threads; the number of cores unless given."""
    batches: int = pydantic.Field(default=20, ge=1)
    """Batches measured."""
    warmup: int = pydantic.Field(default=3, ge=1)
    """Batches before the clock starts."""


def bench_load(config: BenchLoadConfig) -> dict[str, Any]:
    """Measure one backend; ConfigError where the dataset has fewer clips than a batch."""
    from reelmae.pipeline.loading.draws import SamplePolicy
    from reelmae.pipeline.loading.index import ClipIndex
    from reelmae.pipeline.loading.loader import ClipLoader, LoaderConfig
    from reelmae.tools.machine import machine, versions

    index = ClipIndex.open(config.data)
    loader_config = LoaderConfig(
        backend=config.backend,
        batch_videos=config.batch_videos,
        repeats=config.repeats,
        sample=SamplePolicy(frames=config.frames, size=config.size, fps=config.fps),
        workers=config.workers,
    )
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
