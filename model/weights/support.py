"""Configs that the codes of other layouts can compute. Another config has no place in such a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from reelmae.model.config import MAEConfig, ViTConfig
from reelmae.pipeline.errors import WeightsError


def check_fits(state: Mapping[str, Tensor], layout: str, config: ViTConfig) -> None:
    """WeightsError names a field of the config for which the layout's code would compute something else."""
    supported = _encoder_values(layout)
    if "decoder.pred.weight" in state and isinstance(config, MAEConfig):
        supported |= _decoder_values(layout, config)
    for field, allowed in supported.items():
        value = getattr(config, field)
        if value not in allowed:
            part = "" if field in ("pos", "qkv_bias", "cls_token") else "the encoder only, or "
            raise WeightsError(
                f"{field}={value!r} does not fit the layout {layout!r} ({' or '.join(map(repr, allowed))}): "
                f"export {part}as safetensors"
            )


def _encoder_values(layout: str) -> dict[str, tuple[Any, ...]]:
    """Fields of the encoder's config, and the values that the layout's code supports."""
    if layout.startswith("videomae"):
        return {"cls_token": (False,), "pos": ("sinusoid", "joint"), "qkv_bias": ("qv",)}
    if layout == "timm":
        return {}
    values: dict[str, tuple[Any, ...]] = {"pos": ("separable", "joint"), "qkv_bias": ("qkv",)}
    if layout == "mae_st_classifier":  # that code leaves row 0 out of the mean, with or without a class token
        values["cls_token"] = (True,)
    return values


def _decoder_values(layout: str, config: MAEConfig) -> dict[str, tuple[Any, ...]]:
    """The same for the decoder and the target of a pretrained model."""
    values: dict[str, tuple[Any, ...]] = {"encoder": ("sparse",), "target": ("pixels",), "motion": (None,)}
    if layout == "videomae":
        return values | {
            "decoder_pos": ("sinusoid",),
            "decoder_cls": ("none",),
            "embed_bias": (False,),
            "unit_pixels": (True,),
            "target_norm": ("channel",),
            "n_target_frames": (config.frames,),
        }
    values |= {"embed_bias": (True,), "unit_pixels": (False,), "target_norm": ("patch",)}
    if layout == "mae_st":
        return values | {
            "decoder_pos": (config.pos,),
            "decoder_cls": ("own" if config.cls_token else "none",),
            "target_frames": ("linspace",),
        }
    return values | {
        "decoder_pos": ("separable", "joint"),
        "decoder_cls": ("carried" if config.cls_token else "none",),
        "target_frames": ("stride",),
        "decoder_heads": (max(1, config.decoder_dim // 64),),
        "n_target_frames": (config.frames // config.t_patch, config.frames),
    }
