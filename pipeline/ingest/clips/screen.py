"""Pure: all screens. Facts of a source, the length of a clip, its scores → kept, or a reject with its reason.

`screen_source`, before anything is encoded; each threshold is a field of ShardConfig:
- more pixels than `max_pixels`, longer than `max_duration_s`, a shown side under `min_side`: rejected;
- far fewer packets than the container's own table promises: TRUNCATED;
- the output rate is the nominal one if the measured average agrees with it within 2 %, else the measured average
  (variable frame rate), at most 120. `fps` can only lower it: no frames are invented. Under 0.1 frames a second the
  timestamps give no usable rate: BAD_TIMESTAMPS (two frames ten hours apart stay two frames);
- the screens on rate, duration, side and aspect;
- size: one factor brings the short side to at most `short_side`; it is never above 1. Both sides are then
  floored to multiples of 16. A side under 16 is TOO_SMALL.

`screen_length`, for a manifest's spans before encoding, and for every clip after it: `min_frames`, `min_seconds`.

`screen_scores`, for every finished clip: DARK, BLANK, BORDERS, STATIC, in this order.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from fractions import Fraction

from reelmae.pipeline.ingest.clips.outcome import Rejected
from reelmae.pipeline.ingest.clips.probe import Probe
from reelmae.pipeline.ingest.clips.scores import Scores
from reelmae.pipeline.ingest.config import MAX_FPS, ShardConfig
from reelmae.pipeline.schema import Reason

MIN_FPS = Fraction(1, 10)
AGREE = 0.02  # a nominal rate counts if the measured one lies within this share of it
PROMISED = 0.9  # fewer packets than this share of what the container's table promises: TRUNCATED
_COMMON = sorted(
    {Fraction(n * 1000, 1001) for n in (12, 15, 24, 30, 48, 60, 120)}
    | {Fraction(n, 2) for n in range(1, 2 * MAX_FPS + 1)}
)


@dataclass(frozen=True)
class Kept:
    """A source that is kept: how it will be stored."""

    fps: Fraction
    """Output rate."""
    frames: int
    """Frames of the whole source at that rate."""
    width: int
    height: int
    """Sides of a stored clip, in pixels."""
    crop: tuple[int, int, int, int] | None = None
    """What is cut out before scaling: left, top, width, height of the upright picture, in the source's pixels."""


def screen_source(probe: Probe, config: ShardConfig, box: tuple[int, int, int, int] | None = None) -> Kept | Rejected:
    """Keep or reject a probed source.

    `box`: the coded picture without its black borders (left, top, width, height); None: the whole picture.
    """
    screens = config.screens
    if probe.width * probe.height > config.max_pixels:
        return Rejected(Reason.TOO_LARGE, f"{probe.width}x{probe.height} pixels, over max_pixels={config.max_pixels}")
    if probe.packets == 0 or not probe.decoded:
        promised = f"{probe.promised} frames promised, " if probe.promised else ""
        detail = f"{promised}{probe.packets} packets, no picture decoded {probe.error}"
        return Rejected(Reason.NO_FRAMES, detail.strip())
    if probe.seen < PROMISED * probe.promised and probe.duration_s < PROMISED * _container_seconds(probe):
        return Rejected(Reason.TRUNCATED, f"{probe.seen} of {probe.promised} promised frames are in the file")
    if probe.packets < config.min_frames:
        return Rejected(Reason.TOO_FEW_FRAMES, f"frames: {probe.packets}, under min_frames={config.min_frames}")
    if probe.duration_s > config.max_duration_s and probe.packets / probe.duration_s >= MIN_FPS:
        return Rejected(Reason.TOO_LONG, f"{probe.duration_s:.1f} s, over max_duration_s={config.max_duration_s:g}")
    fps = source_rate(probe)
    if fps is None:
        return Rejected(Reason.BAD_TIMESTAMPS, f"{probe.packets} frames over {probe.duration_s:.2f} s")
    if fps < Fraction(screens.min_fps):
        return Rejected(Reason.LOW_FPS, f"{float(fps):g} frames a second, under min_fps={screens.min_fps:g}")
    if probe.duration_s < screens.min_seconds:
        return Rejected(Reason.TOO_SHORT, f"{probe.duration_s:.2f} s, under min_seconds={screens.min_seconds:g}")
    if config.fps is not None:
        fps = min(fps, Fraction(config.fps).limit_denominator(1001))
    frames = max(1, round(probe.duration_s * fps))
    if frames < config.min_frames:
        detail = f"frames: {frames} at {float(fps):g} fps, under min_frames={config.min_frames}"
        return Rejected(Reason.TOO_FEW_FRAMES, detail)
    crop = None if box is None else turn_upright(box, probe)
    shown_W, shown_H = display_size(probe, crop)
    width, height = clip_size(shown_W, shown_H, config.short_side)
    shown = f"shown {shown_W:.0f}x{shown_H:.0f}"
    if min(width, height) < 16 or min(shown_W, shown_H) < screens.min_side:
        return Rejected(Reason.TOO_SMALL, f"{shown}, a side under {max(16, screens.min_side)}")
    aspect = max(shown_W, shown_H) / min(shown_W, shown_H)
    if screens.max_aspect and aspect > screens.max_aspect:
        return Rejected(Reason.BAD_ASPECT, f"{shown}, {aspect:.2f} to 1, over max_aspect={screens.max_aspect:g}")
    return Kept(fps, frames, width, height, crop)


def screen_length(frames: int, fps: Fraction, config: ShardConfig) -> Rejected | None:
    """Why a span or clip of so many frames is too short; None if it is not."""
    least = config.screens.min_seconds
    if frames < config.min_frames:
        return Rejected(Reason.TOO_FEW_FRAMES, f"frames: {frames}, under min_frames={config.min_frames}")
    if frames / fps < least:
        return Rejected(Reason.TOO_SHORT, f"{float(frames / fps):.2f} s, under min_seconds={least:g}")
    return None


def screen_scores(scores: Scores, config: ShardConfig) -> Rejected | None:
    """Why a clip with these scores is rejected; None if it is kept."""
    screens = config.screens
    if scores.luma < screens.min_luma:
        return Rejected(Reason.DARK, f"luma {scores.luma:.2f}, under min_luma={screens.min_luma:g}")
    if scores.contrast < screens.min_contrast:
        return Rejected(Reason.BLANK, f"contrast {scores.contrast:.2f}, under min_contrast={screens.min_contrast:g}")
    if screens.max_border and scores.border > screens.max_border:
        return Rejected(Reason.BORDERS, f"{scores.border:.0%} black border, over max_border={screens.max_border:g}")
    if scores.motion < screens.min_motion:
        return Rejected(Reason.STATIC, f"motion {scores.motion:.2f}, under min_motion={screens.min_motion:g}")
    return None


def source_rate(probe: Probe) -> Fraction | None:
    """The source's frame rate; None if its timestamps give no usable one."""
    measured = Fraction(probe.rate).limit_denominator(100_000) if probe.rate > 0 else None
    if measured is None:  # no timestamps at all: the header decides
        rates = [r for r in probe.nominal if MIN_FPS <= r <= MAX_FPS]
        return rates[0] if rates else None
    if measured < MIN_FPS:
        return None
    # a header's average such as 9137/304 is itself a measurement: only the common rates count as nominal
    near = [c for r in probe.nominal if (c := _nearest_common(r)) is not None and abs(measured - c) <= AGREE * c]
    if near:
        return min(near, key=lambda r: abs(r - measured))
    return min(_nearest_common(measured) or measured.limit_denominator(1001), Fraction(MAX_FPS))


def _nearest_common(rate: Fraction) -> Fraction | None:
    """The common rate within 0.05 % of this one, if there is one."""
    at = bisect_left(_COMMON, rate)
    closest = min(_COMMON[max(0, at - 1) : at + 1], key=lambda r: abs(r - rate))
    return closest if abs(closest - rate) <= rate / 2000 else None


def _container_seconds(probe: Probe) -> float:
    """Seconds that the container's table promises.

    A frame count alone does not show damage: an AVI's table may count frames that were dropped on purpose.
    """
    rates = [r for r in probe.nominal if MIN_FPS <= r <= MAX_FPS]
    return float(probe.promised / rates[0]) if rates else math.inf


def display_size(probe: Probe, crop: tuple[int, int, int, int] | None = None) -> tuple[float, float]:
    """Width and height as shown, upright and with square pixels: of `crop` if given, else of the whole picture."""
    sideways = probe.rotation % 180 != 0
    coded = (probe.height, probe.width) if sideways else (probe.width, probe.height)
    width, height = coded if crop is None else crop[2:]
    return (float(width), height * probe.sar) if sideways else (width * probe.sar, float(height))


def turn_upright(box: tuple[int, int, int, int], probe: Probe) -> tuple[int, int, int, int]:
    """A box of the coded picture (left, top, width, height) → the same box in the upright picture."""
    left, top, width, height = box
    right, bottom = probe.width - left - width, probe.height - top - height
    # the display matrix turns counter-clockwise
    if probe.rotation % 360 == 90:
        return top, right, height, width
    if probe.rotation % 360 == 180:
        return right, bottom, width, height
    if probe.rotation % 360 == 270:
        return bottom, left, height, width
    return box


def clip_size(width: float, height: float, short_side: int) -> tuple[int, int]:
    """Sides of a stored clip: multiples of 16, the short one at most `short_side`, never larger than shown."""
    factor = min(1.0, short_side / min(width, height))

    def scale(side: float) -> int:
        return int(side * factor + 1e-6) // 16 * 16

    return scale(width), scale(height)
