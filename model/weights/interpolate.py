"""Resize learned positions to another grid of tokens.

Legend: D width, T H W the grid of tokens (T', H', W' elsewhere), L = T·H·W, t-major.

Properties that hold: a table of the same grid is returned unchanged. Each column is resampled on its own, at the
centres of the new cells (`align_corners=False`), so a constant column stays constant.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

GridTHW = tuple[int, int, int]


def resize_spatial(table_1LD: Tensor, old_HW: tuple[int, int], new_HW: tuple[int, int]) -> Tensor:
    """[1, H·W, D] → [1, H'·W', D]: bicubic, with antialiasing where it shrinks, as in timm."""
    if old_HW == new_HW:
        return table_1LD
    image = table_1LD.float().unflatten(1, old_HW).permute(0, 3, 1, 2)
    image = F.interpolate(image, new_HW, mode="bicubic", align_corners=False, antialias=True)
    return image.permute(0, 2, 3, 1).flatten(1, 2).to(table_1LD.dtype)


def resize_temporal(table_1TD: Tensor, new_T: int) -> Tensor:
    """[1, T, D] → [1, T', D]: linear."""
    if table_1TD.shape[1] == new_T:
        return table_1TD
    line = F.interpolate(table_1TD.float().transpose(1, 2), new_T, mode="linear", align_corners=False)
    return line.transpose(1, 2).to(table_1TD.dtype)


def resize_joint(table_1LD: Tensor, old_THW: GridTHW, new_THW: GridTHW) -> Tensor:
    """[1, L, D] → [1, L', D]: first each time step bicubic over space, then each place linear over time."""
    t, h, w = old_THW
    frames_TLD = table_1LD.unflatten(1, (t, h * w))[0]
    frames_TLD = resize_spatial(frames_TLD, (h, w), new_THW[1:])
    places_L = resize_temporal(frames_TLD.transpose(0, 1), new_THW[0])
    return places_L.transpose(0, 1).flatten(0, 1)[None]
