"""What a loader is asked for, checked where it is built. Imports no torch: the command line reads these classes.

Each class adds fields to the one before:
- LoadOptions    what shapes the speed, and the size of a batch
- LoaderOptions  what a recipe's [loader] section holds
- LoaderConfig   what ClipLoader takes
"""

from __future__ import annotations

import contextlib
import math
from typing import Annotated, Any, Literal

import pydantic

from reelmae.pipeline.errors import ConfigError
from reelmae.pipeline.loading.order.draws import SampleOptions, SamplePolicy
from reelmae.pipeline.loading.order.masks import DecoderMaskPolicy, GridTHW, MaskPolicy, ids_decode, n_keep
from reelmae.pipeline.loading.tasks import DecodePolicy

CLIP_TIMEOUT_S = 60.0
PATCH = (2, 16, 16)  # frames, rows, columns of one token, unless others are given
Backend = Literal["auto", "av", "dali-cpu", "dali-gpu"]
# The statistics of the pixels of each channel, in 0 … 1, by which a batch is normalised unless others are given
PIXEL_MEAN = (0.45, 0.45, 0.45)
PIXEL_STD = (0.225, 0.225, 0.225)
# The fields that shape the sequence of samples. pixel_mean and pixel_std are not among them: they change the values of
# a batch, not which samples it holds. A training run compares them with its recipe, as settings of the model.
_SEQUENCE = {"seed", "lanes", "repeats", "sample", "mask", "decoder_mask", "patch"}


def _check_three_numbers(value: Any, info: pydantic.ValidationInfo) -> Any:
    """Refuse what is not one finite number for each of the three channels."""
    numbers: list[float] = []
    if isinstance(value, list | tuple) and not any(isinstance(number, bool | str) for number in value):
        with contextlib.suppress(TypeError, ValueError):
            numbers = [float(number) for number in value]
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
        raise ConfigError(
            f"{info.field_name}={value!r}: give three finite numbers, one for each of red, green and blue, "
            f"such as {PIXEL_MEAN if info.field_name == 'pixel_mean' else PIXEL_STD}"
        )
    return tuple(numbers)


ThreeNumbers = Annotated[tuple[float, float, float], pydantic.BeforeValidator(_check_three_numbers)]


class LoadOptions(pydantic.BaseModel):
    """What shapes the speed of loading, and the size of a batch."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    backend: Backend = "auto"
    """Decoder. av: PyAV on the CPU. dali-cpu, dali-gpu: NVIDIA DALI. auto: dali-gpu where it can run, else av."""
    batch_videos: int = pydantic.Field(default=8, ge=1)
    """Videos in a batch of one rank; a batch has batch_videos × repeats clips."""
    repeats: int = pydantic.Field(default=1, ge=1, le=64)
    """Samples of each decoded clip."""
    decode: DecodePolicy = "auto"
    """How av decodes a clip's repeated samples. windows: each by itself. span: all in one go. auto: the cheaper."""
    workers: int | None = pydantic.Field(default=None, ge=0)
    """Decoding processes (av) or threads (DALI). None: one for each core. 0: decode in the calling process (av)."""
    pipelines: int = pydantic.Field(default=1, ge=1, le=8)
    """Pipelines of DALI that run side by side."""
    prefetch: int = pydantic.Field(default=2, ge=1)
    """Batches that are prepared ahead of the one in use; more where that hides the latency of a remote store."""
    cache: str | None = None
    """Local folder for the shards of a remote dataset. None: each clip, or the part that is needed, is read by itself."""
    cache_gb: float = pydantic.Field(default=100.0, gt=0)
    """Size of the cache in 10^9 bytes, for all processes that share the folder."""


class LoaderOptions(LoadOptions):
    """What a recipe's [loader] section holds: also how clips are cut and masked, and when bad clips end a run."""

    sample: SampleOptions = SampleOptions()
    """How a training clip is cut out of a stored one."""
    mask: MaskPolicy = MaskPolicy()
    """Which tokens the encoder does not see."""
    decoder_mask: DecoderMaskPolicy = DecoderMaskPolicy()
    """Which tokens the decoder does not predict."""
    lanes: int = pydantic.Field(default=64, ge=1)
    """Places of an epoch that are read side by side; a multiple of the number of ranks."""
    max_bad_fraction: float = pydantic.Field(default=0.01, ge=0, le=1)
    """Share of bad clips above which the run stops."""
    clip_timeout_s: float = pydantic.Field(default=CLIP_TIMEOUT_S, gt=0)
    """Seconds for one clip, after which a decoding process counts as hung and is replaced (av). Waiting for a store is
    not counted: it has its own patience."""


class LoaderConfig(LoaderOptions):
    """Settings of a ClipLoader.

    What shapes the sequence of samples: seed, lanes, batch_videos × world, repeats, sample, mask, decoder_mask, patch.
    What shapes the values of a batch: pixel_mean, pixel_std. The rest shapes the speed, or what happens to bad clips.
    Values that are refused raise pydantic's ValidationError, which is a ValueError.
    """

    sample: SamplePolicy = SamplePolicy()
    """How a training clip is cut out of a stored one, and its size."""
    patch: tuple[int, int, int] = PATCH
    """Frames, rows and columns of one token."""
    seed: int = pydantic.Field(default=0, ge=0, lt=1 << 63)
    """Seed of the order and of every draw."""
    quarantine: str | None = None
    """File that bad clips are written to. Those it lists are known to be bad from the start."""
    device: str = "auto"
    """Torch device of the batches. auto: CUDA where there is a GPU, else the CPU."""
    pixel_mean: ThreeNumbers = PIXEL_MEAN
    """Mean of red, green and blue, for pixels in 0 … 1."""
    pixel_std: ThreeNumbers = PIXEL_STD
    """Standard deviation of red, green and blue, for pixels in 0 … 1."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> LoaderConfig:
        sides = (("frames", self.sample.frames), ("size", self.sample.size), ("size", self.sample.size))
        for (name, side), patch in zip(sides, self.patch, strict=True):
            if patch < 1 or side % patch:
                raise ConfigError(
                    f"patch={self.patch}: sample.{name}={side} is not a multiple of {patch}; change one of them"
                )
        if min(self.pixel_std) <= 0:
            raise ConfigError(f"pixel_std={self.pixel_std}: give three numbers above 0, such as {PIXEL_STD}")
        n_keep(self.mask.kind, self.mask.ratio, self.grid_THW)
        ids_decode(self.decoder_mask, 0, self.grid_THW)
        return self

    @property
    def grid_THW(self) -> GridTHW:
        """Tokens of a clip along time, height, width."""
        return (
            self.sample.frames // self.patch[0],
            self.sample.size // self.patch[1],
            self.sample.size // self.patch[2],
        )

    def sequence_facts(self, world: int) -> dict[str, Any]:
        """What shapes the sequence of samples, as JSON values: a resumed run compares them."""
        facts = self.model_dump(mode="json", include=_SEQUENCE)
        return {"global_batch": self.batch_videos * world, **facts}
