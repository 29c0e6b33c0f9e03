"""Positions of space-time tokens: learned for space and time apart, learned jointly, or fixed.

Properties that hold: tokens are numbered t-major. The class token, where there is one, has its own row (`cls`). Nothing
here depends on the batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reelmae.model.config import PositionInit, Positions

GridTHW = tuple[int, int, int]


class PositionTable(nn.Module, ABC):
    """Base of all kinds of positions."""

    cls: nn.Parameter | None
    """The class token's position [1, 1, D]; None without a class token."""

    @abstractmethod
    def tokens(self) -> Tensor:
        """Positions of all tokens, t-major: [1, L, D]."""

    def at(self, ids_BK: Tensor) -> Tensor:
        """Positions of some tokens (int64 numbers): [B, K, D]."""
        return F.embedding(ids_BK, self.tokens()[0])

    def _begin(self, dim: int, cls: bool, *tables: nn.Parameter) -> None:
        self.cls = nn.Parameter(torch.empty(1, 1, dim)) if cls else None
        for table in (*tables, *([self.cls] if self.cls is not None else [])):
            nn.init.trunc_normal_(table, std=0.02)


class SeparablePositions(PositionTable):
    """Spatial [1, H'W', D] + temporal [1, T', D], learned: a token's position is spatial[h, w] + temporal[t].

    They start as trunc-normal(0.02) noise, as in MAE-ST, or as `sincos`: sines and cosines of row, column and time, so
    that neighbours are similar before the first step. A short run reaches a lower loss with `sincos`
    (train/RESULTS.md).
    """

    def __init__(self, grid_THW: GridTHW, dim: int, *, cls: bool = True, init: PositionInit = "normal") -> None:
        super().__init__()
        t, h, w = grid_THW
        self.spatial = nn.Parameter(torch.empty(1, h * w, dim))
        self.temporal = nn.Parameter(torch.empty(1, t, dim))
        self._begin(dim, cls, self.spatial, self.temporal)
        if init == "sincos":
            with torch.no_grad():
                _sincos(self.spatial[0].view(1, h, w, dim), times=False)
                _sincos(self.temporal[0].view(t, 1, 1, dim), places=False)

    def tokens(self) -> Tensor:
        """Positions of all tokens, t-major: [1, L, D]."""
        return (self.temporal[:, :, None] + self.spatial[:, None]).flatten(1, 2)


class JointPositions(PositionTable):
    """One learned row for each token, `table` [1, L, D]. It starts as SeparablePositions do."""

    def __init__(self, grid_THW: GridTHW, dim: int, *, cls: bool = True, init: PositionInit = "normal") -> None:
        super().__init__()
        t, h, w = grid_THW
        self.table = nn.Parameter(torch.empty(1, t * h * w, dim))
        self._begin(dim, cls, self.table)
        if init == "sincos":
            with torch.no_grad():
                _sincos(self.table[0].view(t, h, w, dim))

    def tokens(self) -> Tensor:
        """Positions of all tokens, t-major: [1, L, D]."""
        return self.table


class SinusoidPositions(PositionTable):
    """Fixed sines and cosines over the token's number, as in VideoMAE. They are not in the state dict.

    Column j of row n is the sine (j even) or cosine (j odd) of n / 10000^(2·⌊j/2⌋ / D).
    """

    table: Tensor

    def __init__(self, grid_THW: GridTHW, dim: int, *, cls: bool = False) -> None:
        super().__init__()
        n = math.prod(grid_THW)
        column_D = torch.arange(dim, device="cpu")
        turns_D = 10000.0 ** (2.0 * (column_D // 2).double() / dim)
        angle_LD = torch.arange(n, device="cpu").double()[:, None] / turns_D
        table_LD = torch.where(column_D % 2 == 0, angle_LD.sin(), angle_LD.cos())
        # computed on the CPU above, so that a default device (such as meta) changes where the table is, not its values
        self.register_buffer("table", table_LD.float()[None].to(torch.get_default_device()), persistent=False)
        self._begin(dim, cls)

    def tokens(self) -> Tensor:
        """Positions of all tokens, t-major: [1, L, D]."""
        return self.table


def positions(kind: Positions, grid_THW: GridTHW, dim: int, *, cls: bool, init: PositionInit) -> PositionTable:
    """Positions of the given kind. `init` has no effect on fixed ones."""
    if kind == "sinusoid":
        return SinusoidPositions(grid_THW, dim, cls=cls)
    return (SeparablePositions if kind == "separable" else JointPositions)(grid_THW, dim, cls=cls, init=init)


def _sincos(table_THWD: Tensor, *, times: bool = True, places: bool = True) -> None:
    """Fill in place: a third of the width each for row, column and time. Columns left over keep their values."""
    t, h, w, dim = table_THWD.shape
    third = dim // 6 * 2
    if places:
        table_THWD[..., :third] = waves(h, third)[:, None]
        table_THWD[..., third : 2 * third] = waves(w, third)
    if times:
        table_THWD[..., 2 * third : 3 * third] = waves(t, third)[:, None, None]


def waves(n: int, dim: int) -> Tensor:
    """Sines and cosines of 0 … n - 1, [n, dim]. The fastest turns 90° per step, the slowest 90° over the whole axis."""
    turns = math.pi / 2 / torch.logspace(0, math.log2(max(n, 2)), dim // 2, base=2)
    angles = torch.arange(n)[:, None] * turns
    return torch.cat((angles.sin(), angles.cos()), dim=1)
