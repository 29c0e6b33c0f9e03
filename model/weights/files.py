"""Checkpoint files: others' and ours, read without ever running what they hold, and written.

    torch zip  ─ weights_only=True, mapped ─┐                   ┌─ safetensors with the config: ours
    safetensors ────────────────────────────┴─ Foreign ─ model ─┴─ torch zip in another's layout and under its key

Properties that hold:
- A pickle that asks for any class is refused: only tensors and plain types are made. The one exception is argparse's
  Namespace, in which mae_st and VideoMAE keep their settings: an empty object stands for it, and it is not looked at.
- What a file is, is told by its content, not by its name.
- A file of ours holds its config; a model is built from it without being told anything.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from reelmae.model.classifier import Classifier, ClassifierConfig
from reelmae.model.config import MAEConfig, MotionConfig, ViTConfig
from reelmae.model.mae import MaskedAutoencoder
from reelmae.model.vit import Encoder
from reelmae.model.weights.infer import infer_config
from reelmae.model.weights.interpolate import GridTHW
from reelmae.model.weights.layouts import State, WeightsError, detect, encoder_part, from_ours, translate
from reelmae.model.weights.pixels import refed
from reelmae.model.weights.place import ImportReport, load_into

KEYS = (
    "model_state",
    "model",
    "module",
)  # under which PySlowFast; mae_st, VideoMAE, we; and DeepSpeed keep a model
RUN_CONFIG = "model_config"  # in a checkpoint of a run of ours: the same JSON
METADATA = "reelmae"  # in the metadata of our safetensors files: the config as JSON
KINDS: dict[str, type[ViTConfig]] = {"mae": MAEConfig, "classifier": ClassifierConfig, "encoder": ViTConfig}
REMEDY = "save its state dict alone with torch.save(model.state_dict(), …) where you trust it"

NAMESPACE = "argparse.Namespace"
# what torch.load makes of files that are not its own
NO_CHECKPOINT = (
    pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, KeyError, AttributeError, IndexError, OSError
)  # fmt: skip


@dataclass(frozen=True)
class Foreign:
    """A checkpoint as it lies on disk: tensors under their own names. `config` is there in files of ours."""

    state: State
    layout: str
    source: str
    config: ViTConfig | None = None


class _Settings:
    """Stands for argparse.Namespace."""


# --- reading -----------------------------------------------------------------------------------------------------


def read_checkpoint(path: str | Path) -> Foreign:
    """Any checkpoint that `detect` knows, from torch.save or as safetensors; tensors are mapped, not copied.

    WeightsError says what is wrong with another file: missing, a folder, cut short, no checkpoint, one that needs more than
    plain types, empty, of no known layout.
    """
    path = Path(path)
    if path.is_dir():
        raise WeightsError(f"{path}: is a folder; give a checkpoint file in it")
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; check the path")
    if zipfile.is_zipfile(path):
        return _from_torch(path)
    if _looks_like_safetensors(path):
        return load_safetensors(path)
    raise WeightsError(
        f"{path}: is neither a checkpoint of torch.save (1.6 or later) nor safetensors, or it was cut short; fetch it again"
    )


def load_safetensors(path: str | Path) -> Foreign:
    """A safetensors file, ours or another's."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            text = (file.metadata() or {}).get(METADATA)
    except (safetensors.SafetensorError, OSError) as e:
        raise WeightsError(f"{path}: is no whole safetensors file ({_line(e)}); fetch it again") from e
    config = None if text is None else _config(text, path)
    return _foreign(state, path, config)


def _looks_like_safetensors(path: Path) -> bool:
    """Eight bytes of length, then a JSON object."""
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size


def _from_torch(path: Path) -> Foreign:
    try:
        with torch.serialization.safe_globals([(_Settings, NAMESPACE)]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except NO_CHECKPOINT as e:
        wanted = _classes_in(path)
        if wanted:
            raise WeightsError(
                f"{path}: is not opened, since it asks for more than tensors and plain types, and that may run any "
                f"code: {', '.join(wanted)}; {REMEDY}"
            ) from e
        why = "its pickle cannot be read" if isinstance(e, pickle.UnpicklingError) else _line(e)
        raise WeightsError(f"{path}: is no checkpoint of torch.save, or damaged ({why})") from e
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, no state dict; {REMEDY}")
    text = content.get(RUN_CONFIG)
    config = _config(text, path) if isinstance(text, str) else None
    nested = [key for key in KEYS if isinstance(content.get(key), dict)]
    return _foreign(content[nested[0]] if nested else content, path, config)


def _classes_in(path: Path) -> list[str]:
    """What a checkpoint's pickle asks for beyond plain types, read without making any of it."""
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except NO_CHECKPOINT:
        return []
    return sorted(set(found) - {NAMESPACE})


def _foreign(state: Mapping[Any, Any], path: str | Path, config: ViTConfig | None) -> Foreign:
    odd = [name for name, value in state.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if odd:
        raise WeightsError(
            f"{path}: no tensor at {', '.join(map(str, odd[:3]))}; a state dict is "
            f"looked for under {', '.join(KEYS)} or at the top"
        )
    odd = [name for name, value in state.items() if not _is_dense(value)]
    if odd:
        raise WeightsError(
            f"{path}: sparse, quantized or without values: {', '.join(odd[:3])}; save plain dense tensors"
        )
    try:
        return Foreign(dict(state), detect(state), str(path), config)
    except WeightsError as e:
        raise WeightsError(f"{path}: {e}") from e


def _is_dense(value: Tensor) -> bool:
    return value.layout == torch.strided and not (value.is_meta or value.is_quantized)


def _line(error: BaseException) -> str:
    """The first sentence of an error that may be a page."""
    return (str(error) or type(error).__name__).splitlines()[0][:160]


# --- configs -----------------------------------------------------------------------------------------------------


def config_to_json(config: ViTConfig) -> str:
    """A config as the text that our files hold."""
    kind = next(kind for kind, cls in KINDS.items() if type(config) is cls)
    return json.dumps({"kind": kind, "config": dataclasses.asdict(config)})


def config_from_json(text: str) -> ViTConfig:
    """The inverse; ValueError, TypeError or KeyError names what is not of a config."""
    content = json.loads(text)
    kind, fields = KINDS[content["kind"]], dict(content["config"])
    for name in ("pixel_mean", "pixel_std"):
        if name in fields:
            fields[name] = tuple(fields[name])
    if fields.get("motion") is not None:
        fields["motion"] = MotionConfig(**fields["motion"])
    return kind(**fields)


def _config(text: str, path: str | Path) -> ViTConfig:
    try:
        return config_from_json(text)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise WeightsError(f"{path}: its config is not of this version of reelmae ({_line(e)})") from e


# --- models ------------------------------------------------------------------------------------------------------


def build(config: ViTConfig, *, norm: bool = True) -> nn.Module:
    """The model of a config, with initial weights. `norm`: whether an encoder alone ends with one."""
    if isinstance(config, MAEConfig):
        return MaskedAutoencoder(config)
    if isinstance(config, ClassifierConfig):
        return Classifier(config)
    return Encoder(config, norm=norm)


def load_model(
    path: str | Path,
    *,
    allow: Sequence[str] = (),
    grid: GridTHW | None = None,
    encoder_only: bool = False,
    **hints: Any,
) -> nn.Module:
    """The model of any readable file, in eval mode: MaskedAutoencoder, Classifier, or Encoder where there is no more.

    `hints`: fields of its config that no shape tells (see `infer_config`), or others than the file's: with `frames` or
    `size` positions are resized. `allow`, `grid`: see `load_into`. `encoder_only`: an Encoder is built; the file's decoder or
    head is neither read nor checked, but left.
    """
    model, _ = load(read_checkpoint(path), allow=allow, grid=grid, encoder_only=encoder_only, **hints)
    return model.eval()


def load(
    foreign: Foreign,
    *,
    allow: Sequence[str] = (),
    grid: GridTHW | None = None,
    encoder_only: bool = False,
    **hints: Any,
) -> tuple[nn.Module, ImportReport]:
    """The model of a checkpoint, and what became of the checkpoint's tensors; see `load_model`."""
    try:
        part = _encoder_of(foreign) if encoder_only else foreign
        model = build(config_of(part, **hints), norm=ends_with_norm(part))
        report = load_into(model, part.state, part.layout, allow=allow, grid=_grid(part, grid))
    except WeightsError as e:
        raise WeightsError(f"{foreign.source}: {e}") from e
    left = [name for name in foreign.state if name not in part.state or name in report.left]
    return model, dataclasses.replace(report, left=left)


def _encoder_of(foreign: Foreign) -> Foreign:
    """Without what has its place elsewhere in a model; what has none at all stays, to be told."""
    translated = translate(foreign.state, foreign.layout)
    others = translated.sources.keys() - encoder_part(translated.state).keys()
    left = {theirs for ours in others for theirs in translated.sources[ours]}
    state = {name: value for name, value in foreign.state.items() if name not in left}
    return dataclasses.replace(foreign, state=state, config=foreign.config and encoder_config(foreign.config))


def _grid(foreign: Foreign, given: GridTHW | None) -> GridTHW | None:
    """The grid of a checkpoint's joint tables: what its config says, or else the caller."""
    own = foreign.config.grid_THW if foreign.config is not None else None
    if given is None:
        return own
    if own not in (None, tuple(given)):
        raise WeightsError(f"grid={list(given)}: the file's config says {list(own or ())}; give that, or none")
    if not any(".pos." in name for name in translate(foreign.state, foreign.layout).state):
        raise WeightsError(f"grid={list(given)}: the file has no table of positions; give frames and size alone")
    return given


def config_of(foreign: Foreign, **hints: Any) -> ViTConfig:
    """What the file says of itself, or its shapes, with `hints` before both."""
    try:
        if foreign.config is None:
            return infer_config(foreign.state, foreign.layout, **hints)
        return _replaced(foreign.config, hints)
    except WeightsError:
        raise
    except (ValueError, TypeError) as e:
        raise WeightsError(_line(e)) from e


def encoder_config(config: ViTConfig) -> ViTConfig:
    """Of a model's encoder alone."""
    return ViTConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(ViTConfig)})


def _replaced(config: ViTConfig, hints: dict[str, Any]) -> ViTConfig:
    """With other fields; as many frames of each tube are predicted as before."""
    if isinstance(config, MAEConfig) and config.pred_t_dim is not None and "frames" in hints:
        tubes = hints["frames"] // hints.get("t_patch", config.t_patch)
        hints = {"pred_t_dim": config.target_t_patch * tubes, **hints}
    return dataclasses.replace(config, **hints)


def ends_with_norm(foreign: Foreign) -> bool:
    """Whether the encoder of a file ends with a LayerNorm; one that was fine-tuned does not."""
    return "encoder.norm.weight" in translate(foreign.state, foreign.layout).state


# --- writing -----------------------------------------------------------------------------------------------------


def save_safetensors(path: str | Path, model: nn.Module, *, encoder_only: bool = False) -> None:
    """A model of ours under its own names and with its config, so that `load_model` needs no more."""
    state, config = _part(model, encoder_only)
    tensors = {name: value.contiguous() for name, value in state.items()}
    save_file(tensors, path, metadata={METADATA: config_to_json(config)})  # one key: their order is random


def save_as(
    path: str | Path,
    model: nn.Module,
    layout: str,
    *,
    encoder_only: bool = False,
    as_safetensors: bool = False,
) -> None:
    """A model of ours in another's layout: as torch.save writes it, under the key that its code reads (none for timm), or as
    safetensors. It takes pixels as that code feeds them (see `pixels.refed`). WeightsError where the layout has no place for
    it (see `from_ours`)."""
    state, config = _part(model, encoder_only or (layout == "timm" and isinstance(model, MaskedAutoencoder)))
    state = refed(state, config, layout)
    theirs = {name: value.contiguous() for name, value in from_ours(state, layout, config).items()}
    if as_safetensors:
        save_file(theirs, path, metadata={"format": "pt"})
    elif layout == "timm":
        torch.save(theirs, path)
    else:
        torch.save({"model_state" if layout.startswith("slowfast") else "model": theirs}, path)


def _part(model: nn.Module, encoder_only: bool) -> tuple[State, ViTConfig]:
    config = model.config
    assert isinstance(config, ViTConfig)
    prefix = "encoder." if isinstance(model, Encoder) else ""
    state = {prefix + name: value.detach() for name, value in model.state_dict().items()}
    if not encoder_only and not prefix:
        return state, config
    return encoder_part(state), encoder_config(config)
