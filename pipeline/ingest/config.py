"""ShardConfig: everything that shapes the bytes of a shard dataset. Its digest is the identity of a job.

How a job is run (workers, temporary folder, progress) must not change a byte, so it is not in here.

A preset sets the screens that the user does not set:

                    kinetics    uncurated
    min_seconds       0           2          min_motion       0       0.5
    min_fps           0           5          min_luma         0       16
    min_side         16          96          min_contrast     0       6
    max_aspect        0           4          max_border       0       0.7
    duplicates      off        near
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Profile = Literal["default", "fast-decode", "small", "vp9", "copy"]
Encoder = Literal["auto", "x264", "x265", "vpx", "nvenc"]
DEFAULT_CRF: dict[str, int] = {"default": 23, "fast-decode": 23, "small": 26, "vp9": 31, "copy": 23}
CODEC = {"default": "h264", "fast-decode": "h264", "small": "hevc", "vp9": "vp9", "copy": "h264"}
# the encoders of each codec; the first runs everywhere
ENCODERS: dict[str, tuple[str, ...]] = {
    "h264": ("x264", "nvenc"),
    "hevc": ("x265", "nvenc"),
    "vp9": ("vpx",),
}
MAX_FPS = 120


@dataclass(frozen=True)
class Screens:
    """The screens in force; 0 is off."""

    min_seconds: float
    min_fps: float
    min_side: int
    max_aspect: float
    min_motion: float
    min_luma: float
    min_contrast: float
    max_border: float
    duplicates: str


PRESETS = {
    "kinetics": Screens(0, 0, 16, 0, 0, 0, 0, 0, "off"),
    "uncurated": Screens(2, 5, 96, 4, 0.5, 16, 6, 0.7, "near"),
}


class ShardConfig(BaseModel):
    """What a sharding job makes of its sources.

    Lengths are in seconds, sizes in bytes, sides in pixels after rotation and pixel aspect. A screen is off at 0.
    Values out of range raise pydantic's ValidationError, which is a ValueError.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: Literal["kinetics", "uncurated"] = "kinetics"
    """kinetics keeps everything that decodes; uncurated turns every screen on. Each screen can be set by itself."""
    profile: Profile = "default"
    """default: H.264. fast-decode: H.264 that decodes faster and is larger. small: HEVC. vp9: for DALI on the CPU.
    copy: sources that already conform are cut at their keyframes without encoding, others as default."""
    encoder: Encoder = "auto"
    """auto takes NVENC where ffmpeg and the machine have it, else the profile's encoder on the CPU."""
    short_side: int = Field(default=256, ge=16, le=4096)
    """Largest short side of a stored clip, a multiple of 16. Nothing is scaled up."""
    fps: float | None = Field(default=None, gt=0, le=MAX_FPS)
    """Largest frame rate of a stored clip; None keeps each source's own rate."""
    crf: int | None = Field(default=None, ge=0, le=63)
    """Constant rate factor; None takes the profile's default (23; small 26; vp9 31)."""
    gop: int = Field(default=16, ge=1, le=600)
    """Frames from one keyframe to the next."""
    cut: Literal["windows", "scenes"] = "windows"
    """windows: pieces of clip_seconds. scenes (extra `curate`): scenes; long ones are cut into windows.
    A manifest's spans come before both."""
    clip_seconds: float = Field(default=10.0, ge=0, le=86_400)
    """Length of the windows that a source is cut into; 0 makes the whole source (or scene) one clip."""
    remainder: Literal["join", "keep", "drop"] = "join"
    """What happens with the rest after the last window.
    join: it is added to the last window if it is shorter than half a window, else it is a clip.
    keep: it is a clip. drop: it is rejected."""
    min_scene_seconds: float = Field(default=2.0, ge=0)
    """Shorter scenes are rejected."""
    scene_threshold: float = Field(default=27.0, gt=0)
    """PySceneDetect's ContentDetector threshold: lower cuts more."""
    crop_borders: bool = False
    """Cut black borders off before scaling."""
    min_frames: int = Field(default=2, ge=1)
    """Sources and spans with fewer frames at the stored frame rate are rejected."""
    min_seconds: float | None = Field(default=None, ge=0)
    """Shorter sources and spans are rejected."""
    min_side: int | None = Field(default=None, ge=1)
    """Sources with a shorter side, in pixels as shown, are rejected."""
    min_fps: float | None = Field(default=None, ge=0)
    """Sources with fewer frames a second are rejected."""
    max_aspect: float | None = Field(default=None, ge=0)
    """Sources with a larger ratio of the longer side to the shorter are rejected."""
    min_motion: float | None = Field(default=None, ge=0, le=255)
    """Clips with less difference between neighbouring small frames (levels of 255) are rejected as static."""
    min_luma: float | None = Field(default=None, ge=0, le=255)
    """Clips with a lower mean brightness (levels of 255) are rejected as dark."""
    min_contrast: float | None = Field(default=None, ge=0, le=255)
    """Clips with less contrast (standard deviation in levels of 255) are rejected as blank."""
    max_border: float | None = Field(default=None, ge=0, le=1)
    """Clips with more black border than this share of the picture are rejected."""
    duplicates: Literal["off", "exact", "near"] | None = None
    """Which repeats of an earlier clip are marked in the index; the loader leaves these out. exact: the same bytes.
    near: also clips that look the same."""
    near_bits: int = Field(default=11, ge=0, le=11)
    """The most bits (of 256) in which the perceptual hashes of near duplicates differ."""
    max_duration_s: float = Field(default=4 * 3600.0, gt=0)
    """Longer sources are rejected."""
    max_pixels: int = Field(default=8192 * 4320, ge=256)
    """Sources with more pixels in a frame are rejected."""
    max_source_bytes: int = Field(default=16 << 30, ge=1)
    """Larger sources are rejected."""
    shard_bytes: int = Field(default=256 << 20, ge=1)
    """When a shard is larger than this, it is closed and the next one begins."""
    sources_per_task: int | None = Field(default=None, ge=1, le=100_000)
    """Sources in one task, the unit of resuming; None is a 64th of all, at least 8 and at most 256."""
    labels: Literal["none", "folder"] = "none"
    """folder: the first folder of a source's path is its label. A manifest's labels are always used."""
    url_column: str | None = None
    """The manifest's column of paths or URLs; None is `url` or `path`. Without a header: its number, from 1."""
    label_column: str | None = None
    """The manifest's column of labels; None is `label`."""
    start_column: str | None = None
    """The manifest's column of a span's start in seconds; None is `start`, `start_s` or `time_start`."""
    end_column: str | None = None
    """The manifest's column of a span's end in seconds; None is `end`, `end_s` or `time_end`."""
    allow_outside: bool = False
    """Allow a manifest to name files outside its own folder."""
    seed: int = Field(default=0, ge=0)
    """Seed of the shuffle that assigns sources to shards."""

    @field_validator("short_side")
    @classmethod
    def _multiple_of_16(cls, value: int) -> int:
        if value % 16:
            raise ValueError(
                f"{value} is not a multiple of 16; take {value // 16 * 16 or 16} or {value // 16 * 16 + 16}"
            )
        return value

    @model_validator(mode="after")
    def _fits_the_profile(self) -> ShardConfig:
        if self.crf is not None and self.crf > 51 and self.profile != "vp9":
            raise ValueError(f"crf {self.crf} is above 51, the highest of this profile's encoder")
        able = ENCODERS[self.codec]
        if self.encoder not in ("auto", *able):
            raise ValueError(f"encoder {self.encoder} makes no {self.codec}; take auto or {' or '.join(able)}")
        if self.profile == "copy" and self.cut == "scenes":
            raise ValueError("profile copy cuts at the source's own keyframes; take cut windows")
        return self

    @property
    def screens(self) -> Screens:
        """The preset's screens, replaced by those that the user set."""
        preset = PRESETS[self.preset]
        given = {f.name: getattr(self, f.name) for f in fields(Screens)}
        return replace(preset, **{name: value for name, value in given.items() if value is not None})

    def resolve(self) -> ShardConfig:
        """The same config with every screen filled in: this is what a job records and compares."""
        return self.model_copy(update=asdict(self.screens))

    @property
    def codec(self) -> str:
        """Name of the clips' codec in the index."""
        return CODEC[self.profile]

    @property
    def quality(self) -> int:
        """The constant rate factor in force."""
        return DEFAULT_CRF[self.profile] if self.crf is None else self.crf

    def digest(self) -> str:
        """16 hex digits; the same values give the same digest, in any order and on any machine."""
        text = json.dumps(self.resolve().model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
