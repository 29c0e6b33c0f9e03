"""The rules of rate, size and length, and the screens on scores."""

from fractions import Fraction
from typing import Any

import pytest

from reelmae.pipeline.ingest.clips.outcome import Rejected
from reelmae.pipeline.ingest.clips.probe import Probe
from reelmae.pipeline.ingest.clips.scores import Scores
from reelmae.pipeline.ingest.clips.screen import Kept, clip_size, screen_length, screen_scores, screen_source
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.schema import Reason


def _probe(**values: Any) -> Probe:
    facts: dict[str, Any] = {
        "container": "mov",
        "stream": 0,
        "video_streams": 1,
        "codec": "h264",
        "width": 640,
        "height": 480,
        "pix_fmt": "yuv420p",
        "sar": 1.0,
        "promised": 0,
        "nominal": (Fraction(30),),
        "packets": 300,
        "seen": 300,
        "rate": 30.0,
        "duration_s": 10.0,
        "decoded": True,
        "interlaced": False,
        "rotation": 0,
        "color_range": 0,
        "colorspace": 2,
        "color_trc": 2,
        "color_primaries": 2,
        "error": "",
        "start_s": 0.0,
        "reordered": False,
        "steady": True,
    }
    return Probe(**{**facts, **values})


def _kept(config: ShardConfig | None = None, **values: Any) -> Kept:
    result = screen_source(_probe(**values), config or ShardConfig())
    assert isinstance(result, Kept), result
    return result


def _reason(config: ShardConfig | None = None, **values: Any) -> Reason:
    result = screen_source(_probe(**values), config or ShardConfig())
    assert isinstance(result, Rejected), result
    return result.reason


@pytest.mark.parametrize(
    ("shown", "short_side", "stored"),
    [
        ((640, 480), 256, (336, 256)),  # 341.3 floored
        ((1080, 1920), 256, (256, 448)),
        ((320, 180), 256, (320, 176)),  # never upscaled
        ((96, 64), 64, (96, 64)),
        ((16, 16), 256, (16, 16)),
        ((15, 400), 256, (0, 400)),
        ((256 * 4 / 3, 256), 256, (336, 256)),
    ],
)
def test_stored_sides(shown: tuple[float, float], short_side: int, stored: tuple[int, int]) -> None:
    assert clip_size(*shown, short_side) == stored


def test_rotation_and_pixel_aspect_count_before_the_size_rule() -> None:
    assert (_kept(rotation=90).width, _kept(rotation=90).height) == (256, 336)
    assert (_kept(sar=2.0).width, _kept(sar=2.0).height) == (672, 256)
    assert (_kept(rotation=270, sar=2.0).width, _kept(rotation=270, sar=2.0).height) == (256, 672)


@pytest.mark.parametrize(
    ("nominal", "rate", "fps"),
    [
        ((Fraction(30000, 1001),), 29.988, Fraction(30000, 1001)),  # agrees with the header
        ((Fraction(600), Fraction(84, 11)), 7.399, Fraction(7.399).limit_denominator(1001)),  # variable
        ((Fraction(90000),), 10.5, Fraction(21, 2)),
        ((Fraction(25), Fraction(50)), 25.0, Fraction(25)),
        ((Fraction(240),), 240.0, Fraction(120)),
        ((), 24.0, Fraction(24)),
        ((Fraction(25),), 0.0, Fraction(25)),  # no timestamps: the header's word
    ],
)
def test_output_rate(nominal: tuple[Fraction, ...], rate: float, fps: Fraction) -> None:
    assert _kept(nominal=nominal, rate=rate).fps == fps


def test_asked_rate_never_invents_frames() -> None:
    assert _kept(ShardConfig(fps=7.5)).fps == Fraction(15, 2)
    assert _kept(ShardConfig(fps=7.5)).frames == 75
    assert _kept(ShardConfig(fps=60)).fps == 30


def test_two_frames_ten_hours_apart_are_not_expanded() -> None:
    assert _reason(packets=2, seen=2, rate=2 / 36000, duration_s=36000.0, nominal=()) == Reason.BAD_TIMESTAMPS


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"width": 9000, "height": 9000}, Reason.TOO_LARGE),
        ({"packets": 0, "seen": 0, "promised": 500}, Reason.NO_FRAMES),
        ({"decoded": False}, Reason.NO_FRAMES),
        ({"promised": 600}, Reason.TRUNCATED),
        ({"packets": 1, "seen": 1}, Reason.TOO_FEW_FRAMES),
        ({"height": 15}, Reason.TOO_SMALL),
        ({"width": 8000, "height": 100}, None),
        ({"duration_s": 1e5, "packets": 3_000_000, "seen": 3_000_000}, Reason.TOO_LONG),
        ({"rate": 0.0, "nominal": (), "duration_s": 0.0}, Reason.BAD_TIMESTAMPS),
    ],
)
def test_reasons(values: dict[str, Any], reason: Reason | None) -> None:
    if reason is None:
        _kept(**values)
    else:
        assert _reason(**values) == reason


def test_a_side_that_vanishes_in_scaling_is_too_small() -> None:
    assert _reason(ShardConfig(short_side=16), width=8000, height=10) == Reason.TOO_SMALL
    assert _reason(ShardConfig(min_side=500)) == Reason.TOO_SMALL


@pytest.mark.parametrize(
    ("frames", "detail"),
    [
        (9, "frames: 9, under min_frames=10"),  # frames are looked at before seconds
        (24, "0.96 s, under min_seconds=1"),
        (25, None),
    ],
)
def test_a_length_is_rejected_by_its_frames_then_by_its_seconds(frames: int, detail: str | None) -> None:
    found = screen_length(frames, Fraction(25), ShardConfig(min_frames=10, min_seconds=1))
    assert (found and found.detail) == detail


def _scores(**values: float) -> Scores:
    return Scores(**{"motion": 5.0, "luma": 100.0, "contrast": 40.0, "border": 0.0, "phash": None, **values})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "reason", "detail"),
    [
        ({"luma": 15.99}, Reason.DARK, "luma 15.99, under min_luma=16"),
        ({"contrast": 5.0}, Reason.BLANK, "contrast 5.00, under min_contrast=6"),
        ({"border": 0.75}, Reason.BORDERS, "75% black border, over max_border=0.7"),
        ({"motion": 0.25}, Reason.STATIC, "motion 0.25, under min_motion=0.5"),
        # of several the first in this order
        ({"luma": 0.0, "contrast": 0.0, "border": 1.0, "motion": 0.0}, Reason.DARK, "luma 0.00, under min_luma=16"),
        ({"contrast": 0.0, "border": 1.0, "motion": 0.0}, Reason.BLANK, "contrast 0.00, under min_contrast=6"),
        ({"border": 1.0, "motion": 0.0}, Reason.BORDERS, "100% black border, over max_border=0.7"),
    ],
)
def test_scores_are_rejected_in_their_order(values: dict[str, float], reason: Reason, detail: str) -> None:
    assert screen_scores(_scores(**values), ShardConfig(preset="uncurated")) == Rejected(reason, detail)
    assert screen_scores(_scores(**values), ShardConfig()) is None  # the kinetics preset keeps all


def test_scores_at_the_thresholds_are_kept() -> None:
    at = _scores(luma=16.0, contrast=6.0, border=0.7, motion=0.5)
    assert screen_scores(at, ShardConfig(preset="uncurated")) is None
