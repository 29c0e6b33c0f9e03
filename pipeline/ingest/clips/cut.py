"""Pure: spans of a source in frames at its output rate: windows, a manifest's spans, scenes.

Windows have one length. What is left after the last whole window is handled by `remainder`. "join": joined to the last
window if it is shorter than half a window, else a clip of its own. "keep": always a clip of its own. "drop": dropped,
and returned as dropped:

    frames 250, window 100  →  join, keep [0,100) [100,200) [200,250)    drop [0,100) [100,200)
    frames 249, window 100  →  join [0,100) [100,249)
    frames  30, window 100  →  join, keep [0,30)                         drop nothing: the source is too short
    clip_seconds 0          →  [0,frames)

Scenes are the stretches between cuts. A scene that is too short is rejected; one longer than `clip_seconds` is cut
into windows. A clip can only begin at a keyframe. If no keyframe lies on a cut, the frames from the cut to the next
keyframe are in no clip. If no keyframe lies on a window's border, the border moves to the next keyframe.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

MAX_CLIPS = 10_000  # a key has four digits for the clip's ordinal


@dataclass(frozen=True)
class Span:
    """A part of a source."""

    start: int
    end: int
    """Frames [start, end)."""
    wanted_start_s: float
    wanted_end_s: float
    """The seconds that were asked for."""
    row: int | None = None
    """Number of the manifest's row that asked for it; None for windows and scenes."""


def cut_windows(
    n_frames: int, fps: Fraction, clip_seconds: float, remainder: str = "join"
) -> tuple[list[Span], list[Span]]:
    """Windows in order, at most MAX_CLIPS; and what was dropped.

    A source with more windows than MAX_CLIPS gets longer windows, so that nothing of it is lost.
    """
    windows, dropped = _window_bounds(n_frames, fps, clip_seconds, remainder)
    return [_make_span(s, e, fps) for s, e in windows], [_make_span(s, e, fps) for s, e in dropped]


def _make_span(start: int, end: int, fps: Fraction) -> Span:
    return Span(start, end, seconds(start, fps), seconds(end, fps))


def seconds(frames: int, fps: Fraction) -> float:
    """Time of a frame, to the microsecond."""
    return round(float(frames / fps), 6)


def _window_bounds(
    n_frames: int, fps: Fraction, clip_seconds: float, remainder: str
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    if n_frames < 1:
        return [], []
    if clip_seconds == 0:
        return [(0, n_frames)], []
    window = max(1, round(Fraction(clip_seconds) * fps))
    window = max(window, -(-n_frames // MAX_CLIPS))
    starts = list(range(0, n_frames, window))
    left = n_frames - starts[-1]
    if remainder == "drop" and left < window:
        spans = list(pairwise(starts))
        return spans, [(starts[-1], n_frames)]
    if remainder == "join" and len(starts) > 1 and 2 * left < window:
        starts.pop()
    return list(zip(starts, [*starts[1:], n_frames], strict=True)), []


def spans_of_rows(
    rows: Sequence[tuple[float, float | None]], n_frames: int, fps: Fraction
) -> tuple[list[Span], list[Span]]:
    """A manifest's spans in seconds → spans in frames; and the spans that begin beyond the end and hold no frame.

    A span that runs past the end of the video ends there. Every span inside holds at least one frame.
    """
    inside: list[Span] = []
    outside: list[Span] = []
    for row, (start_s, end_s) in enumerate(rows):
        start = round(Fraction(start_s) * fps)
        end = n_frames if end_s is None else max(start + 1, round(Fraction(end_s) * fps))
        asked = seconds(n_frames, fps) if end_s is None else end_s
        span = Span(min(start, n_frames), min(end, n_frames), start_s, max(asked, start_s), row)
        (inside if span.end > span.start else outside).append(span)
    return inside, outside


def spans_of_scenes(
    cuts: Sequence[int],
    keyframes: Sequence[int],
    n_frames: int,
    fps: Fraction,
    *,
    clip_seconds: float,
    remainder: str,
    min_seconds: float,
) -> tuple[list[Span], list[Span]]:
    """Scenes → spans that begin at keyframes; and the scenes, or remainders of scenes, that are too short.

    `cuts`: first frames of new scenes. `cuts` and `keyframes` ascend.
    """
    good: list[Span] = []
    short: list[Span] = []
    for scene_start, scene_end in pairwise([0, *(c for c in cuts if 0 < c < n_frames), n_frames]):
        scene = _make_span(scene_start, scene_end, fps)
        start = _next_keyframe(keyframes, scene_start, n_frames)
        if start >= scene_end or scene_end - start < Fraction(min_seconds) * fps:
            short.append(scene)
            continue
        windows, dropped = _window_bounds(scene_end - start, fps, clip_seconds, remainder)
        short += [_make_span(start + s, start + e, fps) for s, e in dropped]
        borders = [_next_keyframe(keyframes, start + s, scene_end) for s, _ in windows]
        borders = sorted({b for b in borders if b < scene_end})
        end = start + windows[-1][1] if windows else scene_end
        for i, (a, b) in enumerate(pairwise([*borders, end])):
            asked_start = scene_start if i == 0 else start + windows[i][0]
            asked_end = scene_end if i == len(borders) - 1 and end == scene_end else start + windows[i][1]
            good.append(Span(a, b, seconds(asked_start, fps), seconds(asked_end, fps)))
    return good, short


def _next_keyframe(keyframes: Sequence[int], frame: int, end: int) -> int:
    """The first keyframe at or after `frame`; `end` where there is none."""
    at = bisect_left(keyframes, frame)
    return keyframes[at] if at < len(keyframes) else end


def move_to_keyframes(spans: Sequence[Span], keyframes: Sequence[int], n_frames: int) -> list[Span]:
    """Ascending spans with each start moved to the next keyframe, and with it each end that is another span's start.

    A span that becomes empty is joined to the span before it: that one's wanted seconds then cover both.
    """
    starts = {span.start: _next_keyframe(keyframes, span.start, n_frames) for span in spans}
    moved: list[Span] = []
    for s in spans:
        start, end = starts[s.start], starts.get(s.end, min(s.end, n_frames))
        if end > start:
            moved.append(Span(start, end, s.wanted_start_s, s.wanted_end_s, s.row))
        elif moved and moved[-1].end == end:
            moved[-1] = replace(moved[-1], wanted_end_s=s.wanted_end_s)
    return moved


def merge_spans(spans: Sequence[Span]) -> list[tuple[int, int]]:
    """The frames that any span needs, as ascending stretches [start, end) that do not touch."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted((s.start, s.end) for s in spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def locate_frame(frame: int, stretches: Sequence[tuple[int, int]]) -> int:
    """The number of a frame if only these stretches are kept, one after the other."""
    before = 0
    for start, end in stretches:
        if frame <= end:
            return before + max(0, frame - start)
        before += end - start
    return before
