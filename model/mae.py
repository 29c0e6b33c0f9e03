"""Masked autoencoders for video. The config decides which: MAE-ST, MotionMAE or VideoMAE (model/config.py).

    clips_BCTHW ── kept patches ── encoder ── latents ── + mask tokens ── decoder ── pred_BQP ── loss
         └─────────────────── targets of the predicted tokens ──────────────────────────────────┘

Legend: B batch, C channel, T frame, L token, K kept token, Q predicted token, D width, P values of a token.

Properties that hold:
- The model draws no masks: the batch holds the numbers of the tokens that are kept, and of those that are predicted.
- The sparse encoder reads, embeds and moves kept tokens only. The dense one is the baseline to compare with: it gets
  the same kept tokens and a learned mask token for each other one, and all L tokens pass through it.
- The content of removed patches is used in the loss only, as the target.
- The loss is the mean over a token's values, then over removed tokens that are predicted.
- Shapes are static and no value is read back to the host, so `torch.compile(fullgraph=True)` compiles one whole graph.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from reelmae.model.config import MAEConfig
from reelmae.model.decoder import Decoder
from reelmae.model.targets import Targets
from reelmae.model.vit import Blocks, Encoder


class MAEOutput(NamedTuple):
    """Results of a forward pass. All but `ids_BQ` are float."""

    loss: Tensor
    """The loss to minimise: a scalar, float32."""

    losses: dict[str, Tensor]
    """Its parts without weights: `space`, and `motion` where the config has motion."""

    preds: dict[str, Tensor]
    """Predictions of the tokens `ids_BQ`, under the same names: [B, Q, P]."""

    ids_BQ: Tensor
    """Numbers of the predicted tokens: int64."""

    weight_BQ: Tensor | None
    """1 where a token counts in the loss, because it was removed, else 0. None: all count."""


class MaskedAutoencoder(nn.Module):
    """Encoder, decoder or decoders, and loss."""

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, dense=config.encoder == "dense")
        self.targets = Targets(config)
        decoders = config.motion.decoders if config.motion else None
        shared = config.pixel_values if decoders == "shared" else None
        self.decoder = Decoder(config, config.target_values, motion_values=shared)
        self.motion_decoder = Decoder(config, config.pixel_values) if decoders == "separate" else None

    def forward(self, clips_BCTHW: Tensor, ids_keep_BK: Tensor, ids_decode_BQ: Tensor | None = None) -> MAEOutput:
        """Predict and compare with the targets.

        `clips_BCTHW`: float, normalised with the config's pixel statistics.
        `ids_keep_BK`: int64 numbers of the kept tokens, distinct, in any order.
        `ids_decode_BQ`: numbers of the tokens to predict; None means all removed ones. Kept tokens among them are
        predicted from a mask token too, and do not count in the loss.
        """
        self._check(clips_BCTHW, ids_keep_BK, ids_decode_BQ)
        ids_rest_BR = complement(ids_keep_BK, self.config.n_tokens)
        ids_BQ = ids_rest_BR if ids_decode_BQ is None else ids_decode_BQ
        preds = {
            name: head(rows[:, ids_keep_BK.shape[1] :])
            for name, (rows, head) in self._decode(clips_BCTHW, ids_keep_BK, ids_rest_BR, ids_BQ).items()
        }
        weight_BQ = None
        if ids_decode_BQ is not None:
            weight_BL = torch.ones_like(ids_keep_BK[:, :1], dtype=torch.float32).repeat(1, self.config.n_tokens)
            weight_BQ = weight_BL.scatter(1, ids_keep_BK, 0.0).gather(1, ids_BQ)
        losses = {"space": mean_squared_error(preds["space"], self.targets.space(clips_BCTHW, ids_BQ), weight_BQ)}
        loss = losses["space"]
        if self.config.motion is not None:
            target_BQP = self.targets.motion(clips_BCTHW, ids_BQ)
            losses["motion"] = mean_squared_error(preds["motion"], target_BQP, weight_BQ)
            loss = loss + self.config.motion.weight * losses["motion"]
        return MAEOutput(loss, losses, preds, ids_BQ, weight_BQ)

    def encode(self, clips_BCTHW: Tensor, ids_BK: Tensor | None = None) -> Tensor:
        """Latents without the class token: with ids [B, K, D] in their order, without ids [B, L, D] of all tokens.

        A dense encoder with ids gives all L tokens, the kept ones first.
        """
        rest = None if ids_BK is None else complement(ids_BK, self.config.n_tokens)
        return self.encoder(clips_BCTHW, ids_BK, rest)[:, self.encoder.n_prefix :]

    def predict(self, clips_BCTHW: Tensor, ids_keep_BK: Tensor, what: Literal["space", "motion"] = "space") -> Tensor:
        """The prediction of all tokens, kept ones too: pred_BLP. ValueError where the model does not predict `what`."""
        self._check(clips_BCTHW, ids_keep_BK, None)
        if what != "space" and self.config.motion is None:
            raise ValueError(f"what={what!r}: this model predicts 'space' only")
        ids_rest_BR = complement(ids_keep_BK, self.config.n_tokens)
        rows, head = self._decode(clips_BCTHW, ids_keep_BK, ids_rest_BR, ids_rest_BR)[what]
        pred_BLP = head(rows)
        place_BL = torch.cat((ids_keep_BK, ids_rest_BR), dim=1).argsort(dim=1)
        return pred_BLP.gather(1, place_BL[..., None].expand_as(pred_BLP))

    def to_clip(self, pred_BLP: Tensor, clips_BCTHW: Tensor) -> Tensor:
        """See `Targets.to_clip`."""
        return self.targets.to_clip(pred_BLP, clips_BCTHW)

    def set_checkpointing(self, on: bool) -> None:
        """Switch activation checkpointing: backward then computes the activations inside a block again."""
        for module in self.modules():
            if isinstance(module, Blocks):
                module.checkpointing = on

    def _decode(
        self, clips_BCTHW: Tensor, ids_keep_BK: Tensor, ids_rest_BR: Tensor, ids_BQ: Tensor
    ) -> dict[str, tuple[Tensor, nn.Module]]:
        """For space and motion: the decoder's rows of kept and predicted tokens, and the last layer over them."""
        latent_BND = self.encoder(clips_BCTHW, ids_keep_BK, ids_rest_BR)
        latent_BQD = None
        if self.config.encoder == "dense":
            kept = self.encoder.n_prefix + ids_keep_BK.shape[1]
            latent_BND, latent_BQD = latent_BND[:, :kept], latent_BND
            if ids_BQ is ids_rest_BR:
                latent_BQD = latent_BQD[:, kept:]
            else:  # the encoder's rows begin with the kept tokens: find the row of each predicted one
                place_BL = torch.cat((ids_keep_BK, ids_rest_BR), dim=1).argsort(dim=1)
                row_BQ = place_BL.gather(1, ids_BQ) + self.encoder.n_prefix
                latent_BQD = latent_BQD.gather(1, row_BQ[..., None].expand(-1, -1, latent_BQD.shape[-1]))
        rows = self.decoder(latent_BND, ids_keep_BK, ids_BQ, latent_BQD)
        result: dict[str, tuple[Tensor, nn.Module]] = {"space": (rows, self.decoder.pred)}
        if self.motion_decoder is not None:
            rows = self.motion_decoder(latent_BND, ids_keep_BK, ids_BQ, latent_BQD)
            result["motion"] = (rows, self.motion_decoder.pred)
        elif self.decoder.pred_motion is not None:
            result["motion"] = (rows, self.decoder.pred_motion)
        return result

    def _check(self, clips_BCTHW: Tensor, ids_keep_BK: Tensor, ids_decode_BQ: Tensor | None) -> None:
        for name, ids in (("ids_keep", ids_keep_BK), ("ids_decode", ids_decode_BQ)):
            if ids is not None and (ids.dim() != 2 or ids.shape[0] != clips_BCTHW.shape[0]):
                raise ValueError(f"{name} of {tuple(ids.shape)}: give [{clips_BCTHW.shape[0]}, tokens]")
        tokens = self.config.n_tokens
        if not 0 < ids_keep_BK.shape[1] < tokens:
            raise ValueError(f"{ids_keep_BK.shape[1]} kept tokens of {tokens}: keep at least 1 and remove at least 1")


def complement(ids_keep_BK: Tensor, n_tokens: int) -> Tensor:
    """Numbers of the tokens that are not kept, ascending: int64 [B, n_tokens - K]."""
    kept_BL = torch.zeros_like(ids_keep_BK[:, :1], dtype=torch.uint8).repeat(1, n_tokens)
    kept_BL = kept_BL.scatter(1, ids_keep_BK, 1)
    return kept_BL.argsort(dim=1, stable=True)[:, : n_tokens - ids_keep_BK.shape[1]]


def mean_squared_error(pred_BQP: Tensor, target_BQP: Tensor, weight_BQ: Tensor | None = None) -> Tensor:
    """Squared error: mean over each token's values, then over the tokens. Tokens of weight 0 are left out. float32."""
    loss_BQ = (pred_BQP.float() - target_BQP).square().mean(dim=-1)
    if weight_BQ is None:
        return loss_BQ.mean()
    return (loss_BQ * weight_BQ).sum() / weight_BQ.sum().clamp(min=1)
