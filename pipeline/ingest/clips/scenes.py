"""Scene cuts of one source, found by PySceneDetect's ContentDetector in small colour frames (extra `curate`)."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np

from reelmae.pipeline.errors import ConfigError

SCENE_W, SCENE_H = 48, 32  # of the frames that are compared, pixels


def require() -> None:
    """Raise ConfigError if PySceneDetect is not installed."""
    try:
        import scenedetect  # noqa: F401
    except ImportError as e:
        raise ConfigError(f"cut scenes: needs PySceneDetect ({e}); install reelmae[curate], or take cut windows") from e


def find_cuts(path: Path, fps: Fraction, *, threshold: float, min_frames: int) -> list[int]:
    """First frames of new scenes, ascending, from BGR frames uint8 [T, SCENE_H, SCENE_W, 3] in a raw file.

    `threshold` is ContentDetector's; a cut less than `min_frames` after the one before it is merged with that one.
    """
    from scenedetect import ContentDetector, FrameTimecode

    data = np.memmap(path, np.uint8, "r")
    n = len(data) // (SCENE_H * SCENE_W * 3)
    frames_THWC = data[: n * SCENE_H * SCENE_W * 3].reshape(n, SCENE_H, SCENE_W, 3)
    detector = ContentDetector(threshold=threshold, min_scene_len=max(1, min_frames))
    found: list[int] = []
    for number in range(n):
        at = FrameTimecode(number, fps=float(fps))
        found += [cut.frame_num for cut in detector.process_frame(at, np.asarray(frames_THWC[number]))]
    found += [cut.frame_num for cut in detector.post_process(FrameTimecode(n, fps=float(fps)))]
    return sorted({cut for cut in found if 0 < cut < n})
