"""ClipBatch, what the loader yields; and the one place where pixels become floats.

B = videos × repeats, video by video: sample `v * R + r` is repeat r of video v.
Shapes: B batch, C channel, T frame, H height, W width, K kept token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from reelmae.pipeline.loading.draws import Draw

MEAN, STD = 0.45, 0.225  # of pixels in 0 … 1, the same for each channel
_SCALE, _SHIFT = 1 / (255 * STD), -MEAN / STD


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

    def __post_init__(self) -> None:
        sizes = {
            name: len(getattr(self, name))
            for name in ("ids_keep_BK", "clip_B", "repeat_B", "label_B", "draws")
        }
        wrong = {name: n for name, n in sizes.items() if n != len(self.clips_BCTHW)}
        assert not wrong, f"a batch of {len(self.clips_BCTHW)} clips has {wrong}"
        assert self.clips_BCTHW.ndim == 5, tuple(self.clips_BCTHW.shape)
        assert self.clips_BCTHW.shape[1] == 3, tuple(self.clips_BCTHW.shape)
        assert self.ids_keep_BK.ndim == 2, tuple(self.ids_keep_BK.shape)

    def __len__(self) -> int:
        return len(self.clips_BCTHW)

    def __repr__(self) -> str:
        return (
            f"ClipBatch(epoch={self.epoch}, step={self.step}, clips_BCTHW={list(self.clips_BCTHW.shape)}, "
            f"ids_keep_BK={list(self.ids_keep_BK.shape)}, {self.clips_BCTHW.dtype} on {self.clips_BCTHW.device})"
        )


def normalise(frames_BTHWC: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 pictures to float32 [B, C, T, H, W] on `device`; a new tensor, the input may be reused at once."""
    on_device = frames_BTHWC.to(device)  # bytes travel, not floats
    b, t, h, w, c = on_device.shape
    clips_BCTHW = torch.empty((b, c, t, h, w), dtype=torch.float32, device=device)
    clips_BCTHW.copy_(on_device.permute(0, 4, 1, 2, 3))
    return clips_BCTHW.mul_(_SCALE).add_(_SHIFT)
