"""Models from checkpoints: one entrance for runs, their checkpoints, our exports and the files of other codes.

load_model:  find_checkpoint ─ read_checkpoint ─ load        load:  config_of ─ build ─ load_into
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from reelmae.model.classifier import Classifier, ClassifierConfig
from reelmae.model.config import MAEConfig, ViTConfig
from reelmae.model.mae import MaskedAutoencoder
from reelmae.model.vit import Encoder
from reelmae.model.weights.configs import encoder_config
from reelmae.model.weights.files import Checkpoint, first_line, read_checkpoint
from reelmae.model.weights.infer import infer_config
from reelmae.model.weights.interpolate import GridTHW
from reelmae.model.weights.layouts import encoder_part, translate
from reelmae.model.weights.place import ImportReport, load_into
from reelmae.model.weights.runs import find_checkpoint
from reelmae.pipeline.errors import WeightsError

Model = MaskedAutoencoder | Classifier | Encoder


def load_model(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    allow: Sequence[str] = (),
    grid: GridTHW | None = None,
    encoder_only: bool = False,
    **hints: Any,
) -> Model:
    """The model of a run's folder (its newest checkpoint), of a checkpoint, or of exported weights.

    It is in eval mode on `device`: a MaskedAutoencoder, a Classifier, or an Encoder where the file holds only that.
    Files of other codes are read too: mae_st, PySlowFast, VideoMAE and timm.

    `encoder_only`: builds the Encoder and ignores the file's decoder or head.
    `hints`: fields of the config. They replace the file's, or add what shapes do not determine (see `infer_config`).
    With another `frames` or `size`, tables of positions are resized.
    `allow`, `grid`: see `load_into`.

    WeightsError (an InputError) names what cannot be read or does not fit.

        model = load_model("runs/vit_b")
        encoder = load_model("vit_l.safetensors", encoder_only=True, device="cuda")
        model = load_model("mae_st.pth", frames=32)
    """
    checkpoint = read_checkpoint(find_checkpoint(path))
    model, _ = load(checkpoint, allow=allow, grid=grid, encoder_only=encoder_only, **hints)
    return model.to(device).eval()


def load(
    checkpoint: Checkpoint,
    *,
    allow: Sequence[str] = (),
    grid: GridTHW | None = None,
    encoder_only: bool = False,
    **hints: Any,
) -> tuple[Model, ImportReport]:
    """The model of a checkpoint, and a report of the checkpoint's tensors. Arguments as in `load_model`."""
    try:
        part = _encoder_of(checkpoint) if encoder_only else checkpoint
        model = build(config_of(part, **hints), norm=ends_with_norm(part))
        report = load_into(model, part.state, part.layout, allow=allow, grid=_grid(part, grid))
    except WeightsError as e:
        raise WeightsError(f"{checkpoint.source}: {e}") from e
    left = [name for name in checkpoint.state if name not in part.state or name in report.left]
    return model, dataclasses.replace(report, left=left)


def build(config: ViTConfig, *, norm: bool = True) -> Model:
    """The model of a config, with initial weights. `norm`: whether a bare encoder ends with a LayerNorm."""
    if isinstance(config, MAEConfig):
        return MaskedAutoencoder(config)
    if isinstance(config, ClassifierConfig):
        return Classifier(config)
    return Encoder(config, norm=norm)


def config_of(checkpoint: Checkpoint, **hints: Any) -> ViTConfig:
    """The config in the file, or else the one inferred from its shapes. `hints` replace fields of it."""
    try:
        if checkpoint.config is None:
            return infer_config(checkpoint.state, checkpoint.layout, **hints)
        return _replace_fields(checkpoint.config, hints)
    except WeightsError:
        raise
    except (ValueError, TypeError) as e:
        raise WeightsError(first_line(e)) from e


def ends_with_norm(checkpoint: Checkpoint) -> bool:
    """Whether the file's encoder ends with a LayerNorm. That of a fine-tuned model does not."""
    return "encoder.norm.weight" in translate(checkpoint.state, checkpoint.layout).state


def _encoder_of(checkpoint: Checkpoint) -> Checkpoint:
    """Without the tensors that belong elsewhere in a model. Unknown tensors stay, so that `load_into` names them."""
    translated = translate(checkpoint.state, checkpoint.layout)
    others = translated.sources.keys() - encoder_part(translated.state).keys()
    left = {theirs for ours in others for theirs in translated.sources[ours]}
    state = {name: value for name, value in checkpoint.state.items() if name not in left}
    return dataclasses.replace(checkpoint, state=state, config=checkpoint.config and encoder_config(checkpoint.config))


def _grid(checkpoint: Checkpoint, given: GridTHW | None) -> GridTHW | None:
    """The grid of a checkpoint's joint tables of positions: from its config, or else from the caller."""
    own = checkpoint.config.grid_THW if checkpoint.config is not None else None
    if given is None:
        return own
    if own not in (None, tuple(given)):
        raise WeightsError(f"grid={list(given)}: the file's config says {list(own or ())}; give that, or none")
    if not any(".pos." in name for name in translate(checkpoint.state, checkpoint.layout).state):
        raise WeightsError(f"grid={list(given)}: the file has no table of positions; give frames and size alone")
    return given


def _replace_fields(config: ViTConfig, hints: dict[str, Any]) -> ViTConfig:
    """The config with other fields. As many frames of each tube are predicted as before."""
    if isinstance(config, MAEConfig) and config.pred_t_dim is not None and "frames" in hints:
        tubes = hints["frames"] // hints.get("t_patch", config.t_patch)
        hints = {"pred_t_dim": config.target_t_patch * tubes, **hints}
    return dataclasses.replace(config, **hints)
