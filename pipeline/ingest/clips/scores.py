"""The small frames of a clip (grey, 64x64, about four a second) → its screening scores and its hash.

Two machines get the same values: sums are of whole numbers, and the hash compares rounded coefficients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

SIDE = 64  # of a small frame, pixels
BLACK = 20  # levels; a pixel that never reaches it is black. Bars are at 16 if a video's range was taken for full
FLAT = 2.0  # levels; a frame with a smaller standard deviation gets no hash

_FRAMES = 4  # frames that are hashed, spread evenly over the clip
_PICTURE = 32  # side of the picture that is hashed
_LOW = 8  # coefficients kept in each direction
_DIGITS = 6  # decimals to which a coefficient is rounded


@dataclass(frozen=True)
class Scores:
    """What the screens look at. Levels are of 255; black is 0."""

    motion: float
    """Levels; see `motion`."""
    luma: float
    """Levels: the mean of all pixels."""
    contrast: float
    """Levels: standard deviation within a frame, mean over the frames."""
    border: float
    """Share of the picture, 0 to 1; see `border`."""
    phash: bytes | None
    """32 bytes: four frames of 64 bits. None: too flat for a hash."""


def read_small_frames(path: Path) -> np.ndarray:
    """The small frames of all that was encoded, uint8 [T, 64, 64], mapped from a raw file."""
    data = np.memmap(path, np.uint8, "r")
    return data[: len(data) // SIDE**2 * SIDE**2].reshape(-1, SIDE, SIDE)


def small_frames_of(small_THW: np.ndarray, place: tuple[int, int], stride: int) -> np.ndarray:
    """The small frames of a clip at [start, end) of the encoded frames, at least one.

    `stride`: every how many encoded frames there is a small one.
    """
    first, last = -(-place[0] // stride), -(-place[1] // stride)
    if last <= first or first >= len(small_THW):
        first = min(place[0] // stride, len(small_THW) - 1)
        last = first + 1
    return np.asarray(small_THW[first:last])


def score_clip(gray_THW: np.ndarray) -> Scores:
    """Scores of one clip: uint8 [T, 64, 64], T >= 1, in order of time."""
    if gray_THW.dtype != np.uint8 or gray_THW.ndim != 3 or gray_THW.shape[1:] != (SIDE, SIDE):
        raise ValueError(f"small frames are uint8 [T, {SIDE}, {SIDE}], not {gray_THW.dtype} {gray_THW.shape}")
    if len(gray_THW) == 0:
        raise ValueError("no small frames")
    return Scores(
        motion=motion(gray_THW),
        luma=int(gray_THW.sum(dtype=np.int64)) / gray_THW.size,
        contrast=float(np.mean([_std(gray_HW) for gray_HW in gray_THW])),
        border=border(gray_THW),
        phash=phash(gray_THW),
    )


def motion(gray_THW: np.ndarray) -> float:
    """How much neighbouring frames differ, in levels: the upper quartile over pairs of the mean over pixels.

    Not the mean: one cut or flash lifts it over any threshold. Not the median: it calls a shot static that moves
    for a third of its time. A slideshow with less than one picture a second gets 0, and so does a single frame.
    """
    if len(gray_THW) < 2:
        return 0.0
    return float(np.quantile([_difference(a_HW, b_HW) for a_HW, b_HW in pairwise(gray_THW)], 0.75))


def border(gray_THW: np.ndarray) -> float:
    """Share of the picture outside the smallest upright rectangle around every pixel that is not always black.

    This covers letterbox, pillarbox and both at once. A clip that is black throughout is all border: 1.
    """
    lit_HW = gray_THW.max(axis=0) >= BLACK
    rows, columns = np.flatnonzero(lit_HW.any(axis=1)), np.flatnonzero(lit_HW.any(axis=0))
    if len(rows) == 0:
        return 1.0
    height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    return 1.0 - int(height * width) / lit_HW.size


def phash(gray_THW: np.ndarray) -> bytes | None:
    """The perceptual hash of four frames, at (i + 0.5) / 4 of the clip: 4 x 8 bytes.

    Each frame, at 32x32, gives 64 bits: which of its 8x8 lowest DCT-II coefficients lie above their median; row by
    row, the first in the highest bit. These are the bits of `imagehash.phash` of the same 32x32 picture, except for
    coefficients equal to the median (a picture that mirrors itself): there imagehash's bits are rounding noise and
    ours are 0. None if one of the four frames is nearly flat: its coefficients are the encoder's noise.
    """
    small_4PP = [_halve(gray_THW[(2 * i + 1) * len(gray_THW) // (2 * _FRAMES)]) for i in range(_FRAMES)]
    if any(_std(small_PP) < FLAT for small_PP in small_4PP):
        return None
    return b"".join(_hash_picture(small_PP) for small_PP in small_4PP)


def _halve(gray_HW: np.ndarray) -> np.ndarray:
    """Means of 2x2 pixels, halves rounded up: uint8 [32, 32]."""
    sums_PP = gray_HW.reshape(_PICTURE, 2, _PICTURE, 2).sum(axis=(1, 3), dtype=np.uint16)
    return ((sums_PP + 2) // 4).astype(np.uint8)


def _hash_picture(small_PP: np.ndarray) -> bytes:
    """Eight bytes of a picture, uint8 [32, 32]."""
    low_LL = _DCT_LP @ small_PP.astype(np.float64) @ _DCT_LP.T
    # the last digits of a matrix product differ between machines; rounded off, they decide no bit
    low_LL = low_LL.round(_DIGITS)
    return np.packbits(low_LL > np.median(low_LL)).tobytes()


def _dct_rows() -> np.ndarray:
    """The lowest rows of the DCT-II, as scipy scales it (by 2): float64 [8, 32]."""
    frequency_L, place_P = np.arange(_LOW), 2 * np.arange(_PICTURE) + 1
    return 2 * np.cos(math.pi * frequency_L[:, None] * place_P / (2 * _PICTURE))


_DCT_LP = _dct_rows()


def _difference(a_HW: np.ndarray, b_HW: np.ndarray) -> float:
    """Mean absolute difference of two frames, uint8, in levels."""
    return int((np.maximum(a_HW, b_HW) - np.minimum(a_HW, b_HW)).sum(dtype=np.int64)) / a_HW.size


def _std(gray_HW: np.ndarray) -> float:
    """Standard deviation of a frame, uint8, in levels; from whole sums."""
    flat = gray_HW.astype(np.int64).ravel()
    total, squares = int(flat.sum()), int(flat @ flat)
    return math.sqrt(flat.size * squares - total * total) / flat.size
