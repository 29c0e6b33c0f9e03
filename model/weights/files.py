"""Checkpoint files, ours and those of other codes: read without running code from them, and written.

    torch zip  ─ weights_only=True, mapped ─┐                      ┌─ safetensors with the config: ours
    safetensors ────────────────────────────┴─ Checkpoint   model ─┴─ torch zip or safetensors in another code's layout

Properties that hold:
- A pickle that asks for any class is refused: only tensors and plain types are made. The one exception is argparse's
  Namespace, in which mae_st and VideoMAE keep their settings. An empty object replaces it.
- The content of a file decides what it is, not its name.
- A file of ours holds its config, so a model is built from it without further arguments.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from reelmae.model.config import ViTConfig
from reelmae.model.mae import MaskedAutoencoder
from reelmae.model.vit import Encoder
from reelmae.model.weights.configs import config_from_json, config_to_json, encoder_config
from reelmae.model.weights.layouts import State, detect, encoder_part, from_ours
from reelmae.model.weights.pixels import renormalise
from reelmae.model.weights.runs import FORMAT
from reelmae.pipeline.errors import WeightsError

KEYS = ("model_state", "model", "module")
"""Keys of a state dict in a file: of PySlowFast; of mae_st, VideoMAE and ours; of DeepSpeed."""

RUN_CONFIG = "model_config"
"""Key of the config in a checkpoint of a run: JSON text."""

METADATA = "reelmae"
"""Key of the config in the metadata of our safetensors files: the same JSON text."""

REMEDY = "save its state dict alone with torch.save(model.state_dict(), …) if you trust the file"
NAMESPACE = "argparse.Namespace"

LOAD_ERRORS = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    IndexError,
    OSError,
)
"""What torch.load raises on files that torch.save did not write, or that are damaged."""


@dataclass(frozen=True)
class Checkpoint:
    """The content of a file of weights."""

    state: State
    """Tensors under the names that they have in the file."""

    layout: str
    """One of `layouts.LAYOUTS`."""

    source: str
    """Path of the file, for messages."""

    config: ViTConfig | None = None
    """The model's config, which files of ours hold."""


class _Settings:
    """Replaces argparse.Namespace."""


# --- reading -----------------------------------------------------------------------------------------------------


def read_checkpoint(path: str | Path) -> Checkpoint:
    """The content of any file that `detect` knows, by torch.save or as safetensors. Tensors are mapped, not copied.

    WeightsError says what is wrong: the file is missing, a folder, cut short, not a checkpoint, empty, of an unknown
    layout, of another format of ours, or holds more than tensors and plain types.
    """
    path = Path(path)
    if path.is_dir():
        raise WeightsError(f"{path}: is a folder; give a checkpoint file in it")
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; check the path")
    if zipfile.is_zipfile(path):
        return _read_torch(path)
    if _looks_like_safetensors(path):
        return _read_safetensors(path)
    raise WeightsError(
        f"{path}: is neither a checkpoint of torch.save (1.6 or later) nor safetensors, or it was cut short; "
        "fetch it again"
    )


def _read_safetensors(path: Path) -> Checkpoint:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            text = (file.metadata() or {}).get(METADATA)
    except (safetensors.SafetensorError, OSError) as e:
        raise WeightsError(f"{path}: is not a whole safetensors file ({first_line(e)}); fetch it again") from e
    config = None if text is None else _parse_config(text, path)
    return _checkpoint(state, path, config)


def _looks_like_safetensors(path: Path) -> bool:
    """Whether it begins with eight bytes of length and a JSON object."""
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size


def _read_torch(path: Path) -> Checkpoint:
    try:
        with torch.serialization.safe_globals([(_Settings, NAMESPACE)]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except LOAD_ERRORS as e:
        classes = _classes_in(path)
        if classes:
            raise WeightsError(
                f"{path}: is not opened, because it needs more than tensors and plain types, and that may run any "
                f"code: {', '.join(classes)}; {REMEDY}"
            ) from e
        why = "its pickle cannot be read" if isinstance(e, pickle.UnpicklingError) else first_line(e)
        raise WeightsError(f"{path}: is not a checkpoint of torch.save, or damaged ({why})") from e
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, no state dict; {REMEDY}")
    _check_format(content, path)
    text = content.get(RUN_CONFIG)
    config = _parse_config(text, path) if isinstance(text, str) else None
    nested = [key for key in KEYS if isinstance(content.get(key), dict)]
    return _checkpoint(content[nested[0]] if nested else content, path, config)


def _check_format(content: dict[Any, Any], path: Path) -> None:
    """Refuse a run's checkpoint of another format. Files of other codes may have a key `format` of their own."""
    of_a_run = "format" in content and (RUN_CONFIG in content or "index_digest" in content)
    if of_a_run and str(content["format"]) != str(FORMAT):
        raise WeightsError(
            f"{path}: is a checkpoint of reelmae of format {content['format']}, and this version reads "
            f"format {FORMAT}; use the version of reelmae that wrote it"
        )


def _classes_in(path: Path) -> list[str]:
    """The classes that a checkpoint's pickle needs beyond plain types. Nothing of it is made."""
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except LOAD_ERRORS:
        return []
    return sorted(set(found) - {NAMESPACE})


def _checkpoint(state: Mapping[Any, Any], path: Path, config: ViTConfig | None) -> Checkpoint:
    """The Checkpoint of a state dict, after checks that each value is a dense tensor."""
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
        return Checkpoint(dict(state), detect(state), str(path), config)
    except WeightsError as e:
        raise WeightsError(f"{path}: {e}") from e


def _is_dense(value: Tensor) -> bool:
    return value.layout == torch.strided and not (value.is_meta or value.is_quantized)


def _parse_config(text: str, path: Path) -> ViTConfig:
    try:
        return config_from_json(text)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise WeightsError(f"{path}: its config is not of this version of reelmae ({first_line(e)})") from e


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its class; at most 160 characters."""
    return (str(error) or type(error).__name__).splitlines()[0][:160]


# --- writing -----------------------------------------------------------------------------------------------------


def save_safetensors(path: str | Path, model: nn.Module, *, encoder_only: bool = False) -> None:
    """Write a model of ours under our names, with its config. `load_model` needs nothing else."""
    state, config = _take(model, encoder_only)
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
    """Write a model of ours in the layout of another code, by torch.save or as safetensors.

    torch.save puts the tensors under the key that the other code reads; for timm there is no key.
    The written model takes pixels with that code's statistics (see `pixels.renormalise`). WeightsError where the layout
    has no place for the model (see `layouts.from_ours`).
    """
    state, config = _take(model, encoder_only or (layout == "timm" and isinstance(model, MaskedAutoencoder)))
    state = renormalise(state, config, layout)
    theirs = {name: value.contiguous() for name, value in from_ours(state, layout, config).items()}
    if as_safetensors:
        save_file(theirs, path, metadata={"format": "pt"})
    elif layout == "timm":
        torch.save(theirs, path)
    else:
        torch.save({"model_state" if layout.startswith("slowfast") else "model": theirs}, path)


def _take(model: nn.Module, encoder_only: bool) -> tuple[State, ViTConfig]:
    """The tensors to write, under our names, and their config."""
    config = model.config
    assert isinstance(config, ViTConfig)
    prefix = "encoder." if isinstance(model, Encoder) else ""
    state = {prefix + name: value.detach() for name, value in model.state_dict().items()}
    if not encoder_only and not prefix:
        return state, config
    return encoder_part(state), encoder_config(config)
