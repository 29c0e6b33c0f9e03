"""What the benchmarks are asked for. Imports no torch: the command line reads these classes.

A setting that a part of reelmae has already is that part's own field here: LoadOptions, SamplePolicy, ShardConfig.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import pydantic
from tyro.conf import Positional, arg

from reelmae.model.config import Objective
from reelmae.pipeline.errors import ConfigError
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.loading.config import PATCH, LoadOptions
from reelmae.pipeline.loading.order.draws import DEFAULT_FPS, SamplePolicy
from reelmae.train.precision import Precision

SMALL_S = 2.0
"""Seconds of each of the files that `bench shard --small-files` makes."""


class _Config(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


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
    objective: Objective = "mae"
    """What the model learns by. mae: MAE-ST. slowfast: MAE-ST as its published weights were trained. videomae: VideoMAE. motion: MotionMAE."""
    mask_ratio: float = 0.9
    """Share of the tokens that the encoder does not see."""
    decoder_mask: float | None = None
    """Share of the tokens that decoder masking leaves unpredicted: 0.25, 0.5 or 0.75. All is timed again with it. 0: not. None: 0.5 if cells of 2×2 patches divide the clip, else 0."""
    batch: int = 1
    """Clips in a step."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if there is a GPU, else the CPU."""
    precision: Precision = "auto"
    """auto: bf16 on CUDA, float32 on the CPU."""
    compile: bool = False
    """Run the model through torch.compile."""
    checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    threads: int | None = None
    """Threads of torch on the CPU. None: torch's own choice."""
    steps: int = 3
    """Timed steps of each encoder."""
    warmup: int = 1
    """Steps of each encoder before the timed ones."""
    data: str | None = None
    """Shard dataset (folder or fsspec URL). With it the steps are timed again behind the real loader."""
    workers: int | None = None
    """Decoding workers of that loader. None: its own choice."""


def _write_out_rate(sample: SamplePolicy) -> SamplePolicy:
    """Neither --stride nor --fps means DEFAULT_FPS; results say it."""
    if sample.stride is None and sample.fps is None:
        return replace(sample, fps=DEFAULT_FPS)
    return sample


def _check_tokens(sample: SamplePolicy) -> SamplePolicy:
    """Refuse a sample that is not a whole number of tokens, by the flag's name."""
    for name, side, patch in (("--frames", sample.frames, PATCH[0]), ("--size", sample.size, PATCH[1])):
        if side % patch:
            raise ConfigError(f"{name} {side}: give a multiple of {patch}")
    return sample


Sample = Annotated[SamplePolicy, pydantic.AfterValidator(_write_out_rate), arg(name="")]


class BenchLoadConfig(LoadOptions):
    """What is loaded, and how."""

    data: Annotated[Positional[str], arg(metavar="DATA")]
    """Folder or fsspec URL of shards."""
    sample: Sample = pydantic.Field(default=SamplePolicy(), validate_default=True)
    """How a sample is cut out of a clip."""
    batches: int = pydantic.Field(default=20, ge=1)
    """Batches to measure."""
    warmup: int = pydantic.Field(default=3, ge=1)
    """Batches before the clock starts."""
    whole_clips: bool = False
    """Play the same batches a second time with clips read whole, where else only the blocks that decoding needs are read."""


class BenchStorageConfig(_Config):
    """Where storage is measured, with how much, and how far away."""

    url: Annotated[Positional[str | None], arg(metavar="[URL]")] = None
    """An s3:// bucket or prefix to write below; what is written is removed. None: a server is started here."""
    what: tuple[Literal["read", "write", "load"], ...] = pydantic.Field(default=("read", "write", "load"), min_length=1)
    """Groups of contenders to measure: reading files, writing them, fetching clips as the loader does."""
    files: int = pydantic.Field(default=4, ge=1)
    """Number of files."""
    file_mib: float = pydantic.Field(default=256.0, ge=1)
    """Size of each file in MiB."""
    clip_kib: float = pydantic.Field(default=512.0, ge=1)
    """Size in KiB of the clips as which the loader fetches the files' bytes."""
    threads: int = pydantic.Field(default=8, ge=1)
    """Ranged reads that run side by side, for each reader that can be told."""
    fetch_threads: int | None = pydantic.Field(default=None, ge=1)
    """Clips that the loader fetches side by side. None: as many as its workers on this machine do."""
    rounds: int = pydantic.Field(default=3, ge=1)
    """Number of rounds; in each round everything runs once, in another order."""
    latency_ms: float = pydantic.Field(default=0.0, ge=0)
    """Milliseconds by which a relay delays each answer of the server."""
    connection_mb_s: float = pydantic.Field(default=0.0, ge=0)
    """MB/s that the relay lets through on each connection, in each direction. 0: no limit."""
    out: Path | None = None
    """File to write the result to as JSON, too."""

    @pydantic.model_validator(mode="after")
    def _check_url(self) -> BenchStorageConfig:
        if self.url is not None and not self.url.startswith("s3://"):
            raise ConfigError(f"{self.url}: give an s3:// URL, since obstore and boto3 are compared on one S3 server")
        return self


class BenchLoadersConfig(_Config):
    """What every loader plays."""

    data: Annotated[tuple[str, ...], Positional, arg(metavar="DATA [DATA ...]")]
    """At least one folder of shards. Those after the first must hold the same clips, stored in another way."""
    repeats: int = pydantic.Field(default=4, ge=1, le=64)
    """Samples of each clip."""
    rounds: int = pydantic.Field(default=3, ge=1)
    """Number of rounds; in each round every loader plays in turn."""
    videos: int = pydantic.Field(default=64, ge=1)
    """Most clips that a loader plays in a round. It plays whole epochs if the dataset has no more clips than this."""
    batch_videos: int = pydantic.Field(default=8, ge=1)
    """Most videos in a batch. Where epochs are played whole: the largest number up to this that divides the clips."""
    sample: Annotated[Sample, pydantic.AfterValidator(_check_tokens)] = pydantic.Field(
        default=SamplePolicy(), validate_default=True
    )
    """How a sample is cut out of a clip."""

    @pydantic.model_validator(mode="after")
    def _check_data(self) -> BenchLoadersConfig:
        if not self.data:
            raise ConfigError("DATA: give at least one folder of shards")
        return self


class BenchShardConfig(_Config):
    """What is sharded, and with which settings."""

    src: Annotated[Positional[str], arg(metavar="SRC")]
    """Local folder of videos."""
    small_files: int = pydantic.Field(default=0, ge=0)
    """Cut this many two-second files from the videos at SRC first, and shard those. 0: shard SRC itself."""
    rounds: int = pydantic.Field(default=3, ge=1)
    """Number of rounds; in each round both run in turn."""
    runner: Literal["local", "ray"] = "local"
    """ray: compare sharding on a Ray of this machine with local workers, instead of with ffmpeg."""
    tars: int = pydantic.Field(default=0, ge=0)
    """Compare sharding the videos out of tars of this many members with loose files, instead of with ffmpeg. 0: not."""
    workers: int | None = pydantic.Field(default=None, ge=1)
    """Number of videos to work on at once. None: one per core."""
    shard: Annotated[ShardConfig, arg(name="")] = ShardConfig()
    """How they are sharded. The flags about manifests and labels have no meaning here."""

    @property
    def contender(self) -> Literal["ffmpeg", "ray", "tars"]:
        """What sharding is compared with."""
        return "tars" if self.tars else "ray" if self.runner == "ray" else "ffmpeg"

    @pydantic.model_validator(mode="after")
    def _check_comparable(self) -> BenchShardConfig:
        """Refuse what bare ffmpeg's command line has no equal of, and two comparisons at once."""
        if self.tars and self.runner == "ray":
            raise ConfigError("--tars and --runner ray are two comparisons; give one of them")
        if self.contender != "ffmpeg":
            return self
        if self.shard.profile == "copy":
            raise ConfigError("profile copy encodes nothing that ffmpeg could be compared with; take another profile")
        if self.shard.cut == "scenes" or self.shard.crop_borders:
            raise ConfigError("--cut scenes and --crop-borders have no equal in bare ffmpeg; leave them out")
        return self


class BenchPlanConfig(_Config):
    """What is planned."""

    sources: int = pydantic.Field(default=1_000_000, ge=1)
    """Number of sources."""
    kind: Literal["manifest", "listing"] = "manifest"
    """manifest: a CSV file with a label for each source. listing: folders of 1000 files each."""


class BenchJoinConfig(_Config):
    """What is joined."""

    clips: int = pydantic.Field(default=10_000_000, ge=1)
    """Clips of the generated commits, one of each source."""


class BenchClusterConfig(_Config):
    """How much runs on the cluster, and how often it changes."""

    tasks: int = pydantic.Field(default=100_000, ge=1)
    """Number of tasks that do nothing."""
    sources: int = pydantic.Field(default=1_000_000, ge=1)
    """Number of sources of the generated plan."""
    nodes: int = pydantic.Field(default=2, ge=1)
    """Nodes of one core each, beside that of the driver."""
    change_s: float = pydantic.Field(default=10.0, gt=0)
    """Seconds from one change to the next: a node joins, then the oldest one is killed."""


class BenchIndexConfig(_Config):
    """What is opened."""

    clips: int = pydantic.Field(default=10_000_000, ge=1)
    """Clips of the generated index."""
    rounds: int = pydantic.Field(default=3, ge=1)
    """Number of new processes that open it, one after the other."""


class BenchPresetsConfig(_Config):
    """What is encoded."""

    src: Annotated[Positional[str], arg(metavar="SRC")]
    """Local folder of videos."""


class ChartConfig(_Config):
    """Which results are drawn, and where the picture goes."""

    results: Annotated[Positional[Path | None], arg(metavar="[RESULTS]")] = None
    """Folder with the JSON that the benchmarks print with --json. None: the results in a checkout of reelmae."""
    out: Path = Path("measured.png")
    """The picture to write: .png or .svg."""
