"""Pure: the frames that samples want and where the keyframes lie → which runs of frames to decode.

A pass jumps to a keyframe and decodes frame after frame up to the last one it wants. Policies, for R samples of a clip:
- `windows`  each sample decodes a window of its own, as a loader that seeks for each sample does;
- `span`     one window from the first wanted frame to the last, which all samples share;
- `auto`     whichever is cheaper, stretch by stretch: samples share what overlaps, and what lies between them is
             jumped over wherever a keyframe allows it.

Properties that hold: each wanted frame is in exactly one pass (`windows`: once for each sample that wants it);
`auto` decodes at most as many frames as either of the others. In short clips, or at a low frame rate, it is the span;
in long ones it is the windows.

Example, keyframes at 0, 16, 32, …, two samples that want 20 24 28 and 70 74 78:
    windows and auto  (16: 20 24 28) (64: 70 74 78)  28 frames        span  (16: 20 24 28 70 74 78)  63 frames
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

DecodePolicy = Literal["auto", "windows", "span"]


@dataclass(frozen=True)
class Pass:
    """Frames to decode one after the other: from the keyframe `start` to the last of `wanted` (ascending)."""

    start: int
    wanted: tuple[int, ...]
    samples: tuple[int, ...]  # the repeats that take their frames from it

    @property
    def cost(self) -> int:
        """Frames that are decoded."""
        return self.wanted[-1] + 1 - self.start


def decode_passes(wanted_RT: np.ndarray, keyframes: Sequence[int], policy: DecodePolicy = "auto") -> list[Pass]:
    """The passes for R samples of T frame numbers each. `keyframes` are ascending frame numbers; 0 counts as one."""
    everyone = tuple(range(len(wanted_RT)))
    if policy == "windows":
        return [p for r in everyone for p in _jumping(wanted_RT[r], keyframes, (r,))]
    if policy == "span":
        wanted = np.unique(wanted_RT).tolist()
        return [Pass(_keyframe(wanted[0], keyframes), tuple(wanted), everyone)]
    return _jumping(wanted_RT, keyframes, everyone)


def _keyframe(frame: int, keyframes: Sequence[int]) -> int:
    """The last keyframe that is not after `frame`."""
    at = bisect_right(keyframes, frame)
    return keyframes[at - 1] if at else 0


def _jumping(wanted_N: np.ndarray, keyframes: Sequence[int], samples: tuple[int, ...]) -> list[Pass]:
    """Passes that jump wherever a keyframe lies between the last decoded frame and the next wanted one."""
    wanted = np.unique(wanted_N).tolist()
    passes: list[Pass] = []
    start, run = _keyframe(wanted[0], keyframes), wanted[:1]
    for frame in wanted[1:]:
        key = _keyframe(frame, keyframes)
        if key > run[-1] + 1:
            passes.append(Pass(start, tuple(run), samples))
            start, run = key, []
        run.append(frame)
    return [*passes, Pass(start, tuple(run), samples)]
