"""Which decoder plays a dataset on a machine, and its making.

A backend that the configuration names is used, or refused with a remedy; `auto` decides and says why.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from reelmae.pipeline.cores import usable_cores
from reelmae.pipeline.errors import ConfigError
from reelmae.pipeline.loading.decode.av_pool import AvPool
from reelmae.pipeline.loading.decode.pyav import InlineDecoder
from reelmae.pipeline.loading.fetch.clip import SourceSettings
from reelmae.pipeline.loading.fetch.shard_cache import CacheSettings
from reelmae.pipeline.loading.tasks import BatchDecoder, DecodePolicy, OnBad
from reelmae.pipeline.storage.store import Store

if TYPE_CHECKING:  # PyAV needs no torch
    import torch

Resolved = Literal["av", "dali-cpu", "dali-gpu"]
DALI_CPU_CODECS = frozenset({"vp8", "vp9", "mjpeg"})


def resolve_backend(wish: str, codecs: Iterable[str], device: torch.device) -> tuple[Resolved, str]:
    """(backend, why). ConfigError where the wish cannot be met, naming the remedy."""
    if wish == "auto":
        if device.type == "cuda" and _has_dali():
            return "dali-gpu", f"the device is {device} and DALI is installed: NVDEC decodes"
        return "av", "clips are decoded on the CPU, where PyAV plays every codec"
    if wish == "av":
        return "av", "asked for"
    if not _has_dali():
        raise ConfigError(
            f"backend={wish!r}: nvidia-dali is not installed; pip install nvidia-dali-cuda130, or backend=av"
        )
    if wish == "dali-gpu":
        if device.type != "cuda":
            raise ConfigError(
                f"backend='dali-gpu' on device {str(device)!r}: NVDEC needs an NVIDIA GPU; "
                "use backend=av, or device=cuda on a machine with one"
            )
        return "dali-gpu", "asked for"
    assert wish == "dali-cpu", wish
    foreign, known = sorted(set(codecs) - DALI_CPU_CODECS), ", ".join(sorted(DALI_CPU_CODECS))
    if foreign:
        raise ConfigError(
            f"backend='dali-cpu' cannot decode {', '.join(foreign)} (on CPU, DALI has {known}); "
            "use backend=av, or shard with --profile vp9, or use backend=dali-gpu on a GPU"
        )
    return "dali-cpu", "asked for"


def _has_dali() -> bool:
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


def make_decoder(
    backend: Resolved,
    stores: Sequence[Store],
    shape: tuple[int, int, int, int, int, int],
    *,
    on_bad: OnBad,
    workers: int | None,
    slots: int,
    timeout_s: float,
    policy: DecodePolicy = "auto",
    device: torch.device | None = None,
    pipelines: int = 1,
    cache: CacheSettings | None = None,
) -> BatchDecoder:
    """The decoder of clips in `stores`. `shape` is (videos, R, 3, T, H, W) of one batch.

    `workers` None is one for each core; 0 decodes in the caller's thread (av). At most `slots` batches may be between
    submit and release. `timeout_s` and `policy` are for av, `device` (of dali-gpu) and `pipelines` for DALI.
    """
    source = SourceSettings(tuple(stores), cache)
    workers = usable_cores() if workers is None else workers
    if backend != "av":
        from reelmae.pipeline.loading.decode.dali import DaliDecoder  # takes a second, so only where it is used

        return DaliDecoder(
            source,
            shape,
            device=device if backend == "dali-gpu" else None,
            threads=max(1, workers),
            pipelines=pipelines,
            on_bad=on_bad,
        )
    if workers == 0:
        return InlineDecoder(source, shape, policy=policy, on_bad=on_bad)
    return AvPool(source, shape, policy=policy, workers=workers, slots=slots, timeout_s=timeout_s, on_bad=on_bad)
