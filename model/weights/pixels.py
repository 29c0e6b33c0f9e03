"""How the models of each layout are fed, and weights for pixels that are normalised in another way.

Legend: D width, P values of a patch, its channels last.

Properties that hold: a layout's files do not say what their models are fed, its code does; so what is written in a layout is
for that, and the encoder computes from it what it did before.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from reelmae.model.config import CHANNELS, MAEConfig, ViTConfig
from reelmae.model.weights.layouts import State, WeightsError

Colours = tuple[float, float, float]
IMAGENET: tuple[Colours, Colours] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OURS: tuple[Colours, Colours] = (ViTConfig.pixel_mean, ViTConfig.pixel_std)


def fed(layout: str) -> tuple[Colours, Colours]:
    """Mean and deviation by which pixels in 0 … 1 are normalised: ImageNet's for VideoMAE, .45 and .225 for all others."""
    return IMAGENET if layout.startswith("videomae") else OURS


def refed(state: Mapping[str, Tensor], config: ViTConfig, layout: str) -> State:
    """A state of ours whose patch embedding takes pixels as `layout` feeds them, instead of as `config` says.

    With ours x = (p - m) / s and theirs y = (p - m') / s', x = y·s'/s + (m' - m)/s: the weights take the factor, the bias
    the sum of weights times the offset. The same tensors come back where both are alike. WeightsError where a decoder's target
    would change, too: that of normalised pixels does, that of pixels in 0 … 1 does not.
    """
    (mean, std), (their_mean, their_std) = (config.pixel_mean, config.pixel_std), fed(layout)
    if (mean, std) == (their_mean, their_std):
        return dict(state)
    if "decoder.pred.weight" in state and not (isinstance(config, MAEConfig) and config.unit_pixels):
        raise WeightsError(
            f"pixel_mean={mean}, pixel_std={std}: the layout {layout!r} is fed {their_mean} and {their_std}, "
            "of which the decoder's target is made: export the encoder only, or as safetensors"
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
