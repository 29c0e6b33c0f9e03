"""The configuration of a pretraining run: a TOML recipe plus `section.key=value` overrides.

Properties that hold:
- A key that does not exist is refused with the nearest one that does; a value out of range is named.
- What follows from something else is not a key: the loader's frames, size and patch are the model's, the
  learning rate is `blr` × videos a step / 256.
- A config is frozen, and equal configs give equal runs: `difference` names what would change one.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from reelmae.model.config import (
    OBJECTIVES,
    DecoderCls,
    MAEConfig,
    MotionConfig,
    PositionInit,
    Positions,
    TargetNorm,
)
from reelmae.pipeline.devices import resolve_device
from reelmae.pipeline.errors import ConfigError
from reelmae.pipeline.loading.config import LoaderConfig
from reelmae.pipeline.loading.decode.passes import DecodePolicy
from reelmae.pipeline.loading.order.draws import SamplePolicy
from reelmae.pipeline.loading.order.masks import DecoderMaskPolicy, MaskPolicy
from reelmae.train.data import DataSection

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "float32", "bf16"]
Schedule = Literal["after_warmup", "from_start", "videomae"]
DecayRule = Literal["mae_st", "mae_st_bias_wd", "mae_st_finetune", "slowfast", "videomae"]
QUARANTINE = "bad_clips.jsonl"
RECIPES = Path(__file__).parent / "recipes"
# keys whose change leaves what a step computes the same, or is the point of going on
FREE_ON_RESUME = {
    "data.url",  # the dataset's own digest is compared instead
    "data.mix",  # and that of a mix, weights and all
    "loader.backend",
    "loader.decode",
    "loader.workers",
    "loader.pipelines",
    "loader.prefetch",
    "loader.cache",
    "loader.cache_gb",
    "loader.max_bad_fraction",
    "run.out",
    "run.steps",
    "run.epochs",
    "run.device",
    "run.threads",
    "run.compile",
    "run.checkpointing",
    "run.log_every",
    "run.checkpoint_every",
}


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SampleSection(_Section):
    """How a training clip is cut out of a stored one; exactly one of `stride` and `fps`."""

    stride: int | None = Field(None, ge=1)  # stored frames from one sampled frame to the next
    fps: float | None = Field(None, gt=0)  # sampled frames a second
    scale: tuple[float, float] = (0.5, 1.0)  # crop's share of the stored area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # crop's width / height
    flip: bool = True

    @model_validator(mode="after")
    def _one_rate(self) -> SampleSection:
        if (self.stride is None) == (self.fps is None):
            raise ValueError(f"stride={self.stride}, fps={self.fps}: give exactly one of the two")
        return self


class MaskSection(_Section):
    """Which tokens are removed."""

    kind: Literal["random", "tube", "frame", "block"] = "random"
    ratio: float = Field(0.9, gt=0, lt=1)


class DecoderMaskSection(_Section):
    """Which tokens are not predicted (VideoMAE V2): none, or a share of each cell of 2×2 places that runs over time."""

    kind: Literal["none", "cells"] = "none"
    ratio: float = 0.5


class LoaderSection(_Section):
    """How batches are made; a batch has `batch_videos` × `repeats` clips."""

    backend: Literal["auto", "av", "dali-cpu", "dali-gpu"] = "auto"
    batch_videos: int = Field(32, ge=1)
    repeats: int = Field(4, ge=1)
    sample: SampleSection = SampleSection(fps=7.5)
    mask: MaskSection = MaskSection()
    decoder_mask: DecoderMaskSection = DecoderMaskSection()
    lanes: int = Field(64, ge=1)
    decode: DecodePolicy = "auto"
    workers: int | None = Field(None, ge=0)
    pipelines: int = Field(1, ge=1)
    prefetch: int | None = Field(None, ge=1)
    cache: str | None = None
    cache_gb: float = Field(100.0, gt=0)
    max_bad_fraction: float = Field(0.01, ge=0, le=1)


class MotionSection(_Section):
    """What differs from MotionConfig's defaults."""

    decoders: Literal["separate", "shared"] | None = None
    gap: int | None = None
    sign: Literal["signed", "absolute"] | None = None
    norm: Literal["patch", "none"] | None = None
    weight: float | None = None


class ModelSection(_Section):
    """An objective and a size, T | S | B | L | H, and what differs from them; the fields are those of MAEConfig."""

    objective: Literal["mae", "slowfast", "videomae", "motion"] = "mae"
    preset: str = "B"
    frames: int | None = None
    size: int | None = None
    patch: int | None = None
    t_patch: int | None = None
    dim: int | None = None
    depth: int | None = None
    heads: int | None = None
    mlp_ratio: float | None = None
    cls_token: bool | None = None
    pos: Positions | None = None
    qkv_bias: Literal["qkv", "qv"] | None = None
    pos_init: PositionInit | None = None
    encoder: Literal["sparse", "dense"] | None = None
    decoder_dim: int | None = None
    decoder_depth: int | None = None
    decoder_heads: int | None = None
    decoder_pos: Positions | None = None
    decoder_cls: DecoderCls | None = None
    embed_bias: bool | None = None
    target: Literal["pixels", "hog"] | None = None
    target_norm: TargetNorm | None = None
    target_frames: Literal["linspace", "stride"] | None = None
    pred_t_dim: int | None = None
    unit_pixels: bool | None = None
    motion: MotionSection | None = None

    def mae(self) -> MAEConfig:
        """The model's config; ConfigError where the sizes do not fit."""
        changes = _given(self, "objective", "preset", "motion")
        if self.motion is not None and self.objective != "motion":
            raise ConfigError(f"model.motion: is of model.objective=motion, not of {self.objective}")
        try:
            if self.motion is not None:
                changes["motion"] = MotionConfig(**_given(self.motion))
            return OBJECTIVES[self.objective](self.preset, **changes)
        except ValueError as e:
            raise ConfigError(f"model.{e}") from e


def _given(section: _Section, *without: str) -> dict[str, Any]:
    return {k: v for k, v in dict(section).items() if v is not None and k not in without}


class OptimSection(_Section):
    """AdamW with warm-up and cosine, a rate for each step."""

    blr: float = Field(1.6e-3, gt=0)  # rate for 256 videos a step
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.05, ge=0)
    decay: DecayRule = "mae_st"  # which parameters are spared from it (train/optim.py)
    schedule: Schedule = "after_warmup"  # where the cosine begins (train/optim.py)
    warmup: float = Field(0.15, ge=0, lt=1)  # share of all steps
    start_lr: float = Field(0.0, ge=0)  # where the warm-up begins
    min_lr: float = Field(0.0, ge=0)
    clip_grad: float = Field(0.02, ge=0)  # largest norm of the gradient; 0 = no clipping


class RunSection(_Section):
    """Where the run writes, how long it goes on, and on what; exactly one of `steps` and `epochs`."""

    out: str
    init: str | None = None  # weights to begin from: a checkpoint, of reelmae or another's layout (model/weights)
    init_allow: tuple[str, ...] = ()  # patterns of what of them may be left, and of what of the model may stay as it is
    steps: int | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0)
    seed: int = Field(0, ge=0)
    device: Device = "auto"
    precision: Precision = "auto"  # auto: bf16 on CUDA, float32 on CPU
    compile: bool = False
    checkpointing: bool = False  # activations are computed again in backward: less memory, about a third more time
    threads: int | None = Field(None, ge=1)  # of torch on CPU; None = torch's own choice
    log_every: int = Field(10, ge=1)
    checkpoint_every: int = Field(500, ge=1)

    @model_validator(mode="after")
    def _one_length(self) -> RunSection:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"steps={self.steps}, epochs={self.epochs}: give exactly one of the two")
        if "://" in self.out:
            raise ValueError(f"out={self.out}: a run writes to a local folder; give a path")
        return self

    def torch_device(self) -> torch.device:
        """The device to train on; ConfigError where there is none."""
        return resolve_device(self.device)

    def autocast_dtype(self) -> torch.dtype | None:
        """bfloat16 where the forward pass runs in it, else None."""
        return autocast_dtype(self.precision, self.torch_device())


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """bfloat16 where a forward pass is to run in it, else None; auto = on CUDA."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else None
    return torch.bfloat16 if precision == "bf16" else None


class PretrainConfig(_Section):
    """A whole pretraining run."""

    data: DataSection
    loader: LoaderSection = LoaderSection()
    model: ModelSection = ModelSection()
    optim: OptimSection = OptimSection()
    run: RunSection

    def loader_config(self) -> LoaderConfig:
        """The loader's config: this section with what follows from model and run."""
        mae = self.model.mae()
        values = _given(self.loader, "sample", "mask", "decoder_mask")
        try:
            return LoaderConfig(
                **values,
                sample=SamplePolicy(frames=mae.frames, size=mae.size, **dict(self.loader.sample)),
                mask=MaskPolicy(**dict(self.loader.mask)),
                decoder_mask=DecoderMaskPolicy(**dict(self.loader.decoder_mask)),
                patch=(mae.t_patch, mae.patch, mae.patch),
                seed=self.run.seed,
                quarantine=str(Path(self.run.out) / QUARANTINE),
                device=str(self.run.torch_device()),
            )
        except ConfigError as e:
            raise ConfigError(f"loader.{e}") from e
        except ValidationError as e:
            raise _told(e, "loader.") from e

    def lr(self) -> float:
        """The peak learning rate; repeats are not counted."""
        return self.optim.blr * self.loader.batch_videos / 256


def load(recipe: str | None, overrides: Sequence[str] = ()) -> PretrainConfig:
    """The config of a recipe (a path, or a name in recipes/; None = defaults) with `section.key=value` overrides.

    Values are TOML; quotes around text may be left out. Setting one of two keys that exclude each other
    (run.steps and run.epochs, loader.sample.stride and .fps) drops the recipe's other one.
    ConfigError names the key or value and the remedy.
    """
    tree = _read(recipe) if recipe is not None else {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"{override}: is no override; write section.key=value, such as run.steps=1000")
        _check_key(key, "override")
        _set(tree, key, _value(key, value))
    return _validated(tree)


def from_json(text: str) -> PretrainConfig:
    """The config that `model_dump_json` wrote."""
    return PretrainConfig.model_validate_json(text)


def difference(new: PretrainConfig, old: PretrainConfig) -> list[str]:
    """What would make a resumed run another run: `key=new (was old)`, without the keys that are free."""
    a, b = dict(_leaves(new.model_dump())), dict(_leaves(old.model_dump()))
    # a section that one of them lacks is one key there, and several here
    keys = [k for k in {**a, **b} if k not in FREE_ON_RESUME and a.get(k) != b.get(k)]
    return [f"{k}={a.get(k)} (was {b.get(k)})" for k in keys]


def _read(recipe: str) -> dict[str, Any]:
    named = RECIPES / f"{recipe}.toml"
    path = named if named.is_file() else Path(recipe)
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
        raise ConfigError(f"{recipe}: no such recipe; give the path of a TOML file, or one of {names}")
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: is no valid TOML: {e}") from e
    for key, _ in _leaves(tree):
        _check_key(key, str(path))
    return tree


def _check_key(key: str, where: str) -> None:
    valid = list(_keys(PretrainConfig))
    if key not in valid:
        last = {k.rpartition(".")[2]: k for k in valid}  # a key without its section is a likely slip
        near = difflib.get_close_matches(key, valid, 1, 0.6) or [
            last[n] for n in difflib.get_close_matches(key.rpartition(".")[2], last, 1, 0.6)
        ]
        hint = f"did you mean {near[0]}?" if near else f"sections: {', '.join(PretrainConfig.model_fields)}"
        raise ConfigError(f"{key}: no such key ({where}); {hint}")


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        kinds = [field.annotation]
        if get_origin(field.annotation) in (Union, UnionType):  # a section that may be missing
            kinds += get_args(field.annotation)
        section = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        if section is None:
            yield prefix + name
        else:
            yield from _keys(section, f"{prefix}{name}.")


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _value(key: str, text: str) -> Any:
    """A TOML value, or the text itself where a key is text or the text is no TOML."""
    if key in (
        "data.url",
        "data.where",
        "data.keys",
        "loader.cache",
        "run.out",
        "run.init",
    ) and not text.startswith(('"', "'")):
        return text  # a folder named 2024 is no number
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[name] = value
    rivals = {"steps": "epochs", "epochs": "steps", "stride": "fps", "fps": "stride"}
    if name in rivals:
        tree.pop(rivals[name], None)


def _validated(tree: dict[str, Any]) -> PretrainConfig:
    try:
        config = PretrainConfig.model_validate(tree)
    except ValidationError as e:
        raise _told(e) from e
    config.loader_config()  # sizes that do not fit are told now, not when model and loader are built
    return config


def _told(e: ValidationError, prefix: str = "") -> ConfigError:
    """The first of pydantic's complaints in one line: key, value, what is wanted."""
    error = e.errors()[0]
    key = prefix + ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return ConfigError(f"{key}: is not given; add {key}=VALUE")
    if error["type"] == "value_error":  # our own message names the value
        return ConfigError(f"{key.rstrip('.')}.{error['ctx']['error']}")
    return ConfigError(f"{key}={error['input']}: {error['msg'].lower()}")
