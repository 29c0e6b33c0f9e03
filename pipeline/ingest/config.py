"""ShardConfig: everything that shapes the bytes of a shard dataset. Its digest is the identity of a job.

How a job is run (workers, temporary folder, progress) is not in here: it must not change a byte.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Profile = Literal["default", "fast-decode", "vp9"]
DEFAULT_CRF: dict[str, int] = {"default": 23, "fast-decode": 23, "vp9": 31}
MAX_FPS = 120


class ShardConfig(BaseModel):
    """What a sharding job makes of its sources.

    Lengths are in seconds, sizes in bytes, sides in pixels after rotation and pixel aspect. Values out of
    range raise pydantic's ValidationError, which is a ValueError.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    profile: Profile = "default"
    """default: H.264. fast-decode: H.264 that decodes faster and is larger. vp9: for DALI on the processor."""
    short_side: int = Field(default=256, ge=16, le=4096)
    """Short side of a stored clip at most, a multiple of 16; nothing is scaled up."""
    fps: float | None = Field(default=None, gt=0, le=MAX_FPS)
    """Stored frames a second at most; None is each source's own rate."""
    crf: int | None = Field(default=None, ge=0, le=63)
    """Constant rate factor; None is the profile's own (23; vp9 31)."""
    gop: int = Field(default=16, ge=1, le=600)
    """Frames from one keyframe to the next."""
    clip_seconds: float = Field(default=10.0, ge=0, le=86_400)
    """Length of the windows a source is cut into; 0 makes the whole source one clip."""
    min_frames: int = Field(default=2, ge=1)
    """Sources with fewer frames, after the change of rate, are rejected."""
    min_side: int = Field(default=16, ge=1)
    """Sources with a shorter side, in pixels as shown, are rejected."""
    max_duration_s: float = Field(default=4 * 3600.0, gt=0)
    """Longer sources are rejected."""
    max_pixels: int = Field(default=8192 * 4320, ge=256)
    """Sources with more pixels in a frame are rejected."""
    max_source_bytes: int = Field(default=16 << 30, ge=1)
    """Larger sources are rejected."""
    shard_bytes: int = Field(default=256 << 20, ge=1)
    """A shard that passes this size is closed and the next begun."""
    sources_per_task: int | None = Field(default=None, ge=1, le=100_000)
    """Sources of one task, the unit of resuming; None is a 64th of all, 8 to 256."""
    labels: Literal["none", "folder"] = "none"
    """folder: the first folder of a source's path is its label. A manifest's labels always count."""
    seed: int = Field(default=0, ge=0)
    """Of the order in which sources are dealt to shards."""

    @field_validator("short_side")
    @classmethod
    def _multiple_of_16(cls, value: int) -> int:
        if value % 16:
            raise ValueError(
                f"{value} is no multiple of 16; take {value // 16 * 16 or 16} or {value // 16 * 16 + 16}"
            )
        return value

    @field_validator("crf")
    @classmethod
    def _crf_of_the_profile(cls, value: int | None, info: Any) -> int | None:
        if value is not None and value > 51 and info.data.get("profile") != "vp9":
            raise ValueError(f"{value} is above 51, x264's highest")
        return value

    @property
    def codec(self) -> str:
        """Name of the clips' codec in the index."""
        return "vp9" if self.profile == "vp9" else "h264"

    @property
    def quality(self) -> int:
        """The constant rate factor in force."""
        return DEFAULT_CRF[self.profile] if self.crf is None else self.crf

    def digest(self) -> str:
        """16 hex digits; the same values give the same digest, in any order and on any machine."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
