"""Which runs of frames are decoded for the samples of a clip."""

import numpy as np
import pytest

from reelmae.pipeline.loading.decode.passes import DecodePass, decode_passes

KEYFRAMES = list(range(0, 300, 16))


def windows(*starts: int, stride: int = 4, frames: int = 16) -> np.ndarray:
    """int64 [R, T]"""
    return np.array(starts)[:, None] + stride * np.arange(frames)


def cost(wanted_RT: np.ndarray, policy: str) -> int:
    return sum(p.cost for p in decode_passes(wanted_RT, KEYFRAMES, policy))  # type: ignore[arg-type]


def test_the_example_of_the_docstring() -> None:
    wanted = np.array([[20, 24, 28], [70, 74, 78]])
    both = [DecodePass(16, (20, 24, 28), (0, 1)), DecodePass(64, (70, 74, 78), (0, 1))]
    assert decode_passes(wanted, KEYFRAMES) == both
    assert decode_passes(wanted, KEYFRAMES, "span") == [DecodePass(16, (20, 24, 28, 70, 74, 78), (0, 1))]
    assert [p.samples for p in decode_passes(wanted, KEYFRAMES, "windows")] == [(0,), (1,)]
    assert [cost(wanted, p) for p in ("auto", "windows", "span")] == [28, 28, 63]


def test_auto_decodes_no_more_than_windows_or_span_whatever_is_drawn() -> None:
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        stride, repeats = int(rng.integers(1, 9)), int(rng.integers(1, 6))
        wanted = windows(*rng.integers(0, 300 - 15 * stride, repeats), stride=stride)
        auto, alone, span = (cost(wanted, p) for p in ("auto", "windows", "span"))
        assert auto <= min(alone, span)
        seen.add((auto == alone, auto == span))
    assert {(True, False), (False, True), (False, False)} <= seen  # each is the cheapest somewhere


@pytest.mark.parametrize("policy", ["auto", "span"])
def test_each_wanted_frame_is_in_one_pass_in_order(policy: str) -> None:
    wanted = windows(3, 90, 100, 239)
    passes = decode_passes(wanted, KEYFRAMES, policy)  # type: ignore[arg-type]
    frames = [n for p in passes for n in p.wanted]
    assert frames == sorted(set(wanted.reshape(-1).tolist()))
    assert all(p.start in KEYFRAMES and p.start <= p.wanted[0] for p in passes)
    ends = [p.wanted[-1] for p in passes]
    assert all(p.start > end for p, end in zip(passes[1:], ends[:-1], strict=True))


def test_windows_gives_each_sample_its_own_frames() -> None:
    wanted = windows(10, 12)
    passes = decode_passes(wanted, KEYFRAMES, "windows")
    for r in range(2):
        assert [n for p in passes if p.samples == (r,) for n in p.wanted] == wanted[r].tolist()


def test_a_wide_stride_jumps_within_a_window() -> None:
    [a, b] = decode_passes(np.array([[5, 100]]), KEYFRAMES)
    assert (a, b) == (DecodePass(0, (5,), (0,)), DecodePass(96, (100,), (0,)))


def test_a_clip_with_one_keyframe_is_one_pass() -> None:
    assert decode_passes(windows(50, 200), [0]) == [
        DecodePass(0, tuple(sorted(windows(50, 200).reshape(-1).tolist())), (0, 1))
    ]


def test_repeated_frames_of_a_short_clip_are_wanted_once() -> None:
    assert decode_passes(np.array([[0, 4, 8, 9, 9, 9]]), [0]) == [DecodePass(0, (0, 4, 8, 9), (0,))]
