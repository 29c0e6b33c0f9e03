"""The configuration of a pretraining run. recipe.py makes one from a TOML recipe and `section.key=value` overrides.

Properties that hold:
- A section holds the config class of the part that uses it, so a knob and its default are declared once.
- What follows from something else is not a key: the loader's frames, size, patch and pixel statistics are the model's, the
  learning rate is `blr` × videos a step / 256.
- A config is frozen, and equal configs give equal runs: `difference` names what would change one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator, model_validator

from reelmae.model.config import OBJECTIVES, MAEConfig, Objective
from reelmae.pipeline.errors import ConfigError
from reelmae.pipeline.loading.config import LoaderConfig, LoaderOptions
from reelmae.pipeline.loading.order.draws import DEFAULT_FPS, SamplePolicy
from reelmae.train import checkpoint, recipe
from reelmae.train.data import DataConfig
from reelmae.train.loop import RunConfig
from reelmae.train.optim import OptimConfig

QUARANTINE = "bad_clips.jsonl"
# safe to change on resume, or meant to be (steps, epochs)
FREE_ON_RESUME = {
    "data.url",  # the dataset's own digest is compared instead
    "data.mix",  # the digest of a mix, with its weights, is compared instead
    "data.storage_options",  # how the dataset is reached, not what it is
    "data.patience",
    "loader.backend",
    "loader.decode",
    "loader.workers",
    "loader.pipelines",
    "loader.prefetch",
    "loader.cache",
    "loader.cache_gb",
    "loader.max_bad_fraction",
    "loader.clip_timeout_s",
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
# The fields of MAEConfig, each of which may be left out. Any: mypy does not follow classes made at run time.
_OPTIONAL: dict[str, Any] = {name: (hint | None, None) for name, hint in get_type_hints(MAEConfig).items()}
_MAEFields: Any = create_model("_MAEFields", __config__=ConfigDict(frozen=True, extra="forbid"), **_OPTIONAL)


class ModelOptions(_MAEFields):
    """An objective, a size, and any field of MAEConfig that is to differ from what the two give."""

    objective: Objective = "mae"
    """What the model learns by: MAE-ST, MAE-ST as its published weights were trained, VideoMAE or MotionMAE."""
    preset: str = "B"
    """T, S, B, L or H."""

    def mae(self) -> MAEConfig:
        """The model's config; ConfigError where the sizes do not fit."""
        changes = {k: v for k, v in dict(self).items() if v is not None and k not in ("objective", "preset")}
        if "motion" in changes and self.objective != "motion":
            raise ConfigError(f"model.motion: is of model.objective=motion, not of {self.objective}")
        try:
            return OBJECTIVES[self.objective](self.preset, **changes)
        except ValueError as e:
            raise ConfigError(f"model.{e}") from e


class PretrainConfig(BaseModel):
    """A whole pretraining run."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)  # an input may be a secret
    # pairs of keys of which one replaces the other (recipe.py)
    EXCLUSIVE: ClassVar = (("run.steps", "run.epochs"), ("loader.sample.stride", "loader.sample.fps"))

    data: DataConfig
    loader: LoaderOptions = Field(default=LoaderOptions(), validate_default=True)
    model: ModelOptions = Field(default_factory=ModelOptions)
    optim: OptimConfig = OptimConfig()
    run: RunConfig

    @field_validator("loader")
    @classmethod
    def _write_out_rate(cls, loader: LoaderOptions) -> LoaderOptions:
        """Neither stride nor fps means DEFAULT_FPS. Written out, so that a checkpoint says it and configs compare equal."""
        if isinstance(loader, LoaderConfig):
            raise ConfigError("loader: give LoaderOptions; what LoaderConfig adds follows from the model and the run")
        if loader.sample.stride is not None or loader.sample.fps is not None:
            return loader
        return loader.model_copy(update={"sample": replace(loader.sample, fps=DEFAULT_FPS)})

    @model_validator(mode="after")
    def _check(self) -> PretrainConfig:
        if self.loader.mask.ratio == 0:
            raise ConfigError("loader.mask.ratio=0: leaves nothing to predict; give more than 0 and less than 1")
        return self

    def loader_config(self) -> LoaderConfig:
        """The loader's config: its section, and what follows from the model and the run."""
        mae = self.model.mae()
        try:
            return LoaderConfig(
                **{
                    **dict(self.loader),
                    "sample": SamplePolicy(frames=mae.frames, size=mae.size, **asdict(self.loader.sample)),
                    "patch": (mae.t_patch, mae.patch, mae.patch),
                    "pixel_mean": mae.pixel_mean,
                    "pixel_std": mae.pixel_std,
                    "seed": self.run.seed,
                    "quarantine": str(Path(self.run.out) / QUARANTINE),
                    "device": str(self.run.torch_device()),
                }
            )
        except ValidationError as e:
            raise recipe.explain(e, "loader.") from e

    def lr(self) -> float:
        """The peak learning rate; repeats are not counted."""
        return self.optim.blr * self.loader.batch_videos / 256


def load_recipe(recipe_name: str | None, overrides: Sequence[str] = ()) -> PretrainConfig:
    """The config of a pretraining recipe with overrides.

    `recipe_name`: a path, or a name in recipes/ such as demo; None: the defaults. An override is `section.key=value` in TOML;
    quotes around text may be left out. Setting one of two keys that exclude each other (run.steps and run.epochs,
    loader.sample.stride and .fps) drops the recipe's other one. ConfigError names the key or value and the remedy.

        load_recipe("demo", ["data.url=shards", "run.out=runs/a", "optim.blr=1e-3"])
    """
    config = recipe.load(PretrainConfig, recipe_name, overrides)
    config.loader_config()  # sizes that do not fit are refused now, not when model and loader are built
    return config


def from_json(text: str) -> PretrainConfig:
    """The config that `model_dump_json` wrote, by this version or an earlier one.

    A key without value (null) has its default: earlier versions wrote null for what was not given.
    """
    return PretrainConfig.model_validate_json(json.dumps(_drop_nulls(json.loads(text))))


def load_config(path: str | Path) -> PretrainConfig:
    """The config of the run that wrote this checkpoint; InputError where the file is not a checkpoint of ours."""
    return from_json(checkpoint.load(path, mmap=True)["config"])


def difference(new: PretrainConfig, old: PretrainConfig) -> list[str]:
    """What would make a resumed run another run: `key=new (was old)`, without the keys that are free."""
    a, b = dict(recipe.leaves(new.model_dump())), dict(recipe.leaves(old.model_dump()))
    # a section that one of the two lacks is one key there, and several here
    keys = [k for k in {**a, **b} if k not in FREE_ON_RESUME and a.get(k) != b.get(k)]
    if new.model.mae() == old.model.mae():  # a default that is written out builds the same model
        keys = [k for k in keys if not k.startswith("model.")]
    return [f"{k}={a.get(k)} (was {b.get(k)})" for k in keys]


def _drop_nulls(tree: dict[str, Any]) -> dict[str, Any]:
    return {k: _drop_nulls(v) if isinstance(v, dict) else v for k, v in tree.items() if v is not None}
