"""Pure: a mask seed → the tokens that the encoder sees, and those that the decoder predicts.

Tokens are numbered time-major: `t * H * W + h * W + w` of a grid (T, H, W). Kinds:
- `random`  any tokens, agnostic of space and time (MAE-ST);
- `tube`    the same places at every time (VideoMAE's, MAE-ST's "space-only");
- `frame`   whole times ("time-only");
- `block`   cuboids are removed until the wanted number is gone.

Properties that hold: the number kept depends on the grid and the policy alone (static shapes), ids are
ascending, distinct, and a pure function of (policy, mask seed, grid). For the grid (8, 14, 14) at 0.9:
random and block keep 156 of 1568, tube 160 (20 of 196 places), frame 196 (1 of 8 times).

Decoder masks (VideoMAE V2, arXiv 2303.16727) leave out some of the tokens that would be predicted. `cells` is the
paper's running cell: a share of every 2×2 places is left out, and the pattern moves by one place from each time to the
next, so that every place is predicted at some time. Example, ratio 0.5, one cell at times 0, 1, 2, 3 (x = left out):
    x x   x .   . .   . x
    . .   . x   x x   x .      (the order within a cell: upper left, upper right, lower left, lower right)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from reelmae.pipeline.errors import ConfigError
from reelmae.pipeline.loading.order.philox import STREAM_MASK, below, raw_bits

MaskKind = Literal["random", "tube", "frame", "block"]
DecoderMaskKind = Literal["none", "cells"]
GridTHW = tuple[int, int, int]
CELL = 4  # places of a 2×2 cell
BLOCK_TRIES = 64


@dataclass(frozen=True)
class MaskPolicy:
    """Which tokens are removed: `ratio` of them, in the pattern `kind`."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    kind: MaskKind = "random"
    """Pattern in which tokens are removed."""
    ratio: float = 0.9
    """Share of the tokens that is removed."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(MaskKind):
            raise ConfigError(f"mask.kind={self.kind!r}: one of {', '.join(get_args(MaskKind))}")
        if not 0 <= self.ratio < 1:
            raise ConfigError(f"mask.ratio={self.ratio}: the share removed, 0 <= ratio < 1")


@dataclass(frozen=True)
class DecoderMaskPolicy:
    """Which tokens are not predicted: none, or `ratio` of them in running cells (1/4, 1/2 or 3/4)."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    kind: DecoderMaskKind = "none"
    """none: all tokens are predicted. cells: a share of every 2×2 places is left out."""
    ratio: float = 0.5
    """Share of the tokens that is not predicted."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(DecoderMaskKind):
            raise ConfigError(f"decoder_mask.kind={self.kind!r}: one of {', '.join(get_args(DecoderMaskKind))}")
        if self.ratio not in (0.25, 0.5, 0.75):
            raise ConfigError(
                f"decoder_mask.ratio={self.ratio}: give 0.25, 0.5 or 0.75, the share of a cell's four places left out"
            )


def n_keep(kind: MaskKind, ratio: float, grid_THW: GridTHW) -> int:
    """Number of tokens kept, rounded as the reference implementations of each kind do."""
    t, h, w = grid_THW
    if kind == "tube":
        kept = (h * w - int(ratio * h * w)) * t
    elif kind == "frame":
        kept = (t - int(ratio * t)) * h * w
    else:
        kept = int(t * h * w * (1 - ratio))
    if kept < 1:
        raise ConfigError(
            f"mask.ratio={ratio} leaves no token of the grid {t}×{h}×{w}; lower it, use a larger clip or smaller patch"
        )
    return kept


def ids_keep(policy: MaskPolicy, mask_seed: int, grid_THW: GridTHW) -> np.ndarray:
    """int64 [K]: the kept tokens, ascending."""
    t, h, w = grid_THW
    n = n_keep(policy.kind, policy.ratio, grid_THW)
    if policy.kind == "block":
        return _block(mask_seed, grid_THW, n)
    if policy.kind == "tube":
        places = _choose(mask_seed, h * w, n // t)
        return (np.arange(t)[:, None] * (h * w) + places).reshape(-1)
    if policy.kind == "frame":
        times = _choose(mask_seed, t, n // (h * w))
        return (times[:, None] * (h * w) + np.arange(h * w)).reshape(-1)
    return _choose(mask_seed, t * h * w, n)


def ids_decode(policy: DecoderMaskPolicy, mask_seed: int, grid_THW: GridTHW) -> np.ndarray:
    """int64 [Q]: the tokens to be predicted, ascending; the encoder may see some of them. Q depends on the grid alone.

    ConfigError where a side of the grid is odd, so that it cannot be cut into cells.
    """
    t, h, w = grid_THW
    if policy.kind == "none":
        return np.arange(t * h * w)
    if h % 2 or w % 2:
        raise ConfigError(f"decoder_mask.kind='cells': the grid {t}×{h}×{w} cannot be cut into cells of 2×2; use none")
    place_HW = np.arange(h)[:, None] % 2 * 2 + np.arange(w) % 2
    turn_THW = (place_HW + np.arange(t)[:, None, None] + mask_seed % CELL) % CELL
    return np.flatnonzero(turn_THW.reshape(-1) >= round(policy.ratio * CELL))


def _choose(mask_seed: int, n: int, k: int) -> np.ndarray:
    """int64 [k]: k of n, ascending, each subset equally likely."""
    noise = raw_bits(n, seed=mask_seed, stream=STREAM_MASK)
    return np.sort(np.argsort(noise, kind="stable")[:k])


def _block(mask_seed: int, grid_THW: GridTHW, n_kept: int) -> np.ndarray:
    """Remove cuboids, each side at most half the grid's; the last cuboid is cut to the exact count.

    The emptier the grid, the less a cuboid removes: after BLOCK_TRIES cuboids the rest is removed at random.
    """
    kept = np.ones(grid_THW, dtype=bool)
    to_remove = kept.size - n_kept
    bits = raw_bits(BLOCK_TRIES * 6, seed=mask_seed, stream=STREAM_MASK, words=(1, 0, 0)).reshape(BLOCK_TRIES, 2, 3)
    for size_bits, place_bits in bits:
        if to_remove == 0:
            break
        size = [below(b, max(1, side // 2)) + 1 for b, side in zip(size_bits, grid_THW, strict=True)]
        start = [below(b, side - s + 1) for b, side, s in zip(place_bits, grid_THW, size, strict=True)]
        cuboid = np.zeros(grid_THW, dtype=bool)
        cuboid[tuple(slice(a, a + s) for a, s in zip(start, size, strict=True))] = True
        gone = np.flatnonzero(cuboid & kept)[:to_remove]
        kept.reshape(-1)[gone] = False
        to_remove -= len(gone)
    left = np.flatnonzero(kept)
    return left[_choose(mask_seed, len(left), n_kept)] if to_remove else left
