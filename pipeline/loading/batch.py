"""ClipBatch, what the loader yields; and the one place where pixels become floats.

B = videos × repeats, video by video: sample `v * R + r` is repeat r of video v.
Shapes: B batch, C channel, T frame, H height, W width, K kept token.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import numpy as np
import torch

from reelmae.pipeline.loading.order.draws import Draw

MEAN, STD = 0.45, 0.225  # of pixels in 0 … 1, the same for each channel
# Numbers at a time on the CPU: they stay in its cache, and torch does not share fewer than 32768 between threads, which
# would spin on the cores that decode
_ALONE = 32_000
_SCALE, _SHIFT = 1 / (255 * STD), torch.tensor(-MEAN / STD)


@dataclass(frozen=True, eq=False)
class ClipBatch:
    """One rank's part of a global batch. Its leading dimensions are checked when it is built."""

    clips_BCTHW: torch.Tensor  # float32 on the device, (x / 255 - 0.45) / 0.225
    ids_keep_BK: torch.Tensor  # int64 on the device, ascending: the tokens the encoder sees
    clip_B: np.ndarray  # int64, rows of the ClipIndex
    repeat_B: np.ndarray  # int64, 0 … R - 1
    label_B: torch.Tensor  # int64 on the device, -1 = unlabelled
    draws: list[Draw]
    epoch: int
    step: int  # global batch within the epoch, from 0
    ids_decode_BQ: torch.Tensor | None = None  # int64 on the device: the tokens to be predicted; None: all

    def __post_init__(self) -> None:
        sizes = {name: len(getattr(self, name)) for name in ("ids_keep_BK", "clip_B", "repeat_B", "label_B", "draws")}
        wrong = {name: n for name, n in sizes.items() if n != len(self.clips_BCTHW)}
        assert not wrong, f"a batch of {len(self.clips_BCTHW)} clips has {wrong}"
        assert self.clips_BCTHW.ndim == 5, tuple(self.clips_BCTHW.shape)
        assert self.clips_BCTHW.shape[1] == 3, tuple(self.clips_BCTHW.shape)
        assert self.ids_keep_BK.ndim == 2, tuple(self.ids_keep_BK.shape)
        if self.ids_decode_BQ is not None:
            assert self.ids_decode_BQ.ndim == 2, tuple(self.ids_decode_BQ.shape)
            assert len(self.ids_decode_BQ) == len(self), tuple(self.ids_decode_BQ.shape)

    def __len__(self) -> int:
        return len(self.clips_BCTHW)

    def __repr__(self) -> str:
        return (
            f"ClipBatch(epoch={self.epoch}, step={self.step}, clips_BCTHW={list(self.clips_BCTHW.shape)}, "
            f"ids_keep_BK={list(self.ids_keep_BK.shape)}, {self.clips_BCTHW.dtype} on {self.clips_BCTHW.device})"
        )


def _normalise(floats: torch.Tensor) -> torch.Tensor:
    """In place, in one pass."""
    return torch.add(_SHIFT, floats, alpha=_SCALE, out=floats)


class Floats:
    """Bytes to normalised floats, on a device. On the CPU in memory that is used again once a batch is gone: fresh
    memory costs more there than the arithmetic, since the kernel clears each page when it is first touched.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: list[np.ndarray] = []

    def __call__(self, clips_BCTHW: torch.Tensor | np.ndarray) -> torch.Tensor:
        """uint8 to float32, (x / 255 - 0.45) / 0.225; the input may be used again at once."""
        pixels = torch.from_numpy(clips_BCTHW) if isinstance(clips_BCTHW, np.ndarray) else clips_BCTHW
        if self._device.type == "cpu":
            floats = self._memory(pixels.shape)
            for some_bytes, some in zip(pixels.flatten().split(_ALONE), floats.view(-1).split(_ALONE), strict=True):
                _normalise(some.copy_(some_bytes))
            return floats
        return _normalise(pixels.to(self._device).to(torch.float32))  # bytes travel, not floats

    def _memory(self, shape: torch.Size) -> torch.Tensor:
        """Floats that nobody holds: given back when the last tensor over them is gone."""
        memory = self._free.pop() if self._free else None
        if memory is None or memory.shape != shape:
            memory = np.empty(shape, np.float32)
        lent = memory.view()
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return torch.from_numpy(lent)
