"""The optimiser's groups and its learning rate, as in MAE-ST's pretraining.

Properties that hold: biases and 1-D parameters are not decayed, tokens and positions are; the rate is a pure
function of the step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from reelmae.train.config import OptimSection


def learning_rate(step: int, steps: int, *, peak: float, warmup: float, min_lr: float = 0.0) -> float:
    """Rate of step `step` (from 0) of `steps`: linear from 0 over the first `warmup` share, then half a cosine."""
    start = warmup * steps
    if step < start:
        return peak * step / start
    return min_lr + (peak - min_lr) * 0.5 * (1 + math.cos(math.pi * (step - start) / (steps - start)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: decayed, and (biases and 1-D parameters) not decayed."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    plain = [p for n, p in named if p.ndim == 1 or n.endswith(".bias")]
    decayed = [p for n, p in named if not (p.ndim == 1 or n.endswith(".bias"))]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def adamw(model: nn.Module, config: OptimSection) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, fused: one pass over the parameters on CPU and CUDA alike."""
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay), lr=config.blr, betas=config.betas, fused=True
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group this rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
