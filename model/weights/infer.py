"""The config of a checkpoint, from the shapes of its tensors.

Legend: L tokens, T' H' W' their grid, D width.

Properties that hold: all that shapes determine is read from them. They do not determine heads, and not frames and size
where positions are fixed or joint. Those come from the caller, or from a published model of the same width; otherwise
WeightsError says what to give. Pixel statistics are those of the layout's code.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from reelmae.model.classifier import ClassifierConfig
from reelmae.model.config import (
    CHANNELS,
    PRESETS,
    MAEConfig,
    ViTConfig,
    mae_config,
    slowfast_config,
    videomae_config,
)
from reelmae.model.weights.layouts import translate
from reelmae.model.weights.pixels import pixel_statistics
from reelmae.pipeline.errors import WeightsError

HEADS = {preset["dim"]: preset["heads"] for preset in PRESETS.values()}
MAE_ST_DECODER_HEADS = {512: 16}
VIDEOMAE_DECODER_HEADS = {192: 3, 384: 6, 512: 8, 640: 8}
VIDEOMAE_CLIP = {"frames": 16, "size": 224}
"""Of every published VideoMAE."""

Hints = Mapping[str, Any]


def infer_config(state: Mapping[str, Tensor], layout: str, **hints: Any) -> ViTConfig:
    """A MAEConfig for a pretrained model, a ClassifierConfig for one with a head, a ViTConfig for an encoder alone.

    `hints`: fields that replace the inferred ones, such as `heads`, `decoder_heads`, `frames` and `size`, and `patch`
    where the layout is ours. With another `frames` or `size` than the file's, tables of positions are resized when it
    is loaded.
    """
    ours = translate(state, layout).state
    if layout == "reelmae" and "decoder.pred.weight" in ours:
        raise WeightsError(
            "a pretrained model in our own layout: its targets cannot be told from shapes; give the checkpoint "
            "or the .safetensors file as reelmae wrote it, which holds its config, or take the encoder only"
        )
    fields = _encoder_fields(ours, _cube(state, ours, layout, hints), layout, hints)
    fields["pixel_mean"], fields["pixel_std"] = pixel_statistics(layout)
    if "head.weight" in ours:
        if layout == "mae_st_classifier" and not fields["cls_token"]:
            raise WeightsError(
                "a classifier without a class token: mae_st leaves its first patch out of the mean, ours does not; "
                "take the encoder only"
            )
        return _build(ClassifierConfig, {**fields, "classes": _shape(ours, "head.weight", 2)[0]}, hints)
    if "decoder.pred.weight" not in ours:
        return _build(ViTConfig, fields, hints)
    fields |= _decoder_fields(ours, fields, layout, hints)
    factory = {"slowfast": slowfast_config, "videomae": videomae_config}.get(layout, mae_config)
    whole = dataclasses.asdict(_or_weights_error(lambda: factory("B", **fields)))
    return _build(MAEConfig, whole | {"motion": None}, hints)


def _shape(ours: Mapping[str, Tensor], name: str, dims: int) -> tuple[int, ...]:
    if name not in ours:
        raise WeightsError(f"there is no {name}, as we name it: give a whole checkpoint")
    shape = tuple(ours[name].shape)
    if len(shape) != dims or 0 in shape:
        raise WeightsError(f"{name}, as we name it, is {list(shape)}: it needs {dims} axes, none of length 0")
    return shape


def _build(kind: type[ViTConfig], fields: dict[str, Any], hints: Hints) -> ViTConfig:
    known = {f.name for f in dataclasses.fields(kind)}
    for name in hints:
        if name not in known:
            raise WeightsError(
                f"{name}={hints[name]!r}: a {kind.__name__} has no such field; it has {', '.join(sorted(known))}"
            )
    return _or_weights_error(lambda: kind(**{**fields, **hints}))


def _or_weights_error(make: Callable[[], Any]) -> Any:
    """The result of `make`, whose ValueError becomes a WeightsError."""
    try:
        return make()
    except ValueError as e:
        raise WeightsError(f"{e} (read from the shapes in the file)") from e


def _cube(state: Mapping[str, Tensor], ours: Mapping[str, Tensor], layout: str, hints: Hints) -> tuple[int, int]:
    """Frames and pixels of a patch: (t_patch, patch)."""
    values = _shape(ours, "encoder.patch_embed.weight", 2)[1]
    if layout != "reelmae":  # translate has checked that it is a kernel
        kernel = next(value for name, value in state.items() if name.endswith("patch_embed.proj.weight"))
        return kernel.shape[2], kernel.shape[3]
    patch = hints.get("patch")
    if not patch or values % (patch**2 * CHANNELS):
        raise WeightsError(
            f"patch={patch}: {values} values do not tell a patch's side; give patch, or the .safetensors file as "
            "reelmae wrote it, which holds its config"
        )
    return values // (patch**2 * CHANNELS), patch


def _blocks(ours: Mapping[str, Tensor], of: str) -> int:
    return len({name.split(".")[2] for name in ours if name.startswith(f"{of}.blocks.")})


def _kind(ours: Mapping[str, Tensor], pos: str) -> str:
    if f"{pos}.spatial" in ours:
        return "separable"
    return "joint" if f"{pos}.table" in ours else "sinusoid"


def _encoder_fields(ours: Mapping[str, Tensor], cube: tuple[int, int], layout: str, hints: Hints) -> dict[str, Any]:
    dim = _shape(ours, "encoder.patch_embed.weight", 2)[0]
    depth = _blocks(ours, "encoder")
    if not depth:
        raise WeightsError(f"no blocks in a file of layout {layout!r}: give a whole encoder")
    hidden = _shape(ours, "encoder.blocks.0.mlp.fc1.weight", 2)[0]
    t, side = _grid(ours, cube, hints)
    return {
        "frames": t * cube[0],
        "size": side * cube[1],
        "patch": cube[1],
        "t_patch": cube[0],
        "dim": dim,
        "depth": depth,
        "heads": _heads("heads", dim, HEADS, hints),
        "mlp_ratio": hidden / dim,
        "cls_token": "encoder.cls_token" in ours,
        "pos": _kind(ours, "encoder.pos"),
        "qkv_bias": "qv" if "encoder.blocks.0.attn.qkv.q_bias" in ours else "qkv",
    }


def _decoder_fields(ours: Mapping[str, Tensor], fields: dict[str, Any], layout: str, hints: Hints) -> dict[str, Any]:
    dim = _shape(ours, "decoder.embed.weight", 2)[0]
    values, per_frame = _shape(ours, "decoder.pred.weight", 2)[0], fields["patch"] ** 2 * CHANNELS
    if values % per_frame:
        raise WeightsError(f"the decoder predicts {values} values, no multiple of the {per_frame} of a patch's frame")
    # in PySlowFast the decoder's heads are always 64 wide
    known = {"slowfast": {dim: max(1, dim // 64)}, "videomae": VIDEOMAE_DECODER_HEADS}
    tubes = hints.get("frames", fields["frames"]) // fields["t_patch"]
    found = {
        "decoder_dim": dim,
        "decoder_depth": _blocks(ours, "decoder"),
        "decoder_heads": _heads("decoder_heads", dim, known.get(layout, MAE_ST_DECODER_HEADS), hints),
        "decoder_pos": _kind(ours, "decoder.pos"),
        "pred_t_dim": values // per_frame * tubes,
    }
    if not fields["cls_token"]:
        found["decoder_cls"] = "none"
    return found | {"frames": tubes * fields["t_patch"]}


def _heads(name: str, dim: int, known: Mapping[int, int], hints: Hints) -> int:
    if name in hints:
        return int(hints[name])
    if dim not in known:
        raise WeightsError(f"{name}: no shape tells it, and no published model is {dim} wide; give {name}")
    return known[dim]


def source_grid(ours: Mapping[str, Tensor]) -> tuple[int, int, int] | None:
    """(T', H', W') of a file's separable tables of positions; None where it has none."""
    for pos in ("encoder.pos", "decoder.pos"):
        if f"{pos}.spatial" in ours and f"{pos}.temporal" in ours:
            places = _shape(ours, f"{pos}.spatial", 3)[1]
            side = math.isqrt(places)
            if side**2 != places:
                raise WeightsError(f"{pos}.spatial has {places} places: they are no square")
            return _shape(ours, f"{pos}.temporal", 3)[1], side, side
    return None


def _grid(ours: Mapping[str, Tensor], cube: tuple[int, int], hints: Hints) -> tuple[int, int]:
    """Tokens along time and along a side: (T', H')."""
    known = source_grid(ours)
    if known is not None:
        return known[0], known[1]
    frames, size = hints.get("frames", 0), hints.get("size", 0)
    if "encoder.pos.table" not in ours:
        return (frames or VIDEOMAE_CLIP["frames"]) // cube[0], (size or VIDEOMAE_CLIP["size"]) // cube[1]
    tokens = _shape(ours, "encoder.pos.table", 3)[1]
    if not frames and not size:
        raise WeightsError(f"one table of {tokens} positions does not tell the clip: give frames or size")
    if frames and size:  # the table may be for another clip: load_into compares
        return frames // cube[0], size // cube[1]
    if not size:
        t = max(1, frames // cube[0])
        side = math.isqrt(tokens // t)
    else:
        side = max(1, size // cube[1])
        t = tokens // side**2
    if t * side**2 != tokens:
        given = f"frames={frames}" if frames else f"size={size}"
        raise WeightsError(f"{given}: {tokens} positions are none of such a clip; give another frames or size")
    return t, side
