"""The config of a model as JSON, as our files hold it."""

from __future__ import annotations

import dataclasses
import json

from reelmae.model.classifier import ClassifierConfig
from reelmae.model.config import MAEConfig, MotionConfig, ViTConfig

KINDS: dict[str, type[ViTConfig]] = {"mae": MAEConfig, "classifier": ClassifierConfig, "encoder": ViTConfig}


def config_to_json(config: ViTConfig) -> str:
    """The text that a checkpoint holds as `model_config`, and a safetensors file in its metadata."""
    kind = next(kind for kind, cls in KINDS.items() if type(config) is cls)
    return json.dumps({"kind": kind, "config": dataclasses.asdict(config)})


def config_from_json(text: str) -> ViTConfig:
    """The inverse. ValueError, TypeError or KeyError where the text is not a config of this version."""
    content = json.loads(text)
    kind, fields = KINDS[content["kind"]], dict(content["config"])
    for name in ("pixel_mean", "pixel_std"):
        if name in fields:
            fields[name] = tuple(fields[name])
    if fields.get("motion") is not None:
        fields["motion"] = MotionConfig(**fields["motion"])
    return kind(**fields)


def encoder_config(config: ViTConfig) -> ViTConfig:
    """The config of a model's encoder alone."""
    return ViTConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(ViTConfig)})
