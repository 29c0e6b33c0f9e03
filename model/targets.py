"""Targets of a masked autoencoder, made only for the tokens that the loss reads.

Legend: B batch, C channel, T frame, F target frame, L token, Q predicted token, P values of a token.

Properties that hold: targets are float32 and without gradient. The values of a token are in the order (frame in tube,
row, column, channel). Given the true clip, a pixel target can be turned back into pixels (`Targets.to_clip`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reelmae.model.config import CHANNELS, MAEConfig
from reelmae.model.hog import hog_patches
from reelmae.model.motion import change, motion_pairs
from reelmae.model.patches import gather_patches, patchify, unpatchify

EPS = 1e-6
"""Added to the variance of a patch, or to its deviation for `channel`."""


class Targets(nn.Module):
    """The targets of a MAEConfig."""

    frame_index_F: Tensor
    mean_P: Tensor
    std_P: Tensor

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        self.config = config
        pixels = config.pixel_values // CHANNELS
        self.register_buffer("frame_index_F", torch.tensor(config.target_frame_index()), persistent=False)
        self.register_buffer("mean_P", torch.tensor(config.pixel_mean).repeat(pixels), persistent=False)
        self.register_buffer("std_P", torch.tensor(config.pixel_std).repeat(pixels), persistent=False)

    @torch.no_grad()
    def space(self, clips_BCTHW: Tensor, ids_BQ: Tensor) -> Tensor:
        """Pixels or histograms of gradients of some tokens: [B, Q, P]."""
        c = self.config
        if c.target == "hog":
            frames_BCFHW = clips_BCTHW.index_select(2, self.frame_index_F).float()
            hog_BLP = hog_patches(frames_BCFHW, c.target_t_patch, c.patch)
            return hog_BLP.gather(1, ids_BQ[..., None].expand(-1, -1, hog_BLP.shape[-1]))
        return self._normalise(self._pixels(clips_BCTHW, ids_BQ))

    @torch.no_grad()
    def motion(self, clips_BCTHW: Tensor, ids_BQ: Tensor) -> Tensor:
        """The change of some tokens' pixels: [B, Q, P]."""
        c = self.config
        assert c.motion is not None
        first_F, later_F = motion_pairs(self.frame_index_F, c.frames, c.motion.gap)
        first_BQP, later_BQP = (
            gather_patches(clips_BCTHW, ids_BQ, c.target_t_patch, c.patch, frame_index_F)
            for frame_index_F in (first_F, later_F)
        )
        diff_BQP = change(later_BQP, first_BQP, c.motion.sign)
        if c.motion.norm == "patch":
            mean, std = _moments(diff_BQP)
            diff_BQP = (diff_BQP - mean) / std
        return diff_BQP

    def to_clip(self, pred_BLP: Tensor, clips_BCTHW: Tensor) -> Tensor:
        """A prediction of all tokens' pixels as frames [B, C, F, H, W], on the scale of `clips_BCTHW`.

        Where the target is normalised, mean and deviation are those of the true clip, because the model does not
        predict them. ValueError where the target is not pixels.
        """
        c = self.config
        if c.target != "pixels":
            raise ValueError(f"target={c.target!r}: has no pixels to show; give a model that predicts pixels")
        true_BLP = self._all_pixels(clips_BCTHW)
        pred_BLP = pred_BLP.float()
        if c.target_norm == "patch":
            mean, std = _moments(true_BLP)
            pred_BLP = pred_BLP * std + mean
        elif c.target_norm == "channel":
            mean, std = _channel_moments(true_BLP)
            pred_BLP = (_by_channel(pred_BLP) * std + mean).flatten(-2)
        if c.unit_pixels:
            pred_BLP = (pred_BLP - self.mean_P) / self.std_P
        return unpatchify(pred_BLP, c.grid_THW, c.target_t_patch, c.patch)

    def _normalise(self, pixels_BQP: Tensor) -> Tensor:
        norm = self.config.target_norm
        if norm == "patch":
            mean, std = _moments(pixels_BQP)
            return (pixels_BQP - mean) / std
        if norm == "channel":
            mean, std = _channel_moments(pixels_BQP)
            return ((_by_channel(pixels_BQP) - mean) / std).flatten(-2)
        return pixels_BQP

    def _pixels(self, clips_BCTHW: Tensor, ids_BQ: Tensor) -> Tensor:
        c = self.config
        some_BQP = gather_patches(clips_BCTHW, ids_BQ, c.target_t_patch, c.patch, self.frame_index_F)
        return self._to_target_scale(some_BQP)

    def _all_pixels(self, clips_BCTHW: Tensor) -> Tensor:
        c = self.config
        frames_BCFHW = clips_BCTHW.index_select(2, self.frame_index_F)
        return self._to_target_scale(patchify(frames_BCFHW, c.target_t_patch, c.patch))

    def _to_target_scale(self, pixels_BQP: Tensor) -> Tensor:
        pixels_BQP = pixels_BQP.float()
        return pixels_BQP * self.std_P + self.mean_P if self.config.unit_pixels else pixels_BQP


def _moments(patches_BQP: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each patch: unbiased variance, eps inside the root (MAE-ST). [B, Q, 1] each."""
    var, mean = torch.var_mean(patches_BQP, dim=-1, correction=1, keepdim=True)
    return mean, (var + EPS).sqrt()


def _by_channel(patches_BQP: Tensor) -> Tensor:
    """[B, Q, P] → [B, Q, P / C, C]."""
    return patches_BQP.unflatten(-1, (-1, CHANNELS))


def _channel_moments(patches_BQP: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each colour in a patch: unbiased, eps outside the root (VideoMAE). [B, Q, 1, C] each."""
    var, mean = torch.var_mean(_by_channel(patches_BQP), dim=-2, correction=1, keepdim=True)
    return mean, var.sqrt() + EPS
