"""Histograms of oriented gradients as a target, as in MaskFeat (arXiv 2112.09133) and MAE-ST's ablation.

    frames ── differences of neighbours ── votes of each pixel ── means over cells ── length 1 ── hog_BLP

Legend: B batch, C channel, F target frame, H height, W width, K orientation, L token, P values of a patch.

From the paper: 9 orientations over 180°, cells of 8 × 8 pixels, each colour on its own, L2-normalised. Histograms are
taken of whole frames and then cut into patches, so that a patch's border is no edge. Where the paper leaves a choice,
this file:
- takes differences of the two neighbours, [−1, 0, 1]; at a frame's border the last pixel is repeated;
- lets a pixel vote with its gradient's length, shared between the two nearest orientations (Dalal and Triggs, CVPR
  2005), so that the target is continuous in the pixels; no interpolation between cells, no Gaussian window;
- normalises each cell's 9 values of one colour to length 1.

Properties that hold:
- Brightness and contrast of a colour change nothing, so the input's normalisation does not matter.
- A cell without gradient is 0. A cell with a mean gradient below EPS, which is rounding noise, stays below length 1.
- The sums have a fixed order (no scatter), so equal frames give equal bits, on CUDA too.
- No value is read back to the host, so `torch.compile(fullgraph=True)` compiles one whole graph.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor

from reelmae.model.config import HOG_BINS, HOG_CELL, require
from reelmae.model.patches import patchify

EPS = 1e-6
"""Mean gradient below which a cell is not scaled to length 1. One grey level is about 1e-2."""


def hog_patches(frames_BCFHW: Tensor, t_patch: int, patch: int) -> Tensor:
    """hog_BLP float32: [B, C, F, H, W] → [B, F/t_patch · H/patch · W/patch, P], tokens t-major as in patches.py.

    `t_patch`: target frames of a token. Values are in the order (frame in tube, cell row, cell column, channel,
    orientation). Orientation k holds gradients around (k + ½) · 20° from the x axis towards greater y: a horizontal
    edge votes for k = 4, a vertical one for 8 and 0. ValueError names a patch that cells do not divide.
    """
    cell = hog_cell(patch)
    return patchify(cell_histograms(frames_BCFHW, cell), t_patch, patch // cell)


def hog_cell(patch: int) -> int:
    """Side of a cell in pixels: 8, or less for smaller patches. ValueError where cells do not fill the patch."""
    cell = min(patch, HOG_CELL)
    require(patch >= 1 and patch % cell == 0, f"hog patch={patch}", f"give a multiple of {HOG_CELL}, or 1 … 7")
    return cell


def cell_histograms(frames_BCFHW: Tensor, cell: int) -> Tensor:
    """Normalised histograms of each cell, float32: [B, C·9, F, H/cell, W/cell], channel-major."""
    dx, dy = gradients(frames_BCFHW.float())
    length = (dx.square() + dy.square()).sqrt()
    # in units of an orientation's width; gradients 180° apart have the same orientation
    turn = torch.atan2(dy, dx) * (HOG_BINS / math.pi)
    # one orientation at a time, so that memory holds nine maps of cells and not nine of pixels
    histograms = [
        reduce(length * _share(turn, k), "b c f (h p) (w q) -> b c f h w", "mean", p=cell, q=cell)
        for k in range(HOG_BINS)
    ]
    return F.normalize(torch.stack(histograms, dim=2), dim=2, eps=EPS).flatten(1, 2)


def gradients(frames_BCFHW: Tensor) -> tuple[Tensor, Tensor]:
    """Right minus left neighbour, and lower minus upper neighbour: two tensors of the frames' shape."""
    padded = F.pad(frames_BCFHW, (1, 1, 1, 1, 0, 0), mode="replicate")
    dx = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    dy = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    return dx, dy


def _share(turn: Tensor, k: int) -> Tensor:
    """Share of each vote for orientation k: 1 at its centre, falling to 0 at its neighbours' centres."""
    away = (turn - (k + 0.5)).remainder(HOG_BINS)
    return (1 - torch.minimum(away, HOG_BINS - away)).clamp(min=0)
