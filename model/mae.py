"""MAE-ST: a masked autoencoder of space-time patches (arXiv 2205.09113), sparse or dense.

    clips_BCTHW ── kept patches ── encoder ── latent ── + mask tokens ── decoder ── pred_BLP ── loss on removed

Legend: B batch, C channel, T frame, L token, K kept token, D encoder width, E decoder width, P values of a patch.

Properties that hold:
- The model owns no randomness: which tokens are kept comes with the batch, as token numbers in any order.
- The sparse encoder reads, embeds and moves kept tokens only. The dense one is the baseline it is measured
  against: the same kept tokens, with a learned mask token in each other slot, all L through the encoder.
- The content of removed patches reaches the loss only, as the target.
- The decoder predicts all L tokens; the loss is the mean over a patch, then over removed tokens.
- Shapes are static and nothing is read back to the host: `torch.compile(fullgraph=True)` takes it whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from reelmae.model.patches import gather_patches, patchify, unpatchify
from reelmae.model.positions import PositionInit, SeparablePositions

CHANNELS = 3
EPS = 1e-6  # of every LayerNorm, and within the root of the target's normalisation


@dataclass(frozen=True)
class MAEConfig:
    """Sizes of a MaskedAutoencoder; ValueError names a value that cannot be and the remedy.

    `frames`, `size`: the clip, size × size pixels. `t_patch`, `patch`: frames and pixels of a token's cube.
    `pred_t_dim`: target frames, spread over the clip as `linspace(0, T - 1, pred_t_dim)` rounded down; None is
    one per tube, T / t_patch. `norm_target`: targets have mean 0 and variance 1 within each patch. `pos_init`: see
    SeparablePositions.
    """

    frames: int = 16
    size: int = 224
    patch: int = 16
    t_patch: int = 2
    dim: int = 768
    depth: int = 12
    heads: int = 12
    decoder_dim: int = 512
    decoder_depth: int = 4
    decoder_heads: int = 16
    mlp_ratio: float = 4.0
    pred_t_dim: int | None = None
    encoder: Literal["sparse", "dense"] = "sparse"
    norm_target: bool = True
    pos_init: PositionInit = "normal"

    def __post_init__(self) -> None:
        for name in ("frames", "size", "patch", "t_patch", "dim", "depth", "heads"):
            _require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}", "give at least 1")
        for name in ("decoder_dim", "decoder_depth", "decoder_heads", "mlp_ratio"):
            _require(getattr(self, name) > 0, f"{name}={getattr(self, name)}", "give more than 0")
        for name, value, by, divisor in (
            ("frames", self.frames, "t_patch", self.t_patch),
            ("size", self.size, "patch", self.patch),
            ("dim", self.dim, "heads", self.heads),
            ("decoder_dim", self.decoder_dim, "decoder_heads", self.decoder_heads),
        ):
            remedy = (
                f"choose a {name} that {by}={divisor} divides, such as {value - value % divisor or divisor}"
            )
            _require(value % divisor == 0, f"{name}={value}", remedy)
        tubes = self.grid_THW[0]
        wanted = self.target_frames
        _require(
            0 < wanted <= self.frames and wanted % tubes == 0,
            f"pred_t_dim={wanted}",
            f"give a multiple of frames / t_patch = {tubes}, at most frames = {self.frames}",
        )
        _require(self.encoder in ("sparse", "dense"), f"encoder={self.encoder!r}", "give 'sparse' or 'dense'")
        _require(
            self.pos_init in ("normal", "sincos"), f"pos_init={self.pos_init!r}", "give 'normal' or 'sincos'"
        )

    @property
    def grid_THW(self) -> tuple[int, int, int]:
        """Tokens along time, height and width."""
        return self.frames // self.t_patch, self.size // self.patch, self.size // self.patch

    @property
    def n_tokens(self) -> int:
        """L: tokens of a clip, kept and removed."""
        t, h, w = self.grid_THW
        return t * h * w

    @property
    def target_frames(self) -> int:
        """How many frames of a clip are predicted."""
        return self.frames // self.t_patch if self.pred_t_dim is None else self.pred_t_dim

    @property
    def target_t_patch(self) -> int:
        """Target frames in one token."""
        return self.target_frames // self.grid_THW[0]

    def target_frame_index(self) -> list[int]:
        """Which frames are predicted: 0, 2, …, 12, 15 for 8 of 16."""
        # float32 on purpose: the rounding down must be that of the reference
        return torch.linspace(0, self.frames - 1, self.target_frames, device="cpu").long().tolist()


def _require(holds: bool, what: str, remedy: str) -> None:
    if not holds:
        raise ValueError(f"{what}: {remedy}")


PRESETS: dict[str, dict[str, int]] = {
    "T": {"dim": 192, "depth": 12, "heads": 3},
    "S": {"dim": 384, "depth": 12, "heads": 6},
    "B": {"dim": 768, "depth": 12, "heads": 12},
    "L": {"dim": 1024, "depth": 24, "heads": 16},
    "H": {"dim": 1280, "depth": 32, "heads": 16},
}


def mae_config(preset: str, **overrides: Any) -> MAEConfig:
    """Config of a preset, T | S | B | L | H (also written `vit_b`), with any field replaced."""
    name = preset.lower().removeprefix("vit_").removeprefix("vit-").upper()
    if name not in PRESETS:
        raise ValueError(f"preset={preset!r}: give one of {', '.join(f'vit_{p.lower()}' for p in PRESETS)}")
    return MAEConfig(**{**PRESETS[name], **overrides})


class MAEOutput(NamedTuple):
    """`loss` float32 scalar; `pred_BLP` prediction of all tokens; `mask_BL` float32, 1 = removed."""

    loss: Tensor
    pred_BLP: Tensor
    mask_BL: Tensor


def blocks(dim: int, depth: int, heads: int, mlp_ratio: float) -> nn.ModuleList:
    """`depth` pre-norm blocks: fused q, k, v with bias, exact GELU, LayerNorm eps 1e-6."""
    norm = partial(nn.LayerNorm, eps=EPS)
    return nn.ModuleList(
        Block(dim, heads, mlp_ratio, qkv_bias=True, norm_layer=norm, act_layer=nn.GELU) for _ in range(depth)
    )


def fill(visible_BKD: Tensor, ids_BK: Tensor, token_11D: Tensor, n_tokens: int) -> Tensor:
    """[B, K, D] put at their places among `n_tokens`; `token_11D` everywhere else: [B, L, D]."""
    full_BLD = token_11D.to(visible_BKD.dtype).expand(visible_BKD.shape[0], n_tokens, -1)
    return full_BLD.scatter(1, ids_BK[..., None].expand_as(visible_BKD), visible_BKD)


class Encoder(nn.Module):
    """Patches to latents, with a class token in row 0.

    `patch_embed` is a Linear over a patch's values in the order of `patchify` (frame in tube, row, column,
    channel); a Conv3d kernel [D, C, t, p, p] becomes its weight by `permute(0, 2, 3, 4, 1).flatten(1)`.
    """

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = nn.Linear(config.t_patch * config.patch**2 * CHANNELS, config.dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.dim))
        self.pos = SeparablePositions(config.grid_THW, config.dim, config.pos_init)
        if config.encoder == "dense":
            self.mask_token = nn.Parameter(torch.empty(1, 1, config.dim))
        self.blocks = blocks(config.dim, config.depth, config.heads, config.mlp_ratio)
        self.norm = nn.LayerNorm(config.dim, eps=EPS)

    def embed(self, clips_BCTHW: Tensor, ids_BK: Tensor | None) -> Tensor:
        """Tokens with positions and class token, before the blocks: [B, 1 + (K or L), D]."""
        c = self.config
        if ids_BK is None:
            x_BKD = self.patch_embed(patchify(clips_BCTHW, c.t_patch, c.patch)) + self.pos.tokens()
        else:
            x_BKD = self.patch_embed(gather_patches(clips_BCTHW, ids_BK, c.t_patch, c.patch))
            if c.encoder == "sparse":
                x_BKD = x_BKD + self.pos.at(ids_BK)
            else:
                x_BKD = fill(x_BKD, ids_BK, self.mask_token, c.n_tokens) + self.pos.tokens()
        cls_B1D = (self.cls_token + self.pos.cls).to(x_BKD.dtype).expand(x_BKD.shape[0], -1, -1)
        return torch.cat((cls_B1D, x_BKD), dim=1)

    def forward(self, clips_BCTHW: Tensor, ids_BK: Tensor | None = None) -> Tensor:
        """Normalised latents, class token first: [B, 1 + K, D]; 1 + L if dense or without ids."""
        x = self.embed(clips_BCTHW, ids_BK)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Decoder(nn.Module):
    """Latents of the kept tokens (sparse) or of all (dense) to a prediction for all tokens.

    It has its own class token and positions; the encoder's class token does not reach it.
    """

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.decoder_dim
        self.embed = nn.Linear(config.dim, dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        if config.encoder == "sparse":
            self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos = SeparablePositions(config.grid_THW, dim, config.pos_init)
        self.blocks = blocks(dim, config.decoder_depth, config.decoder_heads, config.mlp_ratio)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.pred = nn.Linear(dim, config.target_t_patch * config.patch**2 * CHANNELS)

    def forward(self, latent_BKD: Tensor, ids_BK: Tensor) -> Tensor:
        """[B, K or L, D] → pred_BLP."""
        x_BLE = self.embed(latent_BKD)
        if self.config.encoder == "sparse":
            x_BLE = fill(x_BLE, ids_BK, self.mask_token, self.config.n_tokens)
        x_BLE = x_BLE + self.pos.tokens()
        cls_B1E = (self.cls_token + self.pos.cls).to(x_BLE.dtype).expand(x_BLE.shape[0], -1, -1)
        x = torch.cat((cls_B1E, x_BLE), dim=1)
        for block in self.blocks:
            x = block(x)
        return self.pred(self.norm(x)[:, 1:])


class MaskedAutoencoder(nn.Module):
    """Encoder, decoder and loss of MAE-ST."""

    frame_index: Tensor

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.register_buffer("frame_index", torch.tensor(config.target_frame_index()), persistent=False)
        self.apply(_initialise)

    def forward(self, clips_BCTHW: Tensor, ids_keep_BK: Tensor) -> MAEOutput:
        """`clips_BCTHW` float, normalised; `ids_keep_BK` int64 numbers of the kept tokens, distinct, any order."""
        self._check(clips_BCTHW, ids_keep_BK)
        pred_BLP = self.decoder(self.encode(clips_BCTHW, ids_keep_BK), ids_keep_BK)
        mask_BL = torch.ones(clips_BCTHW.shape[0], self.config.n_tokens, device=clips_BCTHW.device).scatter(
            1, ids_keep_BK, 0.0
        )
        loss = masked_loss(pred_BLP, self.targets(clips_BCTHW), mask_BL)
        return MAEOutput(loss, pred_BLP, mask_BL)

    def encode(self, clips_BCTHW: Tensor, ids_BK: Tensor | None = None) -> Tensor:
        """Latents without the class token, in the order of the ids: [B, K, D]; [B, L, D] if dense or without ids."""
        return self.encoder(clips_BCTHW, ids_BK)[:, 1:]

    def targets(self, clips_BCTHW: Tensor) -> Tensor:
        """What is to be predicted, float32: [B, L, P]."""
        target_BLP = self._target_pixels(clips_BCTHW)
        if self.config.norm_target:
            mean, std = _moments(target_BLP)
            target_BLP = (target_BLP - mean) / std
        return target_BLP

    def to_clip(self, pred_BLP: Tensor, clips_BCTHW: Tensor) -> Tensor:
        """A prediction as frames [B, C, target frames, H, W], in the pixel scale of `clips_BCTHW`.

        With `norm_target` each patch's mean and deviation are taken from the true clip: they are not predicted.
        """
        pred_BLP = pred_BLP.float()
        if self.config.norm_target:
            mean, std = _moments(self._target_pixels(clips_BCTHW))
            pred_BLP = pred_BLP * std + mean
        return unpatchify(pred_BLP, self.config.grid_THW, self.config.target_t_patch, self.config.patch)

    def _target_pixels(self, clips_BCTHW: Tensor) -> Tensor:
        frames = clips_BCTHW.index_select(2, self.frame_index)
        return patchify(frames, self.config.target_t_patch, self.config.patch).float()

    def _check(self, clips_BCTHW: Tensor, ids_keep_BK: Tensor) -> None:
        c = self.config
        expected = (CHANNELS, c.frames, c.size, c.size)
        if tuple(clips_BCTHW.shape[1:]) != expected:
            raise ValueError(
                f"clips of {tuple(clips_BCTHW.shape)}: this model takes [B, {', '.join(map(str, expected))}]"
            )
        if ids_keep_BK.dim() != 2 or ids_keep_BK.shape[0] != clips_BCTHW.shape[0]:
            raise ValueError(f"ids_keep of {tuple(ids_keep_BK.shape)}: give [{clips_BCTHW.shape[0]}, K]")
        if not 0 < ids_keep_BK.shape[1] < c.n_tokens:
            raise ValueError(
                f"{ids_keep_BK.shape[1]} kept tokens of {c.n_tokens}: keep at least 1 and remove at least 1"
            )


def masked_loss(pred_BLP: Tensor, target_BLP: Tensor, mask_BL: Tensor) -> Tensor:
    """Squared error, mean over each patch, then over the tokens with mask 1; float32 scalar."""
    loss_BL = (pred_BLP.float() - target_BLP).square().mean(dim=-1)
    return (loss_BL * mask_BL).sum() / mask_BL.sum()


def _moments(patches_BLP: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each patch (unbiased variance, eps within the root): [B, L, 1] each."""
    var, mean = torch.var_mean(patches_BLP, dim=-1, correction=1, keepdim=True)
    return mean, (var + EPS).sqrt()


@torch.no_grad()
def _initialise(module: nn.Module) -> None:
    """Xavier-uniform Linears (q, k and v each for itself), zero biases, small tokens."""
    if isinstance(module, Block):
        for third in module.attn.qkv.weight.chunk(3):
            nn.init.xavier_uniform_(third)
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, Encoder | Decoder):
        nn.init.trunc_normal_(module.cls_token, std=0.02)
        if hasattr(module, "mask_token"):
            nn.init.normal_(module.mask_token, std=0.02)
