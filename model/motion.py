"""MotionMAE's second target: how a frame changes (arXiv 2210.04154).

    F(t + gap) − F(t)        of 16 frames, target frames 0, 2, …, 12, 15:
                             gap 1 → 1−0, 3−2, …, 13−12, 15−14        gap 2 → 2−0, 4−2, …, 14−12, 15−13

Legend: B batch, C channel, T frame of the clip, F target frame, H height, W width.

Properties that hold:
- Every target is the difference of two frames of the clip, `gap` apart. Where the later one would lie behind the clip's end
  the pair is moved back to the last that there is, (T − 1 − gap, T − 1): nothing is padded, and no target is zero because
  the clip ended. Two target frames at the end may so have the same target.
- A brightness that the whole clip has in common is not in the target; a clip that stands still has target 0.
- Nothing is read back to the host: `torch.compile(fullgraph=True)` takes it whole.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from reelmae.model.config import require

MotionSign = Literal["signed", "absolute"]


def motion_frames(
    clips_BCTHW: Tensor, frame_index_F: Tensor, gap: int = 1, sign: MotionSign = "signed"
) -> Tensor:
    """diff_BCFHW float32: how the frames `frame_index_F` (int64, on the clips' device, 0 … T - 1) of the clips change.

    `sign`: the difference (`signed`) or its `absolute` value, in the pixel scale of the clips. The paper says "difference
    of adjacent frames", gap 1, and not which of the two. ValueError names a gap that does not fit, or an unknown sign.
    """
    frames = clips_BCTHW.shape[2]
    check_motion(frames, gap)
    require(sign in ("signed", "absolute"), f"motion.sign={sign!r}", "give 'signed' or 'absolute'")
    first_F = frame_index_F.clamp(max=frames - 1 - gap)
    # float32 before the subtraction: neighbouring frames are close, and bf16 would round their difference away
    later_BCFHW = clips_BCTHW.index_select(2, first_F + gap).float()
    diff_BCFHW = later_BCFHW - clips_BCTHW.index_select(2, first_F).float()
    return diff_BCFHW.abs() if sign == "absolute" else diff_BCFHW


def check_motion(frames: int, gap: int) -> None:
    """ValueError unless a clip of `frames` has two frames `gap` apart."""
    require(gap >= 1, f"motion.gap={gap}", "give at least 1")
    require(gap < frames, f"motion.gap={gap}", f"give less than frames={frames}")
