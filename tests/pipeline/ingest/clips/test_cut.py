"""Spans cover every frame once, in windows of the asked length."""

from fractions import Fraction

import pytest

from reelmae.pipeline.ingest.clips.cut import (
    MAX_CLIPS,
    Span,
    cut_windows,
    locate_frame,
    merge_spans,
    move_to_keyframes,
    spans_of_rows,
    spans_of_scenes,
)


@pytest.mark.parametrize(
    ("frames", "seconds", "spans"),
    [
        (250, 10, [(0, 100), (100, 200), (200, 250)]),
        (249, 10, [(0, 100), (100, 249)]),
        (100, 10, [(0, 100)]),
        (149, 10, [(0, 149)]),
        (30, 10, [(0, 30)]),
        (1234, 0, [(0, 1234)]),
        (0, 10, []),
    ],
)
def test_windows_and_remainder(frames: int, seconds: float, spans: list[tuple[int, int]]) -> None:
    found, dropped = cut_windows(frames, Fraction(10), seconds)
    assert [(s.start, s.end) for s in found] == spans
    assert dropped == []


@pytest.mark.parametrize("fps", [Fraction(30000, 1001), Fraction(15, 2), Fraction(1, 5), Fraction(120)])
@pytest.mark.parametrize("seconds", [0.01, 0.5, 3.7, 10, 1000])
def test_every_frame_is_in_exactly_one_span(fps: Fraction, seconds: float) -> None:
    for frames in (1, 2, 17, 299, 5000):
        spans = [(s.start, s.end) for s in cut_windows(frames, fps, seconds)[0]]
        assert [n for a, b in spans for n in range(a, b)] == list(range(frames))
        lengths = {b - a for a, b in spans[:-1]}
        assert len(lengths) <= 1
        if lengths:
            assert max(lengths) / 2 <= spans[-1][1] - spans[-1][0] < 1.5 * max(lengths) + 1


def test_no_source_gives_more_clips_than_keys_can_number() -> None:
    spans, _ = cut_windows(1_000_000, Fraction(120), 0.05)
    assert len(spans) <= MAX_CLIPS
    assert spans[-1].end == 1_000_000


def test_a_dropped_remainder_is_told() -> None:
    spans, dropped = cut_windows(260, Fraction(10), 10, "drop")
    assert [(s.start, s.end) for s in spans] == [(0, 100), (100, 200)]
    assert [(s.start, s.end) for s in dropped] == [(200, 260)]
    assert cut_windows(260, Fraction(10), 10, "keep")[0][-1].end == 260
    assert [(s.start, s.end) for s in cut_windows(30, Fraction(10), 10, "drop")[1]] == [(0, 30)]
    assert cut_windows(200, Fraction(10), 10, "drop")[1] == []


def test_spans_of_a_manifest_end_with_the_video_and_hold_at_least_a_frame() -> None:
    rows = [(1.0, 2.5), (2.0, 99.0), (3.0, None), (3.99, 3.995), (4.0, 5.0)]
    inside, outside = spans_of_rows(rows, 40, Fraction(10))
    assert [(s.start, s.end, s.row) for s in inside] == [(10, 25, 0), (20, 40, 1), (30, 40, 2)]
    assert [s.row for s in outside] == [3, 4]  # frame 40 is the first that is not there
    assert (inside[1].wanted_start_s, inside[1].wanted_end_s) == (2.0, 99.0)


def test_scenes_begin_at_keyframes_and_lose_only_what_lies_before_them() -> None:
    cuts, keys = [40, 55, 100], [0, 16, 32, 40, 56, 72, 88, 104, 120]
    good, short = spans_of_scenes(cuts, keys, 130, Fraction(10), clip_seconds=0, remainder="join", min_seconds=2)
    assert [(s.start, s.end) for s in good] == [(0, 40), (56, 100), (104, 130)]
    assert [(s.wanted_start_s, s.wanted_end_s) for s in good] == [(0, 4), (5.5, 10), (10, 13)]
    assert [(s.start, s.end) for s in short] == [(40, 55)]


def test_long_scenes_are_cut_into_windows_without_losing_a_frame() -> None:
    keys = list(range(0, 330, 16))
    good, short = spans_of_scenes([], keys, 330, Fraction(10), clip_seconds=10, remainder="join", min_seconds=2)
    assert [n for s in good for n in range(s.start, s.end)] == list(range(330))
    assert all(s.start in keys for s in good)
    assert short == []
    assert [s.start for s in good] == [0, 112, 208]


def test_what_a_keyframe_swallows_is_told_by_the_clip_that_holds_it() -> None:
    spans, _ = cut_windows(100, Fraction(10), 2)
    moved = move_to_keyframes(spans, [0, 50], 100)
    assert [(s.start, s.end) for s in moved] == [(0, 50), (50, 100)]
    assert [(s.wanted_start_s, s.wanted_end_s) for s in moved] == [(0, 4), (4, 10)]


def test_places_among_the_frames_that_are_kept() -> None:
    spans = [Span(10, 20, 1, 2), Span(15, 30, 1.5, 3), Span(50, 60, 5, 6)]
    stretches = merge_spans(spans)
    assert stretches == [(10, 30), (50, 60)]
    assert [locate_frame(n, stretches) for n in (10, 15, 30, 50, 60)] == [0, 5, 20, 20, 30]
