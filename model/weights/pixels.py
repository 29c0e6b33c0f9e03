"""The pixel statistics of each layout, and weights for pixels that are normalised with others.

Legend: D width, P values of a patch, its channels last.

Properties that hold: files of other codes do not hold the statistics of their input, their code fixes them. So a model
that is written in a layout takes pixels normalised with that layout's statistics, and its encoder computes from them
what it did before.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from reelmae.model.config import CHANNELS, MAEConfig, ViTConfig
from reelmae.model.weights.layouts import State
from reelmae.pipeline.errors import WeightsError

Colours = tuple[float, float, float]
IMAGENET: tuple[Colours, Colours] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DEFAULT: tuple[Colours, Colours] = (ViTConfig.pixel_mean, ViTConfig.pixel_std)


def pixel_statistics(layout: str) -> tuple[Colours, Colours]:
    """Mean and deviation that normalise pixels in 0 … 1: ImageNet's for VideoMAE, .45 and .225 for all others."""
    return IMAGENET if layout.startswith("videomae") else DEFAULT


def renormalise(state: Mapping[str, Tensor], config: ViTConfig, layout: str) -> State:
    """A state dict of ours whose patch embedding takes pixels with the statistics of `layout`, not those of `config`.

    With ours x = (p - m) / s and theirs y = (p - m') / s', x = y·s'/s + (m' - m)/s: weights are multiplied by the
    factor, and the bias gains the sum of weights times the offset. The same tensors come back where both are alike.

    WeightsError where a decoder's target would change too. A target of normalised pixels does, one of pixels in 0 … 1
    does not.
    """
    (mean, std), (their_mean, their_std) = (config.pixel_mean, config.pixel_std), pixel_statistics(layout)
    if (mean, std) == (their_mean, their_std):
        return dict(state)
    if "decoder.pred.weight" in state and not (isinstance(config, MAEConfig) and config.unit_pixels):
        raise WeightsError(
            f"pixel_mean={mean}, pixel_std={std}: the layout {layout!r} takes {their_mean} and {their_std}, "
            "and the decoder's target depends on them: export the encoder only, or as safetensors"
        )
    weight_DP, bias_D = state["encoder.patch_embed.weight"], state["encoder.patch_embed.bias"]
    repeats = weight_DP.shape[1] // CHANNELS
    m, s, their_m, their_s = (
        torch.tensor(c, dtype=torch.float64).repeat(repeats) for c in (mean, std, their_mean, their_std)
    )
    w = weight_DP.double()
    return {
        **state,
        "encoder.patch_embed.weight": (w * (their_s / s)).to(weight_DP.dtype),
        "encoder.patch_embed.bias": (bias_D.double() + w @ ((their_m - m) / s)).to(bias_D.dtype),
    }
