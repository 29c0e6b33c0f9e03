"""`reelmae bench load DATA`: how fast the loader is when nothing else runs, and what it costs.

The consumer takes batches as fast as they come, so `clips_per_s` is the loader's own rate. The first batches start the
workers and open the files; they count only in the peak of memory.
- `clips_per_cpu_s`: clips per processor second of this process and its decoding workers together.
- `decoded_per_used`: frames decoded per frame that went into a batch. 1 at stride 1; more if frames between the wanted
  ones must be decoded too; less if samples share frames.
- `stages`: seconds in each stage, summed over all threads and processes, and their shares of the total.
- `read_mb_per_sample`: bytes read for a sample; `clip_mb_per_sample`: those of its whole clip. Large clips on a remote store
  are read in part. With `whole_clips` the same batches are played a second time, with clips read whole.
- `wait_share`: share of the time that the consumer spent in next(). With workers=0 decoding happens there.
- `rss_growth_bytes`: memory in use at the end minus that when the clock started. A leak grows with `--batches`.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pydantic

from reelmae.pipeline.loading.config import LoaderConfig, LoadOptions
from reelmae.pipeline.loading.index.blocks import NO_CHECKS
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.loading.loader import ClipLoader
from reelmae.pipeline.storage.access import Access
from reelmae.tools.bench.config import BenchLoadConfig
from reelmae.tools.bench.processes import cpu_between, cpu_seconds, memory_bytes
from reelmae.tools.machine import machine, versions
from reelmae.train.recipe import explain

OF_WHOLE = (
    *("clips_per_s", "clips_per_cpu_s", "mb_per_s", "read_mb_per_sample", "wait_share", "stages"),
    *("clips", "seconds", "cpu_seconds"),
)
STAGES = ("fetch", "decode", "resize", "copy")


def bench_load(config: BenchLoadConfig, access: Access | None = None) -> dict[str, Any]:
    """Measure one backend; raises ConfigError if the dataset has fewer clips than a batch."""
    index = ClipIndex.open(config.data, access=access)
    result = _play(index, config)
    if config.whole_clips:
        whole = _play(dataclasses.replace(index, blocks=NO_CHECKS), config)
        result["whole_clips"] = {name: whole[name] for name in OF_WHOLE}
    return {**result, "config": config.model_dump(), "machine": machine(), "versions": versions()}


def _play(index: ClipIndex, config: BenchLoadConfig) -> dict[str, Any]:
    """Play the batches once; the figures."""
    options = {name: getattr(config, name) for name in LoadOptions.model_fields}
    with ClipLoader(index, loader_config(**options, sample=config.sample)) as loader:
        batches = iter(loader)
        for _ in range(config.warmup):
            next(batches)
        before, rss, stored = dataclasses.asdict(loader.stats), memory_bytes("VmRSS"), 0
        cpu, began = cpu_seconds(), time.perf_counter()
        for _ in range(config.batches):
            batch = next(batches)
            stored += int(index.size[batch.clip_B[:: config.repeats]].sum())
            del batch  # its memory is used again for the next one
        seconds = time.perf_counter() - began
        spent = cpu_between(cpu, cpu_seconds())
        after, growth = dataclasses.asdict(loader.stats), memory_bytes("VmRSS") - rss
        peak = memory_bytes("VmHWM")
        backend, reason = loader.backend, loader.backend_reason
    done = {name: after[name] - before[name] for name in after if isinstance(after[name], int | float)}
    return {
        "backend": backend,
        "backend_reason": reason,
        "clips_per_s": done["clips"] / seconds,
        # None: the run was too short for this clock, which ticks every 10 ms
        "clips_per_cpu_s": done["clips"] / spent if spent else None,
        # None: DALI does not count the frames it decodes
        "decoded_per_used": done["frames_decoded"] / done["frames_used"] if done["frames_decoded"] else None,
        "mb_per_s": done["bytes_read"] / seconds / 1e6,
        "read_mb_per_sample": done["bytes_read"] / done["clips"] / 1e6,
        "clip_mb_per_sample": stored / done["clips"] / 1e6,
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
        "retries": after["retries"],
    }


def loader_config(**values: Any) -> LoaderConfig:
    """A LoaderConfig of these values; raises ConfigError if one of them is refused."""
    try:
        return LoaderConfig(**values)
    except pydantic.ValidationError as e:
        raise explain(e) from e


def _stages(done: dict[str, float]) -> dict[str, dict[str, float]]:
    whole = sum(done[f"{name}_s"] for name in STAGES)
    return {
        name: {"seconds": done[f"{name}_s"], "share": done[f"{name}_s"] / whole if whole else 0.0} for name in STAGES
    }
