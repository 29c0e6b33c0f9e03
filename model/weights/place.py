"""Put a checkpoint's tensors into a model of ours, all of them or none.

Legend: D width, L tokens, T' H' W' their grid.

Properties that hold:
- Every key of the file and every tensor of the model is placed, resized, or left as a pattern of the caller allows.
- Otherwise the model does not change, and the error names every key and tensor at fault.
- Only tables of positions are resized, and only for another grid of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from reelmae.model.classifier import ClassifierConfig
from reelmae.model.config import ViTConfig
from reelmae.model.vit import Encoder
from reelmae.model.weights.infer import source_grid
from reelmae.model.weights.interpolate import GridTHW, resize_joint, resize_spatial, resize_temporal
from reelmae.model.weights.layouts import State, fresh_norm, translate
from reelmae.pipeline.errors import WeightsError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ImportReport:
    """What was done with a file's tensors."""

    placed: list[str]
    """Tensors of the model that were given a value."""

    resized: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    """Those of them that were resized to another grid, with the shape in the file and the shape in the model."""

    left: list[str] = field(default_factory=list)
    """Keys of the file that were not used, as `allow` permits."""

    missing: list[str] = field(default_factory=list)
    """Tensors of the model that kept their value, as `allow` permits."""


def finetuning_patterns(layout: str, config: ClassifierConfig) -> tuple[str, ...]:
    """Patterns to give `load_into` as `allow`, so that a classifier starts from a pretrained file.

    The file's decoder is left and the model's head is new. With VideoMAE the norm is new too. Any other key without a
    place is still an error.
    """
    left = {
        "mae_st": ("decoder_*", "mask_token"),
        "slowfast": ("decoder_*", "mask_token", "pred_head.*"),
        "videomae": ("decoder.*", "encoder_to_decoder.*", "mask_token"),
        "reelmae": ("decoder.*", "motion_decoder.*", "encoder.mask_token"),
        "timm": (),
    }
    if layout not in left:
        raise WeightsError(f"layout={layout!r}: is of a classifier already; load it without finetuning_patterns")
    norm = ("encoder.norm.*", "norm.*") if fresh_norm(config) else ()
    return (*left[layout], *norm, "head.*")


def load_into(
    model: nn.Module,
    state: Mapping[str, Tensor],
    layout: str,
    *,
    allow: Sequence[str] = (),
    grid: GridTHW | None = None,
) -> ImportReport:
    """Put a state dict of any layout into a MaskedAutoencoder, a Classifier or an Encoder.

    `allow`: patterns (`decoder*`, `head.*`) of keys of the file that may be left, and of tensors of the model that may
    keep their value.
    `grid`: (T', H', W') of a file with one joint table of positions, where it differs from the model's grid. Separable
    tables determine their grid; another value here is an error.

    WeightsError names every other key without a place, tensor without a value, and shape that differs.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, ViTConfig):
        raise WeightsError(
            f"{type(model).__name__} is not a model of ours; give a MaskedAutoencoder, Classifier or Encoder"
        )
    translated = translate(state, layout, config)
    prefix = "encoder." if isinstance(model, Encoder) else ""
    wanted = {prefix + name: value for name, value in model.state_dict().items()}
    left = list(translated.unknown)
    for name in translated.state.keys() - wanted.keys():
        left += translated.sources[name]
    left = [name for name in state if name in left]  # in the file's order, each once
    missing = [name for name in wanted if name not in translated.state]
    both = {name: value for name, value in translated.state.items() if name in wanted}
    resized = _resize_tables(both, wanted, config.grid_THW, _file_grid(translated.state, grid))
    faults = _faults(both | resized, wanted, translated.sources)
    lost = [name for name in left if not _matches(name, allow)]
    if lost:
        faults.append(f"of the file, without a place: {', '.join(lost)}")
    empty = [name.removeprefix(prefix) for name in missing if not _matches(name, allow)]
    if empty:
        faults.append(f"of the model, without a value: {', '.join(empty)}")
    if faults:
        raise WeightsError(
            f"{type(model).__name__} and a file of layout {layout!r}: {'; '.join(faults)}. Nothing was loaded; "
            "give a file of the model's sizes, or allow by name the tensors that may be left"
        )
    shapes = {n: (tuple(both[n].shape), tuple(wanted[n].shape)) for n in both if n in resized}
    with torch.no_grad():
        for name, value in (both | resized).items():
            wanted[name].copy_(value)
    return ImportReport(
        placed=[n.removeprefix(prefix) for n in wanted if n in both],
        resized={n.removeprefix(prefix): shape for n, shape in shapes.items()},
        left=left,
        missing=[n.removeprefix(prefix) for n in missing],
    )


def _matches(name: str, allow: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in allow)


def _faults(values: State, wanted: State, sources: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Faults of tensors that have a place: another shape, no floats, values that are not finite."""
    faults = []
    for name, value in values.items():
        where = name if sources[name] == (name,) else f"{name} (from {', '.join(sources[name])})"
        if value.shape != wanted[name].shape:
            faults.append(f"{where} is {list(value.shape)} in the file and {list(wanted[name].shape)} in the model")
        elif not value.is_floating_point():
            faults.append(f"{where} is {value.dtype}, no floats")
        elif not torch.isfinite(value).all():
            faults.append(f"{where} holds values that are not finite")
    return faults


def _file_grid(state: State, given: GridTHW | None) -> GridTHW | None:
    """(T', H', W') of a file's tokens, from its separable tables, or else from the caller; None where unknown."""
    known = source_grid(state)
    if given is None:
        return known
    if len(given) != 3 or min(given) < 1:
        raise WeightsError(f"grid={list(given)}: give T', H' and W', each at least 1")
    if known not in (None, tuple(given)):
        raise WeightsError(
            f"grid={list(given)}, as given or in the file's config: its tables of space and time are for "
            f"{list(known or ())}; give that, or a file of one model"
        )
    return given


def _resize_tables(values: State, wanted: State, new: GridTHW, old: GridTHW | None) -> State:
    """Tables of positions of another grid, resized to `new`, the model's. `old`: the file's grid, where it is known."""
    result: State = {}
    for name, value in values.items():
        kind = name.rpartition(".pos.")[2] if ".pos." in name else ""
        target = wanted[name]
        if (
            kind not in ("spatial", "temporal", "table")
            or not value.is_floating_point()
            or value.dim() != 3
            or value.shape[::2] != target.shape[::2]
        ):
            continue  # _faults names it
        if kind == "table":
            if (old or new) != new or value.shape != target.shape:
                result[name] = resize_joint(value, _joint_grid(name, value.shape[1], old), new)
            continue
        rows = (old[0] if kind == "temporal" else old[1] * old[2]) if old else 0
        if old and value.shape[1] != rows:
            raise WeightsError(
                f"{name} has {value.shape[1]} rows: the other tables of the file are for {list(old)} tokens, "
                f"which are {rows}; give a file of one model"
            )
        if old and value.shape != target.shape:
            spatial = kind == "spatial"
            result[name] = resize_spatial(value, old[1:], new[1:]) if spatial else resize_temporal(value, new[0])
    return result


def _joint_grid(name: str, tokens: int, old: GridTHW | None) -> GridTHW:
    if old is None or old[0] * old[1] * old[2] != tokens:
        said = "" if old is None else f", not the {list(old)} given"
        raise WeightsError(f"{name} is for {tokens} tokens{said}: give grid, T', H' and W' of the file's tokens")
    return old
