"""Spans cover every frame once, in windows of the asked length."""

from fractions import Fraction

import pytest

from reelmae.pipeline.ingest.cut import MAX_CLIPS, cut


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
    assert cut(frames, Fraction(10), seconds) == spans


@pytest.mark.parametrize("fps", [Fraction(30000, 1001), Fraction(15, 2), Fraction(1, 5), Fraction(120)])
@pytest.mark.parametrize("seconds", [0.01, 0.5, 3.7, 10, 1000])
def test_every_frame_is_in_exactly_one_span(fps: Fraction, seconds: float) -> None:
    for frames in (1, 2, 17, 299, 5000):
        spans = cut(frames, fps, seconds)
        assert [n for a, b in spans for n in range(a, b)] == list(range(frames))
        lengths = {b - a for a, b in spans[:-1]}
        assert len(lengths) <= 1
        if lengths:
            assert max(lengths) / 2 <= spans[-1][1] - spans[-1][0] < 1.5 * max(lengths) + 1


def test_no_source_gives_more_clips_than_keys_can_number() -> None:
    spans = cut(1_000_000, Fraction(120), 0.05)
    assert len(spans) <= MAX_CLIPS
    assert spans[-1][1] == 1_000_000
