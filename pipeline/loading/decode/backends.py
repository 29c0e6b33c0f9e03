"""Which decoder plays a dataset on a machine: an explicit wish is met or refused with a remedy, `auto` decides and says why."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Literal

import torch

from reelmae.pipeline.errors import ConfigError

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
                f"backend='dali-gpu' on device {str(device)!r}: NVDEC needs an NVIDIA GPU; use backend=av, or device=cuda on one"
            )
        return "dali-gpu", "asked for"
    assert wish == "dali-cpu", wish
    foreign = sorted(set(codecs) - DALI_CPU_CODECS)
    if foreign:
        raise ConfigError(
            f"backend='dali-cpu' cannot decode {', '.join(foreign)} (on CPU, DALI has {', '.join(sorted(DALI_CPU_CODECS))}); "
            "use backend=av, or shard with --profile vp9, or use backend=dali-gpu on a GPU"
        )
    return "dali-cpu", "asked for"


def _has_dali() -> bool:
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
