"""Pure: which spans of a source become clips, in frames of the source at its output rate.

Fixed windows. What is left after the last whole window is joined to it where it is shorter than half a window,
else it is a clip of its own ("join"); or it is always a clip of its own ("keep"); or it is dropped and said
("drop"):

    frames 250, window 100  →  join, keep [0,100) [100,200) [200,250)    drop [0,100) [100,200)
    frames 249, window 100  →  join [0,100) [100,249)
    frames  30, window 100  →  join, keep [0,30)                         drop nothing: the source is too short
    clip_seconds 0          →  [0,frames)

Scenes are the stretches between cuts. One that is too short is rejected; one longer than `clip_seconds` is cut
into windows. A clip can only begin at a keyframe: where none lies on a cut, the frames up to the next one are
lost to both neighbours, and where none lies on a window's border, the border moves to the next one.
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
    """Frames [start, end) of a source, and the seconds that were asked for; `row` of the manifest, by number."""

    start: int
    end: int
    wanted_start_s: float
    wanted_end_s: float
    row: int | None = None


def cut(n_frames: int, fps: Fraction, clip_seconds: float, remainder: str = "join") -> tuple[list[Span], list[Span]]:
    """Windows in order, at most MAX_CLIPS; and what was dropped.

    A source with more windows than MAX_CLIPS gets longer windows, so that nothing of it is lost.
    """
    windows, dropped = _windows(n_frames, fps, clip_seconds, remainder)
    return [_asked(s, e, fps) for s, e in windows], [_asked(s, e, fps) for s, e in dropped]


def _asked(start: int, end: int, fps: Fraction) -> Span:
    return Span(start, end, seconds(start, fps), seconds(end, fps))


def seconds(frames: int, fps: Fraction) -> float:
    """Time of a frame, to the microsecond."""
    return round(float(frames / fps), 6)


def _windows(
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
    """A manifest's spans in seconds → spans in frames; and those that begin beyond the end, with no frame.

    The end is cut off at the end of the video; every span holds at least one frame.
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
    """First frames of new scenes and the keyframes there are, both ascending → spans that begin at keyframes;
    and the scenes, or remainders of them, that are too short."""
    good: list[Span] = []
    short: list[Span] = []
    for scene_start, scene_end in pairwise([0, *(c for c in cuts if 0 < c < n_frames), n_frames]):
        scene = _asked(scene_start, scene_end, fps)
        start = _next(keyframes, scene_start, n_frames)
        if start >= scene_end or scene_end - start < Fraction(min_seconds) * fps:
            short.append(scene)
            continue
        windows, dropped = _windows(scene_end - start, fps, clip_seconds, remainder)
        short += [_asked(start + s, start + e, fps) for s, e in dropped]
        borders = [_next(keyframes, start + s, scene_end) for s, _ in windows]
        borders = sorted({b for b in borders if b < scene_end})
        end = start + windows[-1][1] if windows else scene_end
        for i, (a, b) in enumerate(pairwise([*borders, end])):
            asked_start = scene_start if i == 0 else start + windows[i][0]
            asked_end = scene_end if i == len(borders) - 1 and end == scene_end else start + windows[i][1]
            good.append(Span(a, b, seconds(asked_start, fps), seconds(asked_end, fps)))
    return good, short


def _next(keyframes: Sequence[int], frame: int, end: int) -> int:
    """The first keyframe at or after `frame`; `end` where there is none."""
    at = bisect_left(keyframes, frame)
    return keyframes[at] if at < len(keyframes) else end


def at_keyframes(spans: Sequence[Span], keyframes: Sequence[int], n_frames: int) -> list[Span]:
    """Spans, ascending, whose starts move to the next keyframe, as do ends that are another's start.

    One that ends up empty has been swallowed by the one before it, which then says that it was asked for both.
    """
    starts = {span.start: _next(keyframes, span.start, n_frames) for span in spans}
    moved: list[Span] = []
    for s in spans:
        start, end = starts[s.start], starts.get(s.end, min(s.end, n_frames))
        if end > start:
            moved.append(Span(start, end, s.wanted_start_s, s.wanted_end_s, s.row))
        elif moved and moved[-1].end == end:
            moved[-1] = replace(moved[-1], wanted_end_s=s.wanted_end_s)
    return moved


def runs(spans: Sequence[Span]) -> list[tuple[int, int]]:
    """The frames that any span needs, as ascending stretches that do not touch."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted((s.start, s.end) for s in spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def place(frame: int, stretches: Sequence[tuple[int, int]]) -> int:
    """Where a frame lies when only these stretches are kept, one after the other."""
    before = 0
    for start, end in stretches:
        if frame <= end:
            return before + max(0, frame - start)
        before += end - start
    return before
