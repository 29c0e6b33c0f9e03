"""Learned positions of space-time tokens.

Properties that hold: a token's position is spatial[h, w] + temporal[t], t-major; the class token has a row of
its own. Nothing here depends on the batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SeparablePositions(nn.Module):
    """Spatial [1, H'W', D] + temporal [1, T', D] + class [1, 1, D], all learned, trunc-normal(0.02)."""

    def __init__(self, grid_THW: tuple[int, int, int], dim: int) -> None:
        super().__init__()
        t, h, w = grid_THW
        self.spatial = nn.Parameter(torch.empty(1, h * w, dim))
        self.temporal = nn.Parameter(torch.empty(1, t, dim))
        self.cls = nn.Parameter(torch.empty(1, 1, dim))
        for table in (self.spatial, self.temporal, self.cls):
            nn.init.trunc_normal_(table, std=0.02)

    def tokens(self) -> Tensor:
        """Positions of all tokens, t-major: [1, L, D]."""
        return (self.temporal[:, :, None] + self.spatial[:, None]).flatten(1, 2)

    def at(self, ids_BK: Tensor) -> Tensor:
        """Positions of some tokens (int64 numbers): [B, K, D]."""
        return F.embedding(ids_BK, self.tokens()[0])
