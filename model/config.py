"""Configs of the models: sizes, positions and targets, with presets for the published models.

    ViTConfig ── MAEConfig ── MaskedAutoencoder        mae_config       MAE-ST, the code of mae_st (arXiv 2205.09113)
        │            └─ MotionConfig                   slowfast_config  MAE-ST, as its published weights were trained
        └─ ClassifierConfig (model/classifier.py)      videomae_config  VideoMAE (arXiv 2203.12602)
                                                       motion_config    MotionMAE (arXiv 2210.04154)

Properties that hold: a config is frozen and complete, and equal configs build equal models. An invalid value raises a
ValueError that names the value and the remedy.

Checkpoints hold these fields by name, as JSON: do not rename them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

CHANNELS = 3
HOG_CELL = 8
"""Side of a cell in pixels, for the target `hog`."""
HOG_BINS = 9
"""Orientations of a cell, for the target `hog`."""

Positions = Literal["separable", "joint", "sinusoid"]
PositionInit = Literal["normal", "sincos"]
TargetNorm = Literal["patch", "channel", "none"]
MotionSign = Literal["signed", "absolute"]
Objective = Literal["mae", "slowfast", "videomae", "motion"]
DecoderCls = Literal["own", "carried", "none"]


@dataclass(frozen=True)
class ViTConfig:
    """A video ViT. The defaults are MAE-ST's ViT-B."""

    frames: int = 16
    """Frames of a clip."""

    size: int = 224
    """Height and width of a clip in pixels."""

    patch: int = 16
    """Height and width of a token's cube in pixels."""

    t_patch: int = 2
    """Frames of a token's cube."""

    dim: int = 768
    """Width of the tokens."""

    depth: int = 12
    """Number of blocks."""

    heads: int = 12
    """Attention heads of a block."""

    mlp_ratio: float = 4.0
    """Width of a block's MLP, as a multiple of `dim`."""

    cls_token: bool = True
    """Whether a class token stands before the others."""

    pos: Positions = "separable"
    """Positions of the tokens. `separable`: learned tables for space and for time, added. `joint`: one learned table.
    `sinusoid`: fixed sines over the token's number."""

    qkv_bias: Literal["qkv", "qv"] = "qkv"
    """Which projections have a bias. `qv`: queries and values, not keys, as in VideoMAE."""

    pos_init: PositionInit = "normal"
    """How learned positions start: as noise (`normal`), or as sines and cosines of row, column and time (`sincos`)."""

    pixel_mean: tuple[float, float, float] = (0.45, 0.45, 0.45)
    """Mean of each colour by which the input is normalised. Pixels are in 0 … 1 before that."""

    pixel_std: tuple[float, float, float] = (0.225, 0.225, 0.225)
    """Deviation of each colour by which the input is normalised."""

    def __post_init__(self) -> None:
        for name in ("frames", "size", "patch", "t_patch", "dim", "depth", "heads"):
            self._whole(name)
        require(0 < self.mlp_ratio < math.inf, f"mlp_ratio={self.mlp_ratio}", "give a finite number above 0")
        for name in ("pixel_mean", "pixel_std"):
            value = getattr(self, name)
            numbers = [v for v in value if isinstance(v, int | float) and math.isfinite(v)]
            require(
                len(numbers) == len(value) == CHANNELS,
                f"{name}={value}",
                "give a number for each of three colours",
            )
        require(all(s > 0 for s in self.pixel_std), f"pixel_std={self.pixel_std}", "give more than 0")
        self._divides("frames", "t_patch")
        self._divides("size", "patch")
        self._divides("dim", "heads")
        self._one_of("pos", Positions)
        self._one_of("qkv_bias", Literal["qkv", "qv"])
        self._one_of("pos_init", PositionInit)

    @property
    def grid_THW(self) -> tuple[int, int, int]:
        """Tokens along time, height and width."""
        return self.frames // self.t_patch, self.size // self.patch, self.size // self.patch

    @property
    def n_tokens(self) -> int:
        """L: tokens of a clip, kept and removed ones."""
        t, h, w = self.grid_THW
        return t * h * w

    @property
    def patch_values(self) -> int:
        """Pixel values in a token's cube."""
        return self.t_patch * self.patch**2 * CHANNELS

    def _whole(self, name: str) -> None:
        value = getattr(self, name)
        require(is_count(value), f"{name}={value}", "give a whole number, at least 1")

    def _divides(self, name: str, by: str) -> None:
        value, divisor = getattr(self, name), getattr(self, by)
        near = value - value % divisor or divisor
        require(
            value % divisor == 0,
            f"{name}={value}",
            f"choose a {name} that {by}={divisor} divides, such as {near}",
        )

    def _one_of(self, name: str, values: Any) -> None:
        value, allowed = getattr(self, name), [repr(v) for v in get_args(values)]
        require(
            repr(value) in allowed,
            f"{name}={value!r}",
            f"give {', '.join(allowed[:-1])} or {allowed[-1]}",
        )


@dataclass(frozen=True)
class MotionConfig:
    """The second target of MotionMAE: the difference between two frames.

    The paper says: difference of adjacent frames, weight 1. It does not say which sign and which normalisation. The
    defaults, signed and not normalised, are our reading.
    """

    decoders: Literal["separate", "shared"] = "separate"
    """`separate`: one decoder for space and one for motion. `shared`: one for both, with two last layers."""

    gap: int = 1
    """Frames between the two: the target is the frame `gap` later minus the frame."""

    sign: MotionSign = "signed"
    """The difference itself (`signed`), or its absolute value (`absolute`)."""

    norm: Literal["patch", "none"] = "none"
    """Whether the difference is normalised within each patch."""

    weight: float = 1.0
    """Weight of the motion's loss. The pixels' loss has weight 1."""

    def __post_init__(self) -> None:
        require(is_count(self.gap), f"motion.gap={self.gap}", "give a whole number, at least 1")
        require(self.weight > 0, f"motion.weight={self.weight}", "give more than 0")
        for name, allowed in (
            ("decoders", ("separate", "shared")),
            ("sign", ("signed", "absolute")),
            ("norm", ("patch", "none")),
        ):
            value = getattr(self, name)
            require(value in allowed, f"motion.{name}={value!r}", f"give {allowed[0]!r} or {allowed[1]!r}")


@dataclass(frozen=True)
class MAEConfig(ViTConfig):
    """A MaskedAutoencoder. The defaults are MAE-ST's ViT-B."""

    encoder: Literal["sparse", "dense"] = "sparse"
    """`sparse`: the encoder sees the kept tokens only. `dense`: it also sees a mask token for each removed one."""

    decoder_dim: int = 512
    """Width of the decoder."""

    decoder_depth: int = 4
    """Number of the decoder's blocks."""

    decoder_heads: int = 16
    """Attention heads of the decoder."""

    decoder_pos: Positions = "separable"
    """Positions in the decoder; see `pos`."""

    decoder_cls: DecoderCls = "own"
    """Class token in the decoder: its `own`, the encoder's (`carried`), or `none`."""

    embed_bias: bool = True
    """Whether the layer between encoder and decoder has a bias."""

    target: Literal["pixels", "hog"] = "pixels"
    """What is predicted: pixels, or histograms of oriented gradients."""

    target_norm: TargetNorm = "patch"
    """Target pixels get mean 0 and variance 1 within each `patch`, or within each colour of a patch (`channel`)."""

    target_frames: Literal["linspace", "stride"] = "linspace"
    """Which frames are predicted: `linspace(0, T - 1, pred_t_dim)` rounded down, or equal steps from 0 (`stride`)."""

    pred_t_dim: int | None = None
    """How many frames of a clip are predicted. None: one per tube."""

    unit_pixels: bool = False
    """Whether target pixels are in 0 … 1 before `target_norm`. Otherwise they are as the input, normalised."""

    motion: MotionConfig | None = None
    """The second target. None: there is none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("decoder_dim", "decoder_depth", "decoder_heads"):
            self._whole(name)
        self._divides("decoder_dim", "decoder_heads")
        for name, values in (
            ("encoder", Literal["sparse", "dense"]),
            ("decoder_pos", Positions),
            ("decoder_cls", DecoderCls),
            ("target", Literal["pixels", "hog"]),
            ("target_norm", TargetNorm),
            ("target_frames", Literal["linspace", "stride"]),
        ):
            self._one_of(name, values)
        carried = self.decoder_cls == "carried" and not self.cls_token
        require(not carried, "decoder_cls='carried'", "the encoder has no class token; give 'own' or 'none'")
        self._check_target()

    def _check_target(self) -> None:
        tubes, wanted = self.grid_THW[0], self.n_target_frames
        require(
            is_count(wanted) and wanted <= self.frames and wanted % tubes == 0,
            f"pred_t_dim={wanted}",
            f"give a multiple of frames / t_patch = {tubes}, at most frames = {self.frames}",
        )
        require(
            self.target_frames != "stride" or self.frames % wanted == 0,
            f"target_frames='stride' with pred_t_dim={wanted}",
            f"give a pred_t_dim that divides frames={self.frames}, or target_frames='linspace'",
        )
        hog = self.target == "hog" and self.patch > HOG_CELL and self.patch % HOG_CELL
        require(
            not hog,
            f"target='hog' with patch={self.patch}",
            f"give a patch that is a multiple of {HOG_CELL}",
        )
        alone = self.target_norm == "channel" and self.pixel_values == CHANNELS
        require(
            not alone,
            "target_norm='channel' with one pixel a token",
            "give a larger patch, or target_norm='none'",
        )
        if self.motion is not None:
            gap = self.motion.gap
            require(gap < self.frames, f"motion.gap={gap}", f"give less than frames={self.frames}")

    @property
    def n_target_frames(self) -> int:
        """How many frames of a clip are predicted."""
        return self.grid_THW[0] if self.pred_t_dim is None else self.pred_t_dim

    @property
    def target_t_patch(self) -> int:
        """Target frames in one token."""
        return self.n_target_frames // self.grid_THW[0]

    @property
    def pixel_values(self) -> int:
        """Values that a token predicts where the target is pixels or motion."""
        return self.target_t_patch * self.patch**2 * CHANNELS

    @property
    def target_values(self) -> int:
        """P: values that a token predicts for the first target."""
        if self.target == "pixels":
            return self.pixel_values
        return self.target_t_patch * (self.patch // min(self.patch, HOG_CELL)) ** 2 * HOG_BINS * CHANNELS

    def target_frame_index(self) -> list[int]:
        """Numbers of the predicted frames. Of 16, by `linspace` 0, 2, …, 12, 15, and by `stride` 0, 2, …, 12, 14."""
        n = self.n_target_frames
        if self.target_frames == "stride":
            return list(range(0, self.frames, self.frames // n))
        import torch  # configs are read without it

        # float32 on purpose: it must round down as the reference does
        return torch.linspace(0, self.frames - 1, n, device="cpu").long().tolist()


def is_count(value: Any) -> bool:
    """Whether the value is a whole number, at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def require(holds: bool, what: str, remedy: str) -> None:
    """ValueError `what: remedy` unless it holds."""
    if not holds:
        raise ValueError(f"{what}: {remedy}")


PRESETS: dict[str, dict[str, int]] = {
    "T": {"dim": 192, "depth": 12, "heads": 3},
    "S": {"dim": 384, "depth": 12, "heads": 6},
    "B": {"dim": 768, "depth": 12, "heads": 12},
    "L": {"dim": 1024, "depth": 24, "heads": 16},
    "H": {"dim": 1280, "depth": 32, "heads": 16},
}
_VIDEOMAE_DECODER = {"T": (192, 3), "S": (192, 3), "B": (384, 6), "L": (512, 8), "H": (640, 8)}


def preset_name(preset: str) -> str:
    """`vit_b`, `ViT-B` and `B` → B; ValueError on another."""
    name = preset.lower().removeprefix("vit_").removeprefix("vit-").upper()
    require(name in PRESETS, f"preset={preset!r}", f"give one of {', '.join(f'vit_{p.lower()}' for p in PRESETS)}")
    return name


def mae_config(preset: str, **changes: Any) -> MAEConfig:
    """MAE-ST in size T, S, B, L or H (also written `vit_b`). `changes` replace any field."""
    return MAEConfig(**{**PRESETS[preset_name(preset)], **changes})


def slowfast_config(preset: str, **changes: Any) -> MAEConfig:
    """MAE-ST as PySlowFast trained the published weights.

    It differs from `mae_config` in the decoder, which has joint positions, heads of width 64 and the encoder's class
    token, and in the target frames, which are 0, 2, …, 14.
    """
    width = changes.get("decoder_dim", 512)
    ours = {
        "decoder_pos": "joint",
        "decoder_cls": "carried",
        "target_frames": "stride",
        "decoder_heads": max(1, width // 64),
    }
    return mae_config(preset, **{**ours, **changes})


def videomae_config(preset: str, **changes: Any) -> MAEConfig:
    """VideoMAE in a size.

    It has no class token, fixed positions and keys without bias. It predicts all frames of a cube, as pixels in 0 … 1
    that are normalised within each channel. Its masks are tubes (the loader's `mask.kind`).
    """
    width, heads = _VIDEOMAE_DECODER[preset_name(preset)]
    ours: dict[str, Any] = {
        "cls_token": False,
        "pos": "sinusoid",
        "qkv_bias": "qv",
        "decoder_dim": width,
        "decoder_heads": heads,
        "decoder_pos": "sinusoid",
        "decoder_cls": "none",
        "embed_bias": False,
        "target_norm": "channel",
        "pred_t_dim": changes.get("frames", 16),
        "unit_pixels": True,
    }
    return mae_config(preset, **{**ours, **changes})


def motion_config(preset: str, **changes: Any) -> MAEConfig:
    """MotionMAE in a size: MAE-ST's ViT with one learned table of positions, and motion as a second target."""
    return mae_config(preset, **{"pos": "joint", "decoder_pos": "joint", "motion": MotionConfig(), **changes})


OBJECTIVES: dict[Objective, Callable[..., MAEConfig]] = {
    "mae": mae_config,
    "slowfast": slowfast_config,
    "videomae": videomae_config,
    "motion": motion_config,
}
