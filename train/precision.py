"""The arithmetic of a forward pass: float32, or bfloat16 where autocast allows it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # the command line reads Precision without it
    import torch

Precision = Literal["auto", "float32", "bf16"]


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """bfloat16 where a forward pass runs in it, None where it runs in float32. auto: bfloat16 on CUDA."""
    import torch

    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else None
    return torch.bfloat16 if precision == "bf16" else None
