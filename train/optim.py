"""The optimiser's groups and its learning rate, as in MAE-ST (mae_st and PySlowFast) and VideoMAE.

Properties that hold:
- The learning rate is a pure function of the step.
- Weight decay and the layer's share of the rate are pure functions of a parameter's name and dimensions.
- Every parameter that learns is in exactly one group.
"""

from __future__ import annotations

import math
import re
from typing import Any, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

DecayRule = Literal["mae_st", "mae_st_bias_wd", "mae_st_finetune", "slowfast", "videomae"]
Schedule = Literal["after_warmup", "from_start", "videomae"]
Kind = Literal["bias", "vector", "position", "mask_token", "matrix"]

# the parameters without weight decay
SPARED: dict[DecayRule, frozenset[Kind]] = {
    "mae_st": frozenset({"bias", "vector"}),  # its pretraining
    "mae_st_bias_wd": frozenset({"bias"}),  # mae_st with vectors decayed; it still spares biases
    "mae_st_finetune": frozenset({"bias", "vector", "position"}),
    "slowfast": frozenset({"bias", "vector"}),  # pretraining and fine-tuning
    "videomae": frozenset({"bias", "vector", "position", "mask_token"}),  # pretraining and fine-tuning
}


class OptimConfig(BaseModel):
    """AdamW with warm-up and cosine; the rate changes at every step."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    blr: float = Field(default=1.6e-3, gt=0)
    """Peak learning rate for 256 videos a step. The run's peak rate is blr × videos a step / 256."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay of the mean and of the squared mean of the gradients."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Of the parameters that `decay` does not spare."""
    decay: DecayRule = "mae_st"
    """Which parameters are spared from weight decay (see SPARED)."""
    schedule: Schedule = "after_warmup"
    """Where the cosine begins (see learning_rate)."""
    warmup: float = Field(default=0.15, ge=0, lt=1)
    """Length of the warm-up, as a share of all steps."""
    start_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the beginning of the warm-up."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the cosine."""
    clip_grad: float = Field(default=0.02, ge=0)
    """Largest norm of the gradient; a larger one is scaled down to it. 0: no clipping."""

    def rate(self, step: int, steps: int, peak: float) -> float:
        """Learning rate of step `step` (from 0) of `steps`."""
        return learning_rate(
            step,
            steps,
            peak=peak,
            warmup=self.warmup,
            min_lr=self.min_lr,
            start_lr=self.start_lr,
            schedule=self.schedule,
        )


def learning_rate(
    step: int,
    steps: int,
    *,
    peak: float,
    warmup: float,
    min_lr: float = 0.0,
    start_lr: float = 0.0,
    schedule: Schedule = "after_warmup",
) -> float:
    """Rate of step `step` (from 0) of `steps`: linear from `start_lr` over the first `warmup` share, then half a cosine.

    `schedule` says where the cosine begins, and so the rate at the end of the warm-up. ValueError on another:

    - `after_warmup`: from `peak` at the warm-up's end down to `min_lr` (mae_st; PySlowFast).
    - `from_start`: from `peak` at step 0; the warm-up ends on the cosine, below the peak (PySlowFast, COSINE_AFTER_WARMUP off).
    - `videomae`: as `after_warmup`, but the warm-up has whole steps. Its last step has the peak, and so has the next one.

    Ten steps to peak 1, warmup 0.3: `after_warmup` 0, ⅓, ⅔, 1, 0.95, …; `videomae` 0, ½, 1, 1, 0.95, …
    """
    if schedule not in get_args(Schedule):
        raise ValueError(f"schedule={schedule!r}: give one of {', '.join(get_args(Schedule))}")
    start = warmup * steps
    whole = schedule == "videomae"
    if whole:
        start = round(start)
    begin = 0.0 if schedule == "from_start" else start
    if step >= start:
        return _cosine(step, begin, steps, peak, min_lr)
    top = _cosine(start, begin, steps, peak, min_lr)
    return start_lr + (top - start_lr) * step / (max(start - 1, 1) if whole else start)


def _cosine(step: float, begin: float, end: float, peak: float, least: float) -> float:
    """Half a cosine from `peak` at `begin` to `least` at `end`."""
    turn = (step - begin) / (end - begin) if end > begin else 0.0  # a run that is warm-up only
    return least + (peak - least) * 0.5 * (1 + math.cos(math.pi * turn))


def kind(name: str, ndim: int) -> Kind:
    """The kind of a parameter of our models, as weight decay distinguishes them.

    `vector`: one dimension, not a bias. `position`: a table of positions or a class token. `matrix`: all others.
    """
    *path, last = name.split(".")
    if last.endswith("bias"):  # also q_bias, v_bias
        return "bias"
    if ndim == 1:
        return "vector"
    if last == "cls_token" or "pos" in path:
        return "position"
    return "mask_token" if last == "mask_token" else "matrix"


def layer_scale(name: str, depth: int, decay: float) -> float:
    """Factor of the learning rate of a parameter: `decay` to the power of the number of layers above its own.

    The head and everything after the encoder's `depth` blocks: 1. The last block: decay. The first block: decay^depth. Patch
    embedding, positions and tokens of the encoder: decay^(depth + 1). ValueError names a parameter of the encoder that
    belongs to none of its layers.
    """
    if not name.startswith("encoder."):
        return 1.0
    block = re.match(r"encoder\.blocks\.(\d+)\.", name)
    if block is not None and int(block[1]) < depth:
        return decay ** (depth - int(block[1]))
    if name.startswith("encoder.norm."):
        return 1.0
    if re.match(r"encoder\.(patch_embed\.|pos\.|cls_token$|mask_token$)", name):
        return decay ** (depth + 1)
    raise ValueError(f"{name}: no layer of an encoder with {depth} blocks; give its own depth and our names")


def parameter_groups(
    model: nn.Module, weight_decay: float, *, rule: DecayRule = "mae_st", layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Groups for an optimiser, `{params, weight_decay, lr_scale}`: lower layers first, in each the decayed ones first.

    `rule` says which parameters `weight_decay` spares (SPARED). `layer_decay` below 1 makes lower layers learn more slowly
    (`layer_scale`); with 1 there are two groups, decayed and spared. ValueError on another rule, and on a `layer_decay` other
    than 1 for a model without `encoder.blocks`: a compiled or wrapped model has other names.
    """
    if rule not in SPARED:
        raise ValueError(f"rule={rule!r}: give one of {', '.join(SPARED)}")
    names = [name for name, _ in model.named_parameters()]
    depth = len({n.split(".")[2] for n in names if n.startswith("encoder.blocks.")})
    if layer_decay != 1 and depth == 0:
        raise ValueError(f"layer_decay={layer_decay}: no encoder.blocks.* in the model; give the bare model")
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spared = kind(name, parameter.ndim) in SPARED[rule]
            scale = layer_scale(name, depth, layer_decay) if layer_decay != 1 else 1.0
            groups.setdefault((scale, spared), []).append(parameter)
    return [
        {"params": groups[scale, spared], "weight_decay": 0.0 if spared else weight_decay, "lr_scale": scale}
        for scale, spared in sorted(groups)
    ]


def adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`. Fused: one pass over the parameters, on CPU and CUDA."""
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay, rule=config.decay),
        lr=config.blr,
        betas=config.betas,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set every group's rate to its share (`lr_scale`) of this one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
