"""Pure: frames of a source at its output rate, and a clip length → spans in frames.

Fixed windows. A remainder shorter than half a window is joined to the window before it, else it is a clip of
its own; so every clip but the last has exactly the window's length, and the last has 0.5 to 1.5 of it:

    frames 250, window 100  →  [0,100) [100,200) [200,250)
    frames 249, window 100  →  [0,100) [100,249)
    frames  30, window 100  →  [0,30)
    clip_seconds 0          →  [0,frames)
"""

from __future__ import annotations

from fractions import Fraction

MAX_CLIPS = 10_000  # a key has four digits for the clip's ordinal


def cut(n_frames: int, fps: Fraction, clip_seconds: float) -> list[tuple[int, int]]:
    """Spans [start, end) in frames, in order, covering all frames once; at most MAX_CLIPS of them.

    A source with more windows than MAX_CLIPS gets longer windows, so that nothing of it is lost.
    """
    if n_frames < 1:
        return []
    if clip_seconds == 0:
        return [(0, n_frames)]
    window = max(1, round(Fraction(clip_seconds) * fps))
    window = max(window, -(-n_frames // MAX_CLIPS))
    starts = list(range(0, n_frames, window))
    if len(starts) > 1 and 2 * (n_frames - starts[-1]) < window:
        starts.pop()
    return list(zip(starts, [*starts[1:], n_frames], strict=True))
