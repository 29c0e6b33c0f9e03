"""The layouts of checkpoints of other codes: pure functions over state dicts that map their names to ours and back.

Legend: D width, E decoder width, L token, t and p frames and pixels of a patch, L' = 1 + L with a class token.

    layout               what it is                          what its names are like
    mae_st               the code of MAE-ST                  q, k, v apart; decoder_blocks.*, decoder_pred.*
    mae_st_classifier    … fine-tuned                        norm.* comes after pooling; head.*
    slowfast             PySlowFast, which published MAE-ST  pred_head.transforms.0.*, joint decoder_pos_embed
    slowfast_classifier  … fine-tuned                        head.projection.*
    videomae             VideoMAE: fixed positions,          attn.qkv without bias, beside it q_bias and v_bias
                         no class token
    videomae_classifier  … fine-tuned                        fc_norm.*, head.*
    timm                 an encoder, as timm's ViT with a    fused qkv, joint pos_embed
                         video kernel
    reelmae              ours                                encoder.*, decoder.*, motion_decoder.*, norm.*, head.*

Properties that hold:
- Names and shapes alone decide; no size is assumed. Values are moved, joined and split, never computed, with two
  exceptions in `timm`: separable positions become their sum, and keys without bias get zeros.
- `to_ours` and `from_ours` are each other's inverse. Only fused attention of PySlowFast is written as q, k and v apart.
- No key is dropped: a key without a place is named.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reelmae.model.classifier import ClassifierConfig
from reelmae.model.config import CHANNELS, ViTConfig
from reelmae.model.positions import SinusoidPositions
from reelmae.model.weights.support import check_fits
from reelmae.pipeline.errors import WeightsError

State = dict[str, Tensor]
Names = tuple[tuple[str, str], ...]
"""Pairs (ours, theirs). A name that ends in a dot is a prefix, another is a whole name."""

LAYOUTS = (
    "mae_st",
    "mae_st_classifier",
    "slowfast",
    "slowfast_classifier",
    "videomae",
    "videomae_classifier",
    "timm",
    "reelmae",
)
APART = ("mae_st", "slowfast")
"""Layouts whose name begins so are written with q, k and v apart."""

_JOINT = "joint"
"""Within this file: a table of positions whose row 0 may be the class token's."""

_KERNEL = "patch_embed.proj.weight"
_APART = re.compile(r"^(.+\.attn)\.[qkv]\.(weight|bias)$")


@dataclass(frozen=True)
class Translated:
    """A state dict of another code under our names."""

    state: State
    """Tensors under our names."""

    sources: dict[str, tuple[str, ...]]
    """For each of our names, the names in the file from which its tensor was made."""

    unknown: list[str]
    """Names in the file that have no place in the layout."""


# --- names -------------------------------------------------------------------------------------------------------


def _positions(ours: str, theirs: str) -> Names:
    kinds = (("spatial", "_spatial"), ("temporal", "_temporal"), ("cls", "_class"), (_JOINT, ""))
    return tuple((f"{ours}.{kind}", theirs + ending) for kind, ending in kinds)


_ENCODER: Names = (
    ("encoder.patch_embed.", "patch_embed.proj."),
    ("encoder.cls_token", "cls_token"),
    *_positions("encoder.pos", "pos_embed"),
    ("encoder.blocks.", "blocks."),
)
_BETWEEN: Names = (
    ("decoder.embed.", "decoder_embed."),
    ("decoder.mask_token", "mask_token"),
    *_positions("decoder.pos", "decoder_pos_embed"),
)
_MAE_ST: Names = (
    *_BETWEEN,
    ("decoder.cls_token", "decoder_cls_token"),
    ("decoder.blocks.", "decoder_blocks."),
    ("decoder.norm.", "decoder_norm."),
    ("decoder.pred.", "decoder_pred."),
)
_VIDEOMAE: Names = (
    ("encoder.patch_embed.", "encoder.patch_embed.proj."),
    ("encoder.pos.joint", "encoder.pos_embed"),
    ("encoder.blocks.", "encoder.blocks."),
    ("encoder.norm.", "encoder.norm."),
    ("decoder.embed.", "encoder_to_decoder."),
    ("decoder.mask_token", "mask_token"),
    ("decoder.blocks.", "decoder.blocks."),
    ("decoder.norm.", "decoder.norm."),
    ("decoder.pred.", "decoder.head."),
)
_OURS: Names = tuple((name, name) for name in ("encoder.", "decoder.", "motion_decoder.", "norm.", "head."))


def _names(layout: str, *, classifier: bool, fresh_norm: bool, decoder_depth: int) -> Names:
    """The names of a layout.

    `classifier`: the model is a Classifier. `fresh_norm`: its norm does not start from the encoder's.
    """
    norm = "norm." if classifier else "encoder.norm."
    if layout == "reelmae":
        return (*_OURS, ("norm.", "encoder.norm.")) if classifier and not fresh_norm else _OURS
    if layout == "videomae":
        return _VIDEOMAE
    if layout in ("videomae_classifier", "timm"):
        return (*_ENCODER, ("encoder.norm.", "norm."), ("norm.", "fc_norm."), ("head.", "head."))
    if layout == "slowfast_classifier":
        return (*_ENCODER, ("norm.", "norm."), ("head.", "head.projection."))
    if layout == "mae_st_classifier":
        return (*_ENCODER, ("norm.", "norm."), ("head.", "head."))
    if layout == "mae_st":
        return (*_ENCODER, (norm, "norm."), *_MAE_ST)
    blocks = "pred_head.transforms.0."
    return (
        *_ENCODER,
        (norm, "norm."),
        *_BETWEEN,
        ("decoder.blocks.", blocks),
        ("decoder.norm.", f"{blocks}{decoder_depth}."),  # the layer after the last block
        ("decoder.pred.", "pred_head.projections.0."),
    )


def _rename(name: str, pairs: Iterable[tuple[str, str]]) -> str | None:
    """`name` changed by the longest pair (old, new) that matches; None where none does."""
    fits = [(old, new) for old, new in pairs if (name.startswith(old) if old.endswith(".") else name == old)]
    if not fits:
        return None
    old, new = max(fits, key=lambda pair: len(pair[0]))
    return new + name.removeprefix(old)


def _bias_to_ours(name: str) -> str:
    """VideoMAE keeps the biases of q and v beside the projection, we keep them inside it."""
    return re.sub(r"\.attn\.([qv])_bias$", r".attn.qkv.\1_bias", name)


def _bias_to_theirs(name: str) -> str:
    return re.sub(r"\.attn\.qkv\.([qv])_bias$", r".attn.\1_bias", name)


def _depth(names: Iterable[str], blocks: str) -> int:
    """Number of blocks under the prefix `blocks`."""
    numbers = [m.group(1) for n in names if (m := re.match(rf"^{re.escape(blocks)}(\d+)\.norm1\.weight$", n))]
    return max(map(int, numbers), default=-1) + 1


def fresh_norm(config: ViTConfig | None) -> bool:
    """Whether a classifier's norm is new, as in VideoMAE. In MAE-ST it starts from the pretrained encoder's."""
    return config is not None and config.qkv_bias == "qv"


# --- theirs to ours ----------------------------------------------------------------------------------------------


def detect(state: Mapping[str, Any]) -> str:
    """The layout of a state dict, by its names. WeightsError where the layout is unknown."""
    names = set(state)

    def has(*beginnings: str) -> bool:
        return any(name.startswith(beginnings) for name in names)

    if "encoder.patch_embed.weight" in names:
        return "reelmae"
    if "encoder.patch_embed.proj.weight" in names:
        return "videomae"
    if _KERNEL not in names:
        some = ", ".join(sorted(map(str, names))[:3])
        raise WeightsError(
            f"no known layout ({len(names)} keys, such as {some}): there is neither {_KERNEL} nor "
            f"encoder.{_KERNEL}; known are {', '.join(LAYOUTS)}"
            if names
            else "holds no weights: give the file of a trained model"
        )
    if has("pred_head."):
        return "slowfast"
    if has("head.projection."):
        return "slowfast_classifier"
    if any(name.endswith(".attn.q_bias") for name in names):
        return "videomae_classifier"
    fused = any(name.endswith(".attn.qkv.weight") for name in names)
    if fused and not has("pos_embed_", "decoder_"):
        return "timm"
    return "mae_st_classifier" if has("head.") else "mae_st"


def to_ours(state: Mapping[str, Tensor], layout: str, config: ViTConfig | None = None) -> State:
    """The state dict under our names and in our shapes: q, k, v fused, patch kernels [D, 3, t, p, p] as [D, t·p·p·3].

    `config`: of the model to load. With a ClassifierConfig, the norm of a pretrained encoder becomes the classifier's.
    WeightsError names every key that has no place in the layout.
    """
    translated = translate(state, layout, config)
    if translated.unknown:
        raise WeightsError(f"keys without a place in the layout {layout!r}: {', '.join(translated.unknown)}")
    return translated.state


def translate(state: Mapping[str, Tensor], layout: str, config: ViTConfig | None = None) -> Translated:
    """As `to_ours`, with the sources of each tensor. Keys without a place are listed and are no error."""
    _check_layout(layout)
    classifier = isinstance(config, ClassifierConfig)
    depth = _depth(state, "pred_head.transforms.0.")
    names = _names(layout, classifier=classifier, fresh_norm=fresh_norm(config), decoder_depth=depth)
    if layout == "timm" and classifier and not any(name.startswith("fc_norm.") for name in state):
        names = (*(pair for pair in names if pair[0] != "encoder.norm."), ("norm.", "norm."))
    pairs = [(theirs, ours) for ours, theirs in names]
    values: State = {}
    sources: dict[str, tuple[str, ...]] = {}
    unknown = []
    for theirs, value in state.items():
        ours = _rename(theirs, pairs)
        if ours is not None and layout != "reelmae":
            ours = _bias_to_ours(ours)
        if ours is None:
            unknown.append(theirs)
        elif ours in values:
            raise WeightsError(f"{sources[ours][0]} and {theirs} are both {ours}: give a file of one model")
        else:
            values[ours], sources[ours] = value, (theirs,)
    _fuse(values, sources)
    if layout != "reelmae":
        _flatten_kernel(values, sources)
    _split_tables(values, sources, carried=layout == "slowfast")
    return Translated(values, sources, unknown)


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise WeightsError(f"layout={layout!r}: give one of {', '.join(LAYOUTS)}")


def _fuse(values: State, sources: dict[str, tuple[str, ...]]) -> None:
    """Join q, k and v. Where one of the three is absent the others stay as they are; no model has a place for them."""
    for attention, kind in sorted({m.groups() for name in values if (m := _APART.match(name))}):
        parts = [f"{attention}.{q}.{kind}" for q in "qkv"]
        if all(part in values for part in parts):
            shapes = [list(values[part].shape) for part in parts]
            if shapes[0] != shapes[1] or shapes[0] != shapes[2] or not shapes[0]:
                raise WeightsError(
                    f"{', '.join(sources[p][0] for p in parts)} are {shapes}: their shapes must be equal"
                )
            fused = f"{attention}.qkv.{kind}"
            values[fused] = torch.cat([values.pop(part) for part in parts])
            sources[fused] = tuple(name for part in parts for name in sources.pop(part))


def _flatten_kernel(values: State, sources: dict[str, tuple[str, ...]]) -> None:
    name = "encoder.patch_embed.weight"
    if name in values:
        kernel = values[name]
        if kernel.dim() != 5 or kernel.shape[1] != CHANNELS or kernel.shape[3] != kernel.shape[4]:
            raise WeightsError(
                f"{sources[name][0]} is {list(kernel.shape)}: a video model's is "
                f"[width, {CHANNELS}, frames, patch, patch]"
            )
        values[name] = kernel.permute(0, 2, 3, 4, 1).flatten(1)


def _split_tables(values: State, sources: dict[str, tuple[str, ...]], *, carried: bool) -> None:
    """Split joint tables of positions: with a class token, row 0 is its position.

    `carried`: the decoder has the encoder's class token.
    """
    in_encoder = "encoder.cls_token" in values
    in_decoder = "decoder.cls_token" in values or (carried and in_encoder)
    for pos, has_cls in (("encoder.pos", in_encoder), ("decoder.pos", in_decoder)):
        if f"{pos}.{_JOINT}" not in values:
            continue
        table, source = values.pop(f"{pos}.{_JOINT}"), sources.pop(f"{pos}.{_JOINT}")
        if table.dim() != 3 or table.shape[0] != 1 or table.shape[1] <= has_cls:
            raise WeightsError(f"{source[0]} is {list(table.shape)}: a table of positions is [1, tokens, width]")
        values[f"{pos}.table"], sources[f"{pos}.table"] = table[:, int(has_cls) :], source
        if has_cls:
            values[f"{pos}.cls"], sources[f"{pos}.cls"] = table[:, :1], source


# --- ours to theirs ----------------------------------------------------------------------------------------------


def encoder_part(state: Mapping[str, Tensor]) -> State:
    """The encoder's tensors, without a dense encoder's mask token: what other codes use of a pretrained model."""
    return {n: v for n, v in state.items() if n.startswith("encoder.") and n != "encoder.mask_token"}


def from_ours(state: Mapping[str, Tensor], layout: str, config: ViTConfig) -> State:
    """The inverse of `to_ours`, for a whole model or its `encoder_part`. `timm` gets only a pretrained model's encoder.

    Tensors may be views of those given, and are for pixels normalised with the statistics of `config` (see
    `pixels.renormalise`).

    WeightsError where a tensor has no place, where the layout's own code would compute something else than this model,
    or where `infer_config` would not give this config back.
    """
    _check_layout(layout)
    if layout == "reelmae":
        return dict(state)
    classifier = "head.weight" in state
    if layout == "timm" and not classifier:
        state = encoder_part(state)
    if classifier and f"{layout}_classifier" in LAYOUTS:
        layout = f"{layout}_classifier"
    check_fits(state, layout, config)
    values = dict(state)
    for pos, dim in (("encoder.pos", config.dim), ("decoder.pos", getattr(config, "decoder_dim", 0))):
        _join_table(values, pos, config, dim, layout)
    weight = values.get("encoder.patch_embed.weight")
    if weight is not None:
        cube = (config.t_patch, config.patch, config.patch, CHANNELS)
        values["encoder.patch_embed.weight"] = weight.unflatten(1, cube).permute(0, 4, 1, 2, 3)
    if layout == "timm":
        _zero_key_bias(values)
    elif layout.startswith(APART):
        _split_attention(values)
    depth = _depth(state, "decoder.blocks.")
    pairs = _names(layout, classifier=classifier, fresh_norm=fresh_norm(config), decoder_depth=depth)
    result: State = {}
    for ours, value in values.items():
        theirs = _rename(ours, pairs)
        if theirs is None:
            raise WeightsError(
                f"{ours} has no place in the layout {layout!r}: export the encoder only, or as safetensors"
            )
        result[_bias_to_theirs(theirs)] = value
    return result


def _join_table(values: State, pos: str, config: ViTConfig, dim: int, layout: str) -> None:
    """Join a table of positions with the class token's row before it. For timm, other kinds become a table first."""
    if layout == "timm" and pos == "encoder.pos":
        if config.pos == "separable":
            spatial, temporal = values.pop(f"{pos}.spatial"), values.pop(f"{pos}.temporal")
            values[f"{pos}.table"] = (temporal[:, :, None] + spatial[:, None]).flatten(1, 2)
        elif config.pos == "sinusoid":
            values[f"{pos}.table"] = SinusoidPositions(config.grid_THW, dim).tokens()
    if f"{pos}.table" in values:
        rows = [values.pop(f"{pos}.cls")] if f"{pos}.cls" in values else []
        values[f"{pos}.{_JOINT}"] = torch.cat([*rows, values.pop(f"{pos}.table")], dim=1)


def _zero_key_bias(values: State) -> None:
    """Join the biases of q and v, with zeros for k between them."""
    for name in [name for name in values if name.endswith(".attn.qkv.q_bias")]:
        projection = name.removesuffix(".q_bias")
        q, v = values.pop(name), values.pop(f"{projection}.v_bias")
        values[f"{projection}.bias"] = torch.cat((q, torch.zeros_like(q), v))


def _split_attention(values: State) -> None:
    """Split fused attention into q, k and v."""
    for name in [name for name in values if ".attn.qkv." in name]:
        for q, value in zip("qkv", values.pop(name).chunk(3), strict=True):
            values[name.replace(".attn.qkv.", f".attn.{q}.")] = value
