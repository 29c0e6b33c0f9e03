"""Which torch device a name means on this machine."""

from __future__ import annotations

import torch

from reelmae.pipeline.errors import ConfigError


def resolve_device(wish: str) -> torch.device:
    """The torch device of a wish: `auto` is CUDA where there is a device, else the CPU."""
    if wish == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wish)
    except RuntimeError as e:
        raise ConfigError(f"device={wish!r} is not a torch device; give auto, cpu, cuda or cuda:N") from e
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={wish}: torch sees no GPU here; give cpu or auto")
    return device
