"""What the benchmarks are asked for. Apart from them, so that the command line starts without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import pydantic
import tyro


@dataclass(frozen=True)
class BenchStepConfig:
    """What is timed."""

    model: str = "vit_b"
    """Preset: vit_t, vit_s, vit_b, vit_l or vit_h."""
    frames: int = 16
    """Frames of a clip."""
    size: int = 224
    """Height and width of a clip in pixels."""
    patch: int = 16
    """Height and width of a patch in pixels."""
    objective: Literal["mae", "slowfast", "videomae", "motion"] = "mae"
    """What the model learns by: MAE-ST, MAE-ST as published, VideoMAE or MotionMAE."""
    mask_ratio: float = 0.9
    """Share of the tokens that is removed."""
    decoder_mask: float | None = None
    """Time it all again with this share of the tokens left out of the prediction: 0.25, 0.5 or 0.75, or 0 not to; None: half
    of them, where cells of 2×2 patches divide the clip."""
    batch: int = 1
    """Clips in a step."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is a GPU."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """auto: bf16 on CUDA, float32 on CPU."""
    compile: bool = False
    """Run the model through torch.compile."""
    checkpointing: bool = False
    """Compute activations again in backward instead of holding them."""
    threads: int | None = None
    """Threads of torch on CPU; None is torch's own choice."""
    steps: int = 3
    """Timed steps of each encoder."""
    warmup: int = 1
    """Steps of each encoder before those."""
    data: str | None = None
    """Dataset (folder or fsspec URL) to time the steps behind the real loader as well."""
    workers: int | None = None
    """Decoding workers behind the loader; None is the loader's own choice."""


class BenchLoadConfig(pydantic.BaseModel):
    """What is loaded, and how."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """Folder or fsspec URL of shards."""
    backend: Literal["auto", "av", "dali-cpu", "dali-gpu"] = "auto"
    """Decoder."""
    repeats: int = pydantic.Field(default=1, ge=1, le=64)
    """Samples of each decoded clip."""
    batch_videos: int = pydantic.Field(default=8, ge=1)
    """Videos in a batch; a batch has batch_videos × repeats clips."""
    frames: int = pydantic.Field(default=16, ge=1)
    """Frames of a sample."""
    size: int = pydantic.Field(default=224, ge=16)
    """Side of a sample in pixels."""
    fps: float = pydantic.Field(default=7.5, gt=0)
    """Sampled frames a second."""
    workers: int | None = pydantic.Field(default=None, ge=0)
    """Decoding processes or threads; the number of cores unless given."""
    decode: Literal["auto", "windows", "span"] = "auto"
    """How the windows of repeated samples are decoded, of the av backend: each by itself, as one, or as is cheaper."""
    pipelines: int = pydantic.Field(default=1, ge=1, le=8)
    """Pipelines of DALI side by side."""
    cache: str | None = None
    """Local folder for the shards of a remote dataset; without one each clip is a ranged read."""
    batches: int = pydantic.Field(default=20, ge=1)
    """Batches measured."""
    warmup: int = pydantic.Field(default=3, ge=1)
    """Batches before the clock starts."""


class BenchLoadersConfig(pydantic.BaseModel):
    """What is played, by every loader alike."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    data: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DATA")] = pydantic.Field(min_length=1)
    """Folders of shards; those after the first hold the same clips, stored in another way."""
    repeats: int = pydantic.Field(default=4, ge=1, le=64)
    """Samples of each clip."""
    rounds: int = pydantic.Field(default=3, ge=1)
    """How often each loader plays, in turn."""
    videos: int = pydantic.Field(default=64, ge=1)
    """Clips each plays in a round at most; whole epochs where so many hold one."""
    batch_videos: int = pydantic.Field(default=8, ge=1)
    """Videos in a batch at most; the largest number that divides the clips where epochs are played whole."""
    frames: int = pydantic.Field(default=16, ge=2, multiple_of=2)
    """Frames of a sample."""
    size: int = pydantic.Field(default=224, ge=16, multiple_of=16)
    """Side of a sample in pixels."""
    fps: float = pydantic.Field(default=7.5, gt=0)
    """Sampled frames a second."""


class BenchShardConfig(pydantic.BaseModel):
    """What is sharded, and against what."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    src: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """Local folder of videos."""
    profile: Literal["default", "fast-decode", "small", "vp9"] = "default"
    """As of `reelmae shard`."""
    short_side: int = pydantic.Field(default=256, ge=16, multiple_of=16)
    """As of `reelmae shard`."""
    clip_seconds: float = pydantic.Field(default=10.0, ge=0)
    """As of `reelmae shard`."""
    small_files: int = pydantic.Field(default=0, ge=0)
    """Shard so many two-second files, cut from those at SRC, instead of them."""
    rounds: int = pydantic.Field(default=3, ge=1)
    """How often both are run, in turn."""
    workers: int | None = pydantic.Field(default=None, ge=1)
    """Videos at a time; the number of cores unless given."""


class BenchPlanConfig(pydantic.BaseModel):
    """What is planned."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    sources: int = pydantic.Field(default=1_000_000, ge=1)
    """Number of sources."""
    kind: Literal["manifest", "listing"] = "manifest"
    """manifest: a CSV file with a label for each source. listing: folders of 1000 files."""


class BenchIndexConfig(pydantic.BaseModel):
    """What is opened."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    clips: int = pydantic.Field(default=10_000_000, ge=1)
    """Clips of the generated index."""
    rounds: int = pydantic.Field(default=3, ge=1)
    """Fresh processes that open it, one after the other."""


class BenchPresetsConfig(pydantic.BaseModel):
    """What is encoded."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    src: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """Local folder of videos."""
