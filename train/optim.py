"""The optimiser's groups and its learning rate, as in MAE-ST (mae_st and PySlowFast) and VideoMAE.

Properties that hold: the rate is a pure function of the step; what is decayed and how much slower a layer learns are pure
functions of a parameter's name and dimensions; every parameter that learns is in exactly one group.
"""

from __future__ import annotations

import math
import re
from typing import Any, Literal, get_args

import torch
from torch import nn

from reelmae.train.config import DecayRule, OptimSection, Schedule

Kind = Literal["bias", "vector", "position", "mask_token", "matrix"]

# what weight decay spares
SPARED: dict[DecayRule, frozenset[Kind]] = {
    "mae_st": frozenset({"bias", "vector"}),  # its pretraining
    "mae_st_bias_wd": frozenset({"bias"}),  # the same, told to decay vectors; it still spares biases
    "mae_st_finetune": frozenset({"bias", "vector", "position"}),
    "slowfast": frozenset({"bias", "vector"}),  # pretraining and fine-tuning
    "videomae": frozenset({"bias", "vector", "position", "mask_token"}),  # pretraining and fine-tuning
}


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

    `schedule` says where the cosine begins, and so where the warm-up leads to; ValueError on another:

    - `after_warmup`: from `peak` at the warm-up's end down to `min_lr` (mae_st; PySlowFast).
    - `from_start`: from `peak` at step 0; the warm-up leads to what is left of it (PySlowFast, COSINE_AFTER_WARMUP off).
    - `videomae`: as `after_warmup`, but the warm-up is whole steps, and its last one has the peak; so has the next.

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
    """What a parameter of our models is to weight decay: `vector` is one-dimensional and no bias, `position` a table of
    positions or a class token, `matrix` everything else."""
    *path, last = name.split(".")
    if last.endswith("bias"):  # also q_bias, v_bias
        return "bias"
    if ndim == 1:
        return "vector"
    if last == "cls_token" or "pos" in path:
        return "position"
    return "mask_token" if last == "mask_token" else "matrix"


def layer_scale(name: str, depth: int, decay: float) -> float:
    """Share of the rate that a parameter learns with: `decay` to the power of the layers above its own.

    The head and all that is behind the encoder's `depth` blocks has 1, the last block `decay`, the first decay^depth, and
    patch embedding, positions and tokens of the encoder decay^(depth + 1). ValueError names a parameter of the encoder that
    has no place among its layers.
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

    `rule` says what is spared by `weight_decay` (SPARED); `layer_decay` below 1 makes lower layers learn more slowly
    (`layer_scale`). Without it there are two groups, decayed and spared. ValueError on another rule, or where layers
    are to be decayed and the model has none by the name of `encoder.blocks`: a compiled or wrapped model has other names.
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


def adamw(model: nn.Module, config: OptimSection) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, fused: one pass over the parameters on CPU and CUDA alike."""
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay, rule=config.decay),
        lr=config.blr,
        betas=config.betas,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of this rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
