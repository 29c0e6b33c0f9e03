"""MotionMAE's second target: the change of a frame (arXiv 2210.04154).

    F(t + gap) − F(t)        of 16 frames, target frames 0, 2, …, 12, 15:
                             gap 1 → 1−0, 3−2, …, 13−12, 15−14        gap 2 → 2−0, 4−2, …, 14−12, 15−13

Legend: B batch, C channel, T frame of the clip, F target frame, H height, W width.

Properties that hold:
- Every target is the difference of two frames of the clip, `gap` apart. Where the later frame would lie after the
  clip's end, the clip's last pair (T − 1 − gap, T − 1) is used. Nothing is padded, and no target is zero because the
  clip ended. Two target frames at the end can have the same target.
- Brightness that all frames share is not in the target. A clip without motion has target 0.
- No value is read back to the host, so `torch.compile(fullgraph=True)` compiles one whole graph.
"""

from __future__ import annotations

from torch import Tensor

from reelmae.model.config import MotionSign, require


def motion_pairs(frame_index_F: Tensor, frames: int, gap: int) -> tuple[Tensor, Tensor]:
    """Numbers of the earlier and of the later frame of each target, int64 [F] each, for a clip of `frames`.

    ValueError unless the clip has two frames `gap` apart.
    """
    require(1 <= gap < frames, f"motion.gap={gap}", f"give 1 to {frames - 1}, since clips have {frames} frames")
    first_F = frame_index_F.clamp(max=frames - 1 - gap)
    return first_F, first_F + gap


def change(later: Tensor, first: Tensor, sign: MotionSign) -> Tensor:
    """Pixels of the later frames minus those of the earlier ones, or its absolute value: float32, of their shape.

    The paper says "difference of adjacent frames", but not whether it is signed.
    """
    # float32 before the subtraction: neighbouring frames are close, and bf16 would round their difference away
    difference = later.float() - first.float()
    return difference.abs() if sign == "absolute" else difference
