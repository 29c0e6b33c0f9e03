"""The motion target, against numbers worked out by hand on a moving square."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reelmae.model.config import MotionSign
from reelmae.model.motion import change, motion_pairs

LEFT, RIGHT = -1.0, 1.0  # what a bright pixel leaves behind, and where it arrives


def moving_square(frames: int = 6) -> Tensor:
    """A bright pixel in row 1 of 3 × 6, in column t of frame t; green is half as bright, blue is dark."""
    clip = torch.zeros(1, 3, frames, 3, 6)
    for t in range(frames):
        clip[0, 0, t, 1, t], clip[0, 1, t, 1, t] = 1.0, 0.5
    return clip


def motion_frames(clips: Tensor, index: Tensor, gap: int = 1, sign: MotionSign = "signed") -> Tensor:
    """The change of whole frames, as the targets of all patches hold it."""
    first, later = motion_pairs(index, clips.shape[2], gap)
    return change(clips[:, :, later], clips[:, :, first], sign)


def rows(diff_BCFHW: Tensor) -> list[list[float]]:
    """Row 1 of red in each target frame."""
    return diff_BCFHW[0, 0, :, 1].tolist()


def test_a_moving_square_leaves_a_hole_and_arrives_beside_it() -> None:
    diff = motion_frames(moving_square(), torch.tensor([0, 2, 4]))
    assert rows(diff) == [
        [LEFT, RIGHT, 0, 0, 0, 0],
        [0, 0, LEFT, RIGHT, 0, 0],
        [0, 0, 0, 0, LEFT, RIGHT],
    ]
    assert diff[0, 1, :, 1].tolist() == [[v / 2 for v in row] for row in rows(diff)]
    assert diff.shape == (1, 3, 3, 3, 6) and diff.dtype == torch.float32
    assert diff[:, 2].count_nonzero() == 0 and diff[:, :, :, [0, 2]].count_nonzero() == 0


def test_absolute_forgets_what_came_and_what_went() -> None:
    diff = motion_frames(moving_square(), torch.tensor([0, 2]), sign="absolute")
    assert rows(diff) == [[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0]]


def test_a_gap_of_two_looks_two_frames_ahead() -> None:
    diff = motion_frames(moving_square(), torch.tensor([0, 1, 3]), gap=2)
    assert rows(diff) == [
        [LEFT, 0, RIGHT, 0, 0, 0],
        [0, LEFT, 0, RIGHT, 0, 0],
        [0, 0, 0, LEFT, 0, RIGHT],
    ]


def test_a_pair_that_would_leave_the_clip_is_the_last_that_there_is() -> None:
    last = [0, 0, 0, 0, LEFT, RIGHT]
    assert rows(motion_frames(moving_square(), torch.tensor([4, 5]))) == [last, last]
    two_ahead = motion_frames(moving_square(), torch.tensor([2, 3, 4, 5]), gap=2)
    assert rows(two_ahead) == [[0, 0, LEFT, 0, RIGHT, 0]] + [[0, 0, 0, LEFT, 0, RIGHT]] * 3
    whole = motion_frames(moving_square(), torch.tensor([0, 3, 5]), gap=5)
    assert rows(whole) == [[LEFT, 0, 0, 0, 0, RIGHT]] * 3


def test_the_worked_example_of_the_file_holds() -> None:
    """Frame t has brightness t², so a difference tells which pair it is of."""
    clips = torch.arange(16.0).square().reshape(1, 1, 16, 1, 1).expand(2, 3, 16, 4, 4)
    index = torch.tensor([0, 2, 4, 6, 8, 10, 12, 15])
    for gap, pairs in (
        (1, [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11), (12, 13), (14, 15)]),
        (2, [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10), (10, 12), (12, 14), (13, 15)]),
    ):
        diff = motion_frames(clips, index, gap)
        assert diff[1, 2, :, 3, 0].tolist() == [b * b - a * a for a, b in pairs]


@pytest.mark.parametrize("sign", ["signed", "absolute"])
def test_a_clip_that_stands_still_has_no_motion(sign: str) -> None:
    clips = torch.randn(2, 3, 1, 8, 8).expand(2, 3, 4, 8, 8)
    diff = motion_frames(clips, torch.tensor([0, 3]), sign=sign)  # type: ignore[arg-type]
    assert diff.count_nonzero() == 0 and diff.shape == (2, 3, 2, 8, 8)


def test_a_small_difference_of_bf16_frames_is_exact() -> None:
    clips = torch.tensor([1.0, 1.0078125]).bfloat16().reshape(1, 1, 2, 1, 1)
    assert motion_frames(clips, torch.tensor([0])).item() == 0.0078125
    bright = torch.tensor([256.0, -1.0]).bfloat16().reshape(1, 1, 2, 1, 1)
    assert motion_frames(bright, torch.tensor([0])).item() == -257.0  # no number of bf16


@pytest.mark.parametrize(("frames", "gap"), [(4, 4), (16, 17), (4, 0), (4, -1)])
def test_a_gap_that_does_not_fit_is_named(frames: int, gap: int) -> None:
    with pytest.raises(ValueError, match=rf"motion\.gap={gap}: give 1 to {frames - 1}"):
        motion_pairs(torch.tensor([0]), frames, gap)


def test_it_compiles_whole() -> None:
    clips, index = torch.randn(2, 3, 6, 8, 8), torch.tensor([0, 2, 5])
    for sign in ("signed", "absolute"):
        compiled = torch.compile(motion_frames, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(clips, index, 2, sign), motion_frames(clips, index, 2, sign))  # type: ignore[arg-type]
