"""Pure: (seed, epoch, clip, repeat) → start frame, crop box, flip, mask seed.

Properties that hold:
- a draw depends on nothing but its arguments, so it is the same on every backend, worker, rank and restart;
- each field has its own random numbers, so that changing one field of the policy leaves the others as they were;
- the crop is torchvision's RandomResizedCrop: 10 tries at an area from `scale` and a log-uniform aspect from
  `ratio`, else the largest centred box whose aspect is allowed. Boxes lie on even pixels and have even sides: a stored
  picture's chroma has half the resolution, and so no box cuts a chroma sample in two;
- the window lies within the clip. A clip shorter than the window starts at 0 and its last frame is repeated.

Example, 16 frames at stride 4 (a window of 61 frames):
    clip of 100 frames → start in 0 … 39        clip of 61 → start 0        clip of 10 → 0 4 8 9 9 9 …
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from reelmae.pipeline.errors import ConfigError
from reelmae.pipeline.loading.order.philox import STREAM_DRAW, below, raw_bits, unit_floats

DEFAULT_FPS = 7.5  # 16 frames × stride 4 at 30 fps, the method's own sampling
CROP_TRIES = 10


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Where in a clip, and how large, the pictures of a sample are cut: what does not follow from the model.

    Frames are taken every `stride` frames, or at `fps` frames a second whatever the clip's own rate
    (stride = clip fps / fps, rounded, at least 1). Give one of the two; neither means fps = 7.5.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    stride: int | None = None
    """Stored frames from one sampled frame to the next."""
    fps: float | None = None
    """Sampled frames a second. Neither stride nor fps: 7.5."""
    scale: tuple[float, float] = (0.5, 1.0)
    """Smallest and largest share of the stored picture's area that a crop takes."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of a crop."""
    flip: bool = True
    """Mirror half of the samples, drawn at random. `--no-flip`: none."""

    def __post_init__(self) -> None:
        if self.stride is not None and self.fps is not None:
            raise ConfigError(f"sample.stride={self.stride} and sample.fps={self.fps}: give one of the two")
        if self.stride is not None and self.stride < 1:
            raise ConfigError(f"sample.stride={self.stride}: must be at least 1")
        if self.fps is not None and not self.fps > 0:
            raise ConfigError(f"sample.fps={self.fps}: must be above 0")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ConfigError(f"sample.scale={self.scale}: two shares of the area, 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ConfigError(f"sample.ratio={self.ratio}: two aspects width/height, 0 < low <= high")

    def stride_for(self, clip_fps: float) -> int:
        """Stride in frames for a clip of this rate."""
        if self.stride is not None:
            return self.stride
        return max(1, math.floor(clip_fps / (self.fps or DEFAULT_FPS) + 0.5))


@dataclass(frozen=True, kw_only=True)
class SamplePolicy(SampleOptions):
    """What is cut out of a clip: `frames` pictures of `size`×`size`, as the options say."""

    frames: int = 16
    """Frames of a sample."""
    size: int = 224
    """Height and width of a sample in pixels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("frames", self.frames), ("size", self.size)):
            if value < 1:
                raise ConfigError(f"sample.{name}={value}: must be at least 1")


@dataclass(frozen=True)
class Draw:
    """One sample of a clip: first frame, stride, crop box in the stored clip's pixels, flip, mask seed."""

    start: int
    stride: int
    top: int
    left: int
    height: int
    width: int
    flip: bool
    mask_seed: int


def draw(
    policy: SamplePolicy,
    *,
    seed: int,
    epoch: int,
    clip: int,
    repeat: int,
    frames: int,
    fps: float,
    height: int,
    width: int,
) -> Draw:
    """The draw of one (seed, epoch, clip, repeat); `frames`, `fps`, `height`, `width` are the stored clip's."""
    bits = raw_bits(3 + 4 * CROP_TRIES, seed=seed, stream=STREAM_DRAW, words=(epoch, clip, repeat))
    stride = policy.stride_for(fps)
    starts = frames - (policy.frames - 1) * stride  # how many starts there are at which the window fits
    top, left, crop_height, crop_width = _crop(policy, bits[3:].reshape(CROP_TRIES, 4), height, width)
    return Draw(
        start=below(bits[0], starts) if starts > 1 else 0,
        stride=stride,
        top=top,
        left=left,
        height=crop_height,
        width=crop_width,
        flip=policy.flip and bool(int(bits[1]) >> 63),
        mask_seed=int(bits[2]) >> 1,  # fits int64
    )


def _crop(policy: SamplePolicy, bits: np.ndarray, height: int, width: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of RandomResizedCrop."""
    unit = unit_floats(bits[:, :2]).tolist()
    low, high = math.log(policy.ratio[0]), math.log(policy.ratio[1])
    for (area_unit, aspect_unit), (_, _, top_bits, left_bits) in zip(unit, bits, strict=True):
        area = height * width * (policy.scale[0] + area_unit * (policy.scale[1] - policy.scale[0]))
        aspect = math.exp(low + aspect_unit * (high - low))
        w, h = 2 * round(math.sqrt(area * aspect) / 2), 2 * round(math.sqrt(area / aspect) / 2)
        if 0 < w <= width and 0 < h <= height:
            return (
                2 * below(top_bits, (height - h) // 2 + 1),
                2 * below(left_bits, (width - w) // 2 + 1),
                h,
                w,
            )
    w, h = width, height
    if width / height < policy.ratio[0]:
        h = min(height, round(width / policy.ratio[0]))
    elif width / height > policy.ratio[1]:
        w = min(width, round(height * policy.ratio[1]))
    w, h = w // 2 * 2, h // 2 * 2
    return (height - h) // 4 * 2, (width - w) // 4 * 2, h, w


def frame_indices(draw: Draw, n_frames_wanted: int, frames_in_clip: int) -> np.ndarray:
    """int64 [T]: the wanted frames' numbers within the clip; past its end the last frame is repeated."""
    wanted = draw.start + draw.stride * np.arange(n_frames_wanted, dtype=np.int64)
    return np.minimum(wanted, frames_in_clip - 1)
