"""`reelmae bench step`: a training step with the dense encoder against one with the sparse encoder.

Properties that hold:
- Both are timed in one process, on the same clips and masks, after the same warm-up. They take turns step by step, and
  the median is reported. A step is forward, backward and optimiser; forward and backward are reported alone as well.
- With decoder masking, where a part of the tokens is not predicted, all is timed again; `decoder_mask` holds the same
  fields as the whole result.
- With `data` the steps are timed again behind the real loader, from one batch to the next: `load_step_ms`.
- torch's counter counts the FLOPs of forward and backward on the meta device, where it sees every operation.

Legend: B batch, C channel, T frame, H height, W width, K kept token, Q predicted token.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from reelmae.model.config import OBJECTIVES, MAEConfig
from reelmae.model.mae import MaskedAutoencoder
from reelmae.pipeline.devices import resolve_device
from reelmae.pipeline.errors import ConfigError
from reelmae.pipeline.loading.config import LoaderConfig
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.loading.loader import ClipLoader
from reelmae.pipeline.loading.order.draws import SamplePolicy
from reelmae.pipeline.loading.order.masks import DecoderMaskPolicy, MaskKind, MaskPolicy, ids_decode, ids_keep
from reelmae.pipeline.storage.access import Access
from reelmae.tools.bench.config import BenchStepConfig
from reelmae.tools.machine import machine, versions
from reelmae.train.optim import OptimConfig, adamw
from reelmae.train.precision import autocast_dtype

Encoder = Literal["dense", "sparse"]
ENCODERS: tuple[Encoder, ...] = ("dense", "sparse")
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")  # writing 5 sets VmHWM to what is resident now


@dataclass
class _Times:
    """What the timed steps of one encoder took."""

    step_ms: list[float] = field(default_factory=list)
    forward_backward_ms: list[float] = field(default_factory=list)
    peak_mib: float | None = None
    """Highest memory in a step, above what was held before it. None where the system does not say."""


def bench_step(config: BenchStepConfig, access: Access | None = None) -> dict[str, Any]:
    """Times, FLOPs, memory and speedups, as JSON values. ConfigError names a setting that cannot be timed."""
    mae = _mae(config)
    device = resolve_device(config.device)
    dtype = autocast_dtype(config.precision, device)
    threads = torch.get_num_threads()
    try:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        keep, decode = _ids(config, mae)
        steppers = {e: _Stepper(replace(mae, encoder=e), device, dtype, config) for e in ENCODERS}
        inputs = _inputs(config, mae, device, keep, decode)
        timed = _time_steps(config, steppers, inputs)
        result = _summary(
            timed[False], {e: _flops(replace(mae, encoder=e), config.batch, keep, None) for e in ENCODERS}
        )
        result["tokens"] = {"all": mae.n_tokens, "kept": len(keep)}
        if decode is not None:
            flops = {e: _flops(replace(mae, encoder=e), config.batch, keep, decode) for e in ENCODERS}
            result["decoder_mask"] = _summary(timed[True], flops) | {
                "ratio": 1 - len(decode) / mae.n_tokens,
                "tokens": {"all": mae.n_tokens, "kept": len(keep), "predicted": len(decode)},
            }
        if config.data is not None:
            loaded = _time_behind_loader(config, steppers, mae, access)
            result["load_step_ms"] = {e: loaded[e][0] for e in ENCODERS}
            result["wait_share"] = {e: loaded[e][1] for e in ENCODERS}
            result["speedup"]["load_compute"] = loaded["dense"][0] / loaded["sparse"][0]
        dtype_name, threads_used = "bfloat16" if dtype else "float32", torch.get_num_threads()
        return {
            "model": config.model,
            **result,
            "model_config": {k: v for k, v in asdict(mae).items() if k != "encoder"},
            "settings": asdict(config) | {"device": str(device), "dtype": dtype_name, "threads": threads_used},
            "machine": machine(),
            "versions": versions(),
        }
    finally:
        torch.set_num_threads(threads)


class _Stepper:
    """One model with its optimiser; `step` is a whole training step."""

    def __init__(
        self, mae: MAEConfig, device: torch.device, dtype: torch.dtype | None, config: BenchStepConfig
    ) -> None:
        torch.manual_seed(0)
        self.device, self.dtype = device, dtype
        self.model = MaskedAutoencoder(mae).to(device)
        self.model.set_checkpointing(config.checkpointing)
        self.optimizer = adamw(self.model, OptimConfig())
        if config.compile:
            self.model.compile(fullgraph=True)

    def step(self, *inputs: Tensor | None) -> tuple[float, float]:
        """One step on (clips_BCTHW, ids_keep_BK, ids_decode_BQ or None); ms of forward and backward, and of all."""
        started = time.perf_counter()
        with torch.autocast(self.device.type, dtype=self.dtype) if self.dtype else nullcontext():
            loss = self.model(*inputs).loss
        loss.backward()
        middle = self._now()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return (middle - started) * 1e3, (self._now() - started) * 1e3

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _mae(config: BenchStepConfig) -> MAEConfig:
    for name, least in (("steps", 1), ("warmup", 0), ("batch", 1), ("threads", 1)):
        value = getattr(config, name)
        if value is not None and value < least:
            raise ConfigError(f"{name}={value}: give at least {least}")
    if not 0 < config.mask_ratio < 1:
        raise ConfigError(f"mask_ratio={config.mask_ratio}: give a share between 0 and 1")
    try:
        make = OBJECTIVES[config.objective]
        return make(config.model, frames=config.frames, size=config.size, patch=config.patch)
    except ValueError as e:
        raise ConfigError(str(e)) from e


def _mask_kind(config: BenchStepConfig) -> MaskKind:
    return "tube" if config.objective == "videomae" else "random"


def _ids(config: BenchStepConfig, mae: MAEConfig) -> tuple[np.ndarray, np.ndarray | None]:
    """Numbers of the kept tokens of one clip, and of those predicted with decoder masking."""
    keep = ids_keep(MaskPolicy(_mask_kind(config), config.mask_ratio), 0, mae.grid_THW)
    ratio = config.decoder_mask
    if ratio is None:
        even = all(side % 2 == 0 for side in mae.grid_THW[1:])
        ratio = DecoderMaskPolicy.ratio if even else 0.0
        if not even:
            _say("decoder masking is left out: its cells of 2×2 patches do not divide this grid")
    if not ratio:
        return keep, None
    return keep, ids_decode(DecoderMaskPolicy("cells", ratio), 0, mae.grid_THW)


def _inputs(
    config: BenchStepConfig, mae: MAEConfig, device: torch.device, keep: np.ndarray, decode: np.ndarray | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Noise, and the same masks for each clip of the batch: clips_BCTHW, ids_keep_BK, ids_decode_BQ."""
    generator = torch.Generator().manual_seed(0)
    clips_BCTHW = torch.randn(config.batch, 3, mae.frames, mae.size, mae.size, generator=generator).to(device)
    keep_BK = torch.from_numpy(keep).expand(config.batch, -1).contiguous().to(device)
    decode_BQ = None if decode is None else torch.from_numpy(decode).expand(config.batch, -1).contiguous().to(device)
    return clips_BCTHW, keep_BK, decode_BQ


def _flops(mae: MAEConfig, batch: int, keep: np.ndarray, decode: np.ndarray | None) -> int:
    """FLOPs of forward and backward (two for each multiply-add); nothing is computed."""
    with torch.device("meta"):
        model = MaskedAutoencoder(mae)
        clips_BCTHW = torch.empty(batch, 3, mae.frames, mae.size, mae.size)
        keep_BK = torch.empty(batch, len(keep), dtype=torch.int64)
        decode_BQ = None if decode is None else torch.empty(batch, len(decode), dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(clips_BCTHW, keep_BK, decode_BQ).loss.backward()
    return counter.get_total_flops()


def _time_steps(
    config: BenchStepConfig,
    steppers: dict[Encoder, _Stepper],
    inputs: tuple[Tensor, Tensor, Tensor | None],
) -> dict[bool, dict[Encoder, _Times]]:
    """What each encoder's steps took, without (False) and with (True) decoder masking."""
    clips_BCTHW, keep_BK, decode_BQ = inputs
    device = steppers["sparse"].device
    timed = {masking: {e: _Times() for e in ENCODERS} for masking in (False, True)}
    for i in range(config.warmup + config.steps):
        for masking in (False, True) if decode_BQ is not None else (False,):
            for e in ENCODERS:
                gc.collect()
                held = _reset_peak(device)
                forward_backward, whole = steppers[e].step(clips_BCTHW, keep_BK, decode_BQ if masking else None)
                if i >= config.warmup:
                    times = timed[masking][e]
                    times.step_ms.append(whole)
                    times.forward_backward_ms.append(forward_backward)
                    above = _peak_above(device, held)
                    times.peak_mib = max(times.peak_mib or 0.0, above) if above is not None else None
                what = f"{e}, decoder masked" if masking else e
                _say(f"{what} step {i + 1}/{config.warmup + config.steps}: {whole:.0f} ms")
    return timed


def _summary(timed: dict[Encoder, _Times], flops: dict[Encoder, int]) -> dict[str, Any]:
    """Medians, all times, memory, FLOPs, and how many times faster sparse is than dense."""
    step = {e: statistics.median(timed[e].step_ms) for e in ENCODERS}
    forward_backward = {e: statistics.median(timed[e].forward_backward_ms) for e in ENCODERS}
    return {
        "step_ms": step,
        "forward_backward_ms": forward_backward,
        "step_ms_all": {e: timed[e].step_ms for e in ENCODERS},
        "forward_backward_ms_all": {e: timed[e].forward_backward_ms for e in ENCODERS},
        "flops": flops,
        "step_peak_mib": {e: timed[e].peak_mib for e in ENCODERS},
        "speedup": {
            "compute": step["dense"] / step["sparse"],
            "forward_backward": forward_backward["dense"] / forward_backward["sparse"],
            "flops": flops["dense"] / flops["sparse"],
        },
    }


def _time_behind_loader(
    config: BenchStepConfig, steppers: dict[Encoder, _Stepper], mae: MAEConfig, access: Access | None
) -> dict[Encoder, tuple[float, float]]:
    """Milliseconds a step with the loader in the loop, and the share of them spent waiting for it."""
    assert config.data is not None
    index = ClipIndex.open(config.data, access=access)
    loader_config = LoaderConfig(
        batch_videos=config.batch,
        sample=SamplePolicy(frames=mae.frames, size=mae.size),
        mask=MaskPolicy(_mask_kind(config), config.mask_ratio),
        patch=(mae.t_patch, mae.patch, mae.patch),
        workers=config.workers,
        device=str(steppers["sparse"].device),
    )
    found: dict[Encoder, tuple[float, float]] = {}
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


def _reset_peak(device: torch.device) -> int | None:
    """Bytes in use now; from here on the peak counts from them. None where this system does not say."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # give freed memory back, so that the next step must ask for it again
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
