"""`reelmae bench step`: a training step with the dense encoder against one with the sparse encoder.

Properties that hold:
- Both are timed in one process, step by step in turn, on the same clips and masks, after the same warm-up; what is
  reported is the median. A step is forward, backward and optimiser.
- With `data` the same steps are timed again behind the real loader, from one batch to the next: `load_step_ms`.
- FLOPs are counted by torch's counter over forward and backward on the meta device, so that nothing is left out.

Legend: B batch, C channel, T frame, H height, W width, K kept token.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from reelmae.model.mae import MAEConfig, MaskedAutoencoder, mae_config
from reelmae.pipeline.errors import ConfigError
from reelmae.pipeline.loading.backends import resolve_device
from reelmae.pipeline.loading.config import LoaderConfig
from reelmae.pipeline.loading.draws import SamplePolicy
from reelmae.pipeline.loading.index import ClipIndex
from reelmae.pipeline.loading.loader import ClipLoader
from reelmae.pipeline.loading.masks import MaskPolicy, n_keep
from reelmae.tools.bench.config import BenchStepConfig
from reelmae.tools.machine import machine, versions
from reelmae.train.config import OptimSection, autocast_dtype
from reelmae.train.optim import adamw

ENCODERS: tuple[Literal["dense", "sparse"], ...] = ("dense", "sparse")
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")  # writing 5 sets the peak back to what is resident now


def bench_step(config: BenchStepConfig) -> dict[str, Any]:
    """Times, FLOPs, memory and speedups as a JSON-able dict; ConfigError names what cannot be."""
    mae = _mae(config)
    device = resolve_device(config.device)
    dtype = autocast_dtype(config.precision, device)
    threads = torch.get_num_threads()
    try:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        kept = n_keep("random", config.mask_ratio, mae.grid_THW)
        flops = {e: _flops(replace(mae, encoder=e), config.batch, kept) for e in ENCODERS}
        steppers = {e: _Stepper(replace(mae, encoder=e), device, dtype, config.compile) for e in ENCODERS}
        times, peaks = _compute(config, steppers, mae, kept)
        result: dict[str, Any] = {
            "step_ms": {e: statistics.median(times[e]) for e in ENCODERS},
            "step_ms_all": times,
            "tokens": {"all": mae.n_tokens, "kept": kept},
            "flops": flops,
            "step_peak_mib": peaks,
        }
        ms = result["step_ms"]
        result["speedup"] = {
            "compute": ms["dense"] / ms["sparse"],
            "flops": flops["dense"] / flops["sparse"],
        }
        if config.data is not None:
            loaded = _loaded(config, steppers, mae)
            result["load_step_ms"] = {e: loaded[e][0] for e in ENCODERS}
            result["wait_share"] = {e: loaded[e][1] for e in ENCODERS}
            result["speedup"]["load_compute"] = loaded["dense"][0] / loaded["sparse"][0]
        used = {
            "device": str(device),
            "dtype": "bfloat16" if dtype else "float32",
            "threads": torch.get_num_threads(),
        }
        return (
            {"model": config.model}
            | result
            | {
                "model_config": {k: v for k, v in asdict(mae).items() if k != "encoder"},
                "settings": asdict(config) | used,
                "machine": machine(),
                "versions": versions(),
            }
        )
    finally:
        torch.set_num_threads(threads)


class _Stepper:
    """One model with its optimiser; `step` is a whole training step."""

    def __init__(
        self, mae: MAEConfig, device: torch.device, dtype: torch.dtype | None, compiled: bool
    ) -> None:
        torch.manual_seed(0)
        self.device, self.dtype = device, dtype
        self.model: nn.Module = MaskedAutoencoder(mae).to(device)
        self.optimizer = adamw(self.model, OptimSection())
        if compiled:
            self.model.compile(fullgraph=True)

    def step(self, clips_BCTHW: Tensor, ids_keep_BK: Tensor) -> None:
        with torch.autocast(self.device.type, dtype=self.dtype) if self.dtype else nullcontext():
            loss = self.model(clips_BCTHW, ids_keep_BK).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _mae(config: BenchStepConfig) -> MAEConfig:
    for name, least in (("steps", 1), ("warmup", 0), ("batch", 1), ("threads", 1)):
        value = getattr(config, name)
        if value is not None and value < least:
            raise ConfigError(f"{name}={value}: give at least {least}")
    if not 0 < config.mask_ratio < 1:
        raise ConfigError(f"mask_ratio={config.mask_ratio}: give a share between 0 and 1")
    try:
        return mae_config(config.model, frames=config.frames, size=config.size, patch=config.patch)
    except ValueError as e:
        raise ConfigError(str(e)) from e


def _flops(mae: MAEConfig, batch: int, kept: int) -> int:
    """FLOPs of forward and backward (two for each multiply-add); nothing is computed."""
    with torch.device("meta"):
        model = MaskedAutoencoder(mae)
        clips_BCTHW = torch.empty(batch, 3, mae.frames, mae.size, mae.size)
        ids_keep_BK = torch.empty(batch, kept, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(clips_BCTHW, ids_keep_BK).loss.backward()
    return counter.get_total_flops()


def _compute(
    config: BenchStepConfig, steppers: dict[Literal["dense", "sparse"], _Stepper], mae: MAEConfig, kept: int
) -> tuple[dict[str, list[float]], dict[str, float | None]]:
    """Milliseconds of each timed step, and the highest memory in a step above what was held before it, in MiB."""
    device = steppers["sparse"].device
    generator = torch.Generator().manual_seed(0)
    clips_BCTHW = torch.randn(config.batch, 3, mae.frames, mae.size, mae.size, generator=generator).to(device)
    noise_BL = torch.rand(config.batch, mae.n_tokens, generator=generator)
    ids_keep_BK = noise_BL.argsort(dim=1)[:, :kept].sort(dim=1).values.to(device)
    times: dict[str, list[float]] = {e: [] for e in ENCODERS}
    peaks: dict[str, float | None] = dict.fromkeys(ENCODERS)
    for i in range(config.warmup + config.steps):
        for e in ENCODERS:
            gc.collect()
            held = _held(device)
            started = time.perf_counter()
            steppers[e].step(clips_BCTHW, ids_keep_BK)
            ms = (time.perf_counter() - started) * 1e3
            if i >= config.warmup:
                times[e].append(ms)
                above = _peak_above(device, held)
                peaks[e] = above if peaks[e] is None or above is None else max(peaks[e] or 0.0, above)
            _say(f"{e} step {i + 1}/{config.warmup + config.steps}: {ms:.0f} ms")
    return times, peaks


def _loaded(
    config: BenchStepConfig, steppers: dict[Literal["dense", "sparse"], _Stepper], mae: MAEConfig
) -> dict[str, tuple[float, float]]:
    """Milliseconds a step with the loader in the loop, and the share of them spent waiting for it."""
    assert config.data is not None
    index = ClipIndex.open(config.data)
    loader_config = LoaderConfig(
        batch_videos=config.batch,
        sample=SamplePolicy(frames=mae.frames, size=mae.size),
        mask=MaskPolicy(ratio=config.mask_ratio),
        patch=(mae.t_patch, mae.patch, mae.patch),
        workers=config.workers,
        device=str(steppers["sparse"].device),
    )
    found: dict[str, tuple[float, float]] = {}
    for e in ENCODERS:
        with ClipLoader(index, loader_config) as loader:
            batches = iter(loader)
            for _ in range(max(1, config.warmup)):  # at least one: it starts the workers
                batch = next(batches)
                steppers[e].step(batch.clips_BCTHW, batch.ids_keep_BK)
            waited, started = 0.0, time.perf_counter()
            for _ in range(config.steps):
                entered = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - entered
                steppers[e].step(batch.clips_BCTHW, batch.ids_keep_BK)
            seconds = time.perf_counter() - started
        found[e] = seconds / config.steps * 1e3, waited / seconds
        _say(f"{e} behind the loader: {found[e][0]:.0f} ms a step, waiting {found[e][1]:.0%}")
    return found


def _held(device: torch.device) -> int | None:
    """Bytes held now; sets the peak back to them. None where this system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        ctypes.CDLL(None).malloc_trim(
            0
        )  # what was freed goes back to the system: the step must ask for it again
        CLEAR_REFS.write_text("5")
        return _status_bytes("VmRSS")
    except (OSError, AttributeError):  # no Linux, or no glibc
        return None


def _peak_above(device: torch.device, held: int | None) -> float | None:
    if held is None:
        return None
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status_bytes("VmHWM")
    return (peak - held) / 2**20


def _status_bytes(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
