"""Learned positions of space-time tokens.

Properties that hold: a token's position is spatial[h, w] + temporal[t], t-major; the class token has a row of
its own. Nothing here depends on the batch.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PositionInit = Literal["normal", "sincos"]


class SeparablePositions(nn.Module):
    """Spatial [1, H'W', D] + temporal [1, T', D] + class [1, 1, D], all learned.

    They begin as trunc-normal(0.02) noise, as in MAE-ST, or as `sincos`: sines and cosines of row, column and time,
    so that neighbours are alike before the first step. A short run gets further from there (train/RESULTS.md).
    """

    def __init__(self, grid_THW: tuple[int, int, int], dim: int, init: PositionInit = "normal") -> None:
        super().__init__()
        t, h, w = grid_THW
        self.spatial = nn.Parameter(torch.empty(1, h * w, dim))
        self.temporal = nn.Parameter(torch.empty(1, t, dim))
        self.cls = nn.Parameter(torch.empty(1, 1, dim))
        for table in (self.spatial, self.temporal, self.cls):
            nn.init.trunc_normal_(table, std=0.02)
        if init == "sincos":
            self._sincos(h, w)

    @torch.no_grad()
    def _sincos(self, height: int, width: int) -> None:
        """A third of the width each for row, column and time; what is left over stays noise."""
        third = self.spatial.shape[-1] // 6 * 2
        rows_HE, columns_WE = waves(height, third), waves(width, third)
        self.spatial[0, :, :third] = rows_HE.repeat_interleave(width, dim=0)
        self.spatial[0, :, third : 2 * third] = columns_WE.repeat(height, 1)
        self.temporal[0, :, 2 * third : 3 * third] = waves(self.temporal.shape[1], third)

    def tokens(self) -> Tensor:
        """Positions of all tokens, t-major: [1, L, D]."""
        return (self.temporal[:, :, None] + self.spatial[:, None]).flatten(1, 2)

    def at(self, ids_BK: Tensor) -> Tensor:
        """Positions of some tokens (int64 numbers): [B, K, D]."""
        return F.embedding(ids_BK, self.tokens()[0])


def waves(n: int, dim: int) -> Tensor:
    """[n, dim] sines and cosines of 0 … n - 1, from a quarter turn a step to a quarter turn over the axis."""
    turns = math.pi / 2 / torch.logspace(0, math.log2(max(n, 2)), dim // 2, base=2)
    angles = torch.arange(n)[:, None] * turns
    return torch.cat((angles.sin(), angles.cos()), dim=1)
