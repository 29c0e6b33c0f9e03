"""What a loader is asked for, checked where it is built."""

from __future__ import annotations

from typing import Any, Literal

import pydantic

from reelmae.pipeline.errors import ConfigError
from reelmae.pipeline.loading.decode.passes import DecodePolicy
from reelmae.pipeline.loading.order.draws import SamplePolicy
from reelmae.pipeline.loading.order.masks import DecoderMaskPolicy, GridTHW, MaskPolicy, ids_decode, n_keep

_SEQUENCE = {"seed", "lanes", "repeats", "sample", "mask", "decoder_mask", "patch"}
Backend = Literal["auto", "av", "dali-cpu", "dali-gpu"]


class LoaderConfig(pydantic.BaseModel):
    """Settings of a ClipLoader.

    What shapes the sequence of samples: seed, lanes, batch_videos × world, repeats, sample, mask, decoder_mask, patch.
    What only shapes the speed: backend, decode, workers, pipelines, prefetch, cache, device.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    backend: Backend = "auto"
    batch_videos: int = pydantic.Field(default=8, ge=1)  # per rank
    repeats: int = pydantic.Field(default=1, ge=1, le=64)  # samples of each decoded clip
    sample: SamplePolicy = SamplePolicy()
    mask: MaskPolicy = MaskPolicy()
    decoder_mask: DecoderMaskPolicy = DecoderMaskPolicy()
    patch: tuple[int, int, int] = (2, 16, 16)  # frames, rows, columns of one token
    seed: int = pydantic.Field(default=0, ge=0, lt=1 << 63)
    lanes: int = pydantic.Field(default=64, ge=1)
    workers: int | None = pydantic.Field(default=None, ge=0)  # None: one per core; 0: in the caller's process (av)
    decode: DecodePolicy = "auto"  # how the windows of repeated samples are decoded (passes.py); av only
    pipelines: int = pydantic.Field(default=1, ge=1, le=8)  # of DALI, side by side
    prefetch: int = pydantic.Field(default=2, ge=1)  # batches in flight ahead of the consumer
    cache: str | None = None  # a local folder for shards of remote datasets; None: one ranged read a clip
    cache_gb: float = pydantic.Field(default=100.0, gt=0)  # 10^9 bytes, of all processes that share the folder
    quarantine: str | None = None  # a file that bad clips are written to, and known from
    max_bad_fraction: float = pydantic.Field(default=0.01, ge=0, le=1)
    clip_timeout_s: float = pydantic.Field(default=60.0, gt=0)  # a worker that takes longer over one clip hangs
    device: str = "auto"  # "auto": cuda where there is one

    @pydantic.model_validator(mode="after")
    def _check(self) -> LoaderConfig:
        for name, size, patch in zip(
            ("frames", "size", "size"),
            (self.sample.frames, self.sample.size, self.sample.size),
            self.patch,
            strict=True,
        ):
            if patch < 1 or size % patch:
                raise ConfigError(
                    f"patch={self.patch}: sample.{name}={size} is no multiple of {patch}; change one of them"
                )
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
