"""Pure: what the probe found in a source → the plan of its encoding, or a reject with its reason.

The rules, each a threshold of ShardConfig:
- more pixels than `max_pixels`, longer than `max_duration_s`, a shown side under `min_side`: rejected;
- far fewer packets than the container's own table promises: TRUNCATED;
- the output rate is the nominal one where the measured average agrees within 2 %, else the measured average
  (variable frame rate), at most 120; `fps` asks for less, never for more (no invented frames). Under 0.1 frames
  a second no usable rate is told by the timestamps: BAD_TIMESTAMPS (two frames ten hours apart stay two frames).
- the screens of ShardConfig on rate, duration, side and aspect;
- size: the one factor that brings the short side to at most `short_side`, never above 1; both sides are then
  floored to multiples of 16. A side under 16 is TOO_SMALL.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from fractions import Fraction

from reelmae.pipeline.ingest.clips.outcome import Rejected
from reelmae.pipeline.ingest.clips.probe import Probe
from reelmae.pipeline.ingest.config import MAX_FPS, ShardConfig
from reelmae.pipeline.schema import Reason

MIN_FPS = Fraction(1, 10)
AGREE = 0.02  # nominal and measured rate
PROMISED = 0.9  # of the frames the container's table names must be there
_COMMON = sorted(
    {Fraction(n * 1000, 1001) for n in (12, 15, 24, 30, 48, 60, 120)}
    | {Fraction(n, 2) for n in range(1, 2 * MAX_FPS + 1)}
)


@dataclass(frozen=True)
class Kept:
    """How a source is encoded: output rate, frames at that rate, sides in pixels, and what is cropped before
    (left, top, width, height of the picture turned upright, in its own pixels)."""

    fps: Fraction
    frames: int
    width: int
    height: int
    crop: tuple[int, int, int, int] | None = None


def screen(probe: Probe, config: ShardConfig, box: tuple[int, int, int, int] | None = None) -> Kept | Rejected:
    """Keep or reject one probed source; `box`: left, top, width, height of its picture within borders, as coded."""
    screens = config.screens
    if probe.width * probe.height > config.max_pixels:
        return Rejected(Reason.TOO_LARGE, f"{probe.width}x{probe.height} pixels, over max_pixels={config.max_pixels}")
    if probe.packets == 0 or not probe.decoded:
        promised = f"{probe.promised} frames promised, " if probe.promised else ""
        return Rejected(
            Reason.NO_FRAMES, f"{promised}{probe.packets} packets, no picture decoded {probe.error}".strip()
        )
    if probe.seen < PROMISED * probe.promised and probe.duration_s < PROMISED * promised_s(probe):
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
        return Rejected(
            Reason.TOO_FEW_FRAMES,
            f"frames: {frames} at {float(fps):g} fps, under min_frames={config.min_frames}",
        )
    crop = None if box is None else turned(box, probe)
    return _sized(probe, config, fps, frames, crop)


def _sized(
    probe: Probe, config: ShardConfig, fps: Fraction, frames: int, crop: tuple[int, int, int, int] | None
) -> Kept | Rejected:
    screens = config.screens
    shown_W, shown_H = shown_size(probe, crop)
    width, height = stored_size(shown_W, shown_H, config.short_side)
    if min(width, height) < 16 or min(shown_W, shown_H) < screens.min_side:
        return Rejected(
            Reason.TOO_SMALL, f"shown {shown_W:.0f}x{shown_H:.0f}, a side under {max(16, screens.min_side)}"
        )
    aspect = max(shown_W, shown_H) / min(shown_W, shown_H)
    if screens.max_aspect and aspect > screens.max_aspect:
        return Rejected(
            Reason.BAD_ASPECT,
            f"shown {shown_W:.0f}x{shown_H:.0f}, {aspect:.2f} to 1, over max_aspect={screens.max_aspect:g}",
        )
    return Kept(fps, frames, width, height, crop)


def source_rate(probe: Probe) -> Fraction | None:
    """The source's frame rate; None where its timestamps tell no usable one."""
    measured = Fraction(probe.rate).limit_denominator(100_000) if probe.rate > 0 else None
    if measured is None:  # no timestamps at all: only the header can tell
        rates = [r for r in probe.nominal if MIN_FPS <= r <= MAX_FPS]
        return rates[0] if rates else None
    if measured < MIN_FPS:
        return None
    # a header's average such as 9137/304 is itself a measurement: only the common rates count as nominal
    near = [c for r in probe.nominal if (c := _common(r)) is not None and abs(measured - c) <= AGREE * c]
    if near:
        return min(near, key=lambda r: abs(r - measured))
    return min(_common(measured) or measured.limit_denominator(1001), Fraction(MAX_FPS))


def _common(rate: Fraction) -> Fraction | None:
    """The common rate within 0.05 % of this one."""
    at = bisect_left(_COMMON, rate)
    closest = min(_COMMON[max(0, at - 1) : at + 1], key=lambda r: abs(r - rate))
    return closest if abs(closest - rate) <= rate / 2000 else None


def promised_s(probe: Probe) -> float:
    """Seconds the container promises; its table may count frames that are dropped (AVI), so time tells too."""
    rates = [r for r in probe.nominal if MIN_FPS <= r <= MAX_FPS]
    return float(probe.promised / rates[0]) if rates else math.inf


def shown_size(probe: Probe, crop: tuple[int, int, int, int] | None = None) -> tuple[float, float]:
    """Width and height as shown, with square pixels and upright; of `crop` where there is one."""
    sideways = probe.rotation % 180 != 0
    coded = (probe.height, probe.width) if sideways else (probe.width, probe.height)
    width, height = coded if crop is None else crop[2:]
    return (float(width), height * probe.sar) if sideways else (width * probe.sar, float(height))


def turned(box: tuple[int, int, int, int], probe: Probe) -> tuple[int, int, int, int]:
    """A box of the coded picture (left, top, width, height) → the same of the picture turned upright."""
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


def stored_size(width: float, height: float, short_side: int) -> tuple[int, int]:
    """The stored sides: multiples of 16, the short one at most `short_side`, never larger than shown."""
    factor = min(1.0, short_side / min(width, height))

    def floored(side: float) -> int:
        return int(side * factor + 1e-6) // 16 * 16

    return floored(width), floored(height)
