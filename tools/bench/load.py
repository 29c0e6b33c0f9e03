"""`reelmae bench load DATA`: what the loader gives when nothing else happens, and what it costs.

The consumer takes batches as fast as they come, so `clips_per_s` is the loader's own rate. The first batches
(start-up of workers, opening of files) are not counted, in no figure but the peak of memory.
- `clips_per_cpu_s`: clips for each processor second of this process and its decoding workers together.
- `decoded_per_used`: frames decoded for each frame that went into a batch: 1 where the stride is 1, more where
  frames between the wanted ones must be decoded too, less where samples share frames.
- `stages`: seconds of the thread or process that did it, summed over all of them, and shares of their sum.
- `wait_share`: of the time, what the consumer spent in next(). With workers=0 decoding happens there.
- `rss_growth_bytes`: memory in use at the end less that at the start of the clock: a leak grows with `--batches`.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pydantic

from reelmae.pipeline.errors import ConfigError
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.loading.loader import ClipLoader, LoaderConfig
from reelmae.pipeline.loading.order.draws import SamplePolicy
from reelmae.tools.bench.config import BenchLoadConfig
from reelmae.tools.bench.processes import cpu_between, cpu_seconds, memory_bytes
from reelmae.tools.machine import machine, versions

STAGES = ("fetch", "decode", "resize", "copy")


def bench_load(config: BenchLoadConfig) -> dict[str, Any]:
    """Measure one backend; ConfigError where the dataset has fewer clips than a batch."""
    index = ClipIndex.open(config.data)
    asked = loader_config(
        backend=config.backend,
        batch_videos=config.batch_videos,
        repeats=config.repeats,
        sample=SamplePolicy(frames=config.frames, size=config.size, fps=config.fps),
        workers=config.workers,
        decode=config.decode,
        pipelines=config.pipelines,
        cache=config.cache,
    )
    with ClipLoader(index, asked) as loader:
        batches = iter(loader)
        for _ in range(config.warmup):
            next(batches)
        before, rss = dataclasses.asdict(loader.stats), memory_bytes("VmRSS")
        cpu, began = cpu_seconds(), time.perf_counter()
        for _ in range(config.batches):
            next(batches)
        seconds = time.perf_counter() - began
        spent = cpu_between(cpu, cpu_seconds())
        after, growth, peak = (
            dataclasses.asdict(loader.stats),
            memory_bytes("VmRSS") - rss,
            memory_bytes("VmHWM"),
        )
        backend, reason = loader.backend, loader.backend_reason
    done = {name: after[name] - before[name] for name in after if isinstance(after[name], int | float)}
    return {
        "backend": backend,
        "backend_reason": reason,
        "clips_per_s": done["clips"] / seconds,
        # None: too short to tell, that clock ticks in 10 ms
        "clips_per_cpu_s": done["clips"] / spent if spent else None,
        # None: DALI does not tell
        "decoded_per_used": done["frames_decoded"] / done["frames_used"] if done["frames_decoded"] else None,
        "mb_per_s": done["bytes_read"] / seconds / 1e6,
        "wait_share": done["wait_s"] / seconds,
        "stages": _stages(done),
        "peak_memory_bytes": peak,
        "rss_growth_bytes": growth,
        "clips": done["clips"],
        "videos": done["videos"],
        "seconds": seconds,
        "cpu_seconds": spent,
        "bad_clips": len(after["bad"]),
        "worker_restarts": after["worker_restarts"],
        "config": config.model_dump(),
        "machine": machine(),
        "versions": versions(),
    }


def loader_config(**values: Any) -> LoaderConfig:
    """A LoaderConfig of these values; ConfigError where one of them is refused."""
    try:
        return LoaderConfig(**values)
    except pydantic.ValidationError as e:
        told = ["".join(f"{name}: " for name in d["loc"]) + d["msg"] for d in e.errors()]
        raise ConfigError("; ".join(told)) from e


def _stages(done: dict[str, float]) -> dict[str, dict[str, float]]:
    whole = sum(done[f"{name}_s"] for name in STAGES)
    return {
        name: {
            "seconds": done[f"{name}_s"],
            "share": done[f"{name}_s"] / whole if whole else 0.0,
        }
        for name in STAGES
    }
