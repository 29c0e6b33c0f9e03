"""Pure: which frames of a clip are decoded, for the windows of its samples.

A pass jumps to a keyframe and decodes frame after frame up to the last one it wants. The
passes of a clip's R samples follow from where its keyframes lie and from the decode policy:
- `windows`  each sample decodes its own window, as a loader that seeks for each sample does;
- `span`     all samples share one window, from the first wanted frame to the last;
- `auto`     the cheaper of both, stretch by stretch: samples share frames where their windows overlap, and the frames
             between windows are jumped over where a keyframe allows it.

Each wanted frame is in exactly one pass (`windows`: once for each sample that wants it). `auto` decodes at most as many
frames as either of the others. In short clips, or at a low frame rate, it equals `span`; in long ones, `windows`.

Example, keyframes at 0, 16, 32, …, two samples that want 20 24 28 and 70 74 78:
    windows and auto  (16: 20 24 28) (64: 70 74 78)  28 frames        span  (16: 20 24 28 70 74 78)  63 frames
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reelmae.pipeline.loading.tasks import DecodePolicy


@dataclass(frozen=True)
class DecodePass:
    """Frames to decode one after the other: from the keyframe `start` to the last of `wanted` (ascending)."""

    start: int
    """The keyframe at which decoding begins."""
    wanted: tuple[int, ...]
    """Frame numbers, ascending."""
    samples: tuple[int, ...]
    """The samples (repeats) that take their frames from this pass."""

    @property
    def cost(self) -> int:
        """Frames that are decoded."""
        return self.wanted[-1] + 1 - self.start


def decode_passes(wanted_RT: np.ndarray, keyframes: Sequence[int], policy: DecodePolicy = "auto") -> list[DecodePass]:
    """The passes for R samples of T frame numbers each. `keyframes` are ascending frame numbers; 0 counts as one."""
    everyone = tuple(range(len(wanted_RT)))
    if policy == "windows":
        return [p for r in everyone for p in _jump(wanted_RT[r], keyframes, (r,))]
    if policy == "span":
        wanted = np.unique(wanted_RT).tolist()
        return [DecodePass(_keyframe(wanted[0], keyframes), tuple(wanted), everyone)]
    return _jump(wanted_RT, keyframes, everyone)


def _keyframe(frame: int, keyframes: Sequence[int]) -> int:
    """The last keyframe that is not after `frame`."""
    at = bisect_right(keyframes, frame)
    return keyframes[at - 1] if at else 0


def _jump(wanted_N: np.ndarray, keyframes: Sequence[int], samples: tuple[int, ...]) -> list[DecodePass]:
    """The passes that jump wherever a keyframe lies between the last decoded frame and the next wanted one."""
    wanted = np.unique(wanted_N).tolist()
    passes: list[DecodePass] = []
    start, run = _keyframe(wanted[0], keyframes), wanted[:1]
    for frame in wanted[1:]:
        key = _keyframe(frame, keyframes)
        if key > run[-1] + 1:
            passes.append(DecodePass(start, tuple(run), samples))
            start, run = key, []
        run.append(frame)
    return [*passes, DecodePass(start, tuple(run), samples)]
