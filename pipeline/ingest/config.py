"""ShardConfig: everything that shapes the bytes of a shard dataset. Its digest is the identity of a job.

How a job is run (workers, temporary folder, progress) is not in here: it must not change a byte.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from reelmae.pipeline.errors import ConfigError

Profile = Literal["default", "fast-decode", "vp9"]
DEFAULT_CRF: dict[str, int] = {"default": 23, "fast-decode": 23, "vp9": 31}
MAX_FPS = 120


class ShardConfig(BaseModel):
    """What a sharding job makes of its sources.

    Lengths are in seconds, sizes in bytes, sides in pixels after rotation and pixel aspect. Values out of
    range raise pydantic's ValidationError; `ShardConfig.checked` turns it into ConfigError.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: Literal["kinetics", "uncurated"] = (
        "kinetics"  # which screens apply; those of screen.py apply in both
    )
    profile: Profile = "default"
    short_side: int = Field(
        default=256, ge=16, le=4096
    )  # the stored short side at most; a multiple of 16; never upscaled
    fps: float | None = Field(
        default=None, gt=0, le=MAX_FPS
    )  # None = each source's own; never above the source's
    crf: int | None = Field(default=None, ge=0, le=63)  # None = the profile's own
    gop: int = Field(default=16, ge=1, le=600)  # frames between keyframes
    clip_seconds: float = Field(default=10.0, ge=0, le=86_400)  # 0 = the whole source as one clip
    min_frames: int = Field(default=2, ge=1)  # of a source, after the change of rate
    min_side: int = Field(default=16, ge=1)
    max_duration_s: float = Field(default=4 * 3600.0, gt=0)
    max_pixels: int = Field(default=8192 * 4320, ge=256)  # of one source frame
    max_source_bytes: int = Field(default=16 << 30, ge=1)
    shard_bytes: int = Field(default=256 << 20, ge=1)  # a shard that passes this is closed
    sources_per_task: int | None = Field(default=None, ge=1, le=100_000)  # None = by the number of sources
    labels: Literal["none", "folder"] = (
        "none"  # folder: the first folder of the path; a manifest's labels always count
    )
    seed: int = Field(default=0, ge=0)

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

    @classmethod
    def checked(cls, **values: Any) -> ShardConfig:
        """The config of these values; ConfigError naming the key, the value and what would be allowed."""
        try:
            return cls(**values)
        except ValidationError as e:
            first = e.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or "config"
            if first["type"] == "extra_forbidden":
                raise ConfigError(f"{key}: no such key; there are {', '.join(cls.model_fields)}") from e
            raise ConfigError(f"{key}={first['input']!r}: {first['msg']}") from e

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
