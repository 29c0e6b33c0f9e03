"""The decoder: from latents of the kept tokens to predictions of other tokens.

Legend: B batch, K kept token, Q predicted token, D encoder width, E decoder width, P predicted values.

Properties that hold:
- Rows are the kept tokens, then the predicted ones. Attention does not depend on the order of rows, so none is
  scattered back to its place.
- Predicted are all removed tokens, or a part of them with decoder masking (VideoMAE V2, arXiv 2303.16727). Other tokens
  have no row.
- Only predicted rows reach the last layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reelmae.model.config import MAEConfig
from reelmae.model.linear import Linear
from reelmae.model.positions import positions
from reelmae.model.vit import EPS, Blocks, initialise


class Decoder(nn.Module):
    """Decoder of a MaskedAutoencoder.

    `values`: outputs for each token, by the last layer `pred`.
    `motion_values`: outputs of a second last layer, `pred_motion`. None: there is no such layer.
    """

    def __init__(self, config: MAEConfig, values: int, motion_values: int | None = None) -> None:
        super().__init__()
        self.config = config
        dim, cls = config.decoder_dim, config.decoder_cls
        self.embed = Linear(config.dim, dim, bias=config.embed_bias)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if cls == "own" else None
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim)) if config.encoder == "sparse" else None
        self.pos = positions(config.decoder_pos, config.grid_THW, dim, cls=cls != "none", init=config.pos_init)
        self.blocks = Blocks(
            dim, config.decoder_depth, config.decoder_heads, config.mlp_ratio, qkv_bias=config.qkv_bias
        )
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.pred = Linear(dim, values)
        self.pred_motion = Linear(dim, motion_values) if motion_values else None
        initialise(self, config)

    def forward(
        self, latent_BND: Tensor, ids_keep_BK: Tensor, ids_BQ: Tensor, latent_BQD: Tensor | None = None
    ) -> Tensor:
        """Rows of kept and predicted tokens after the last norm: [B, K + Q, E]. `pred` and `pred_motion` read them.

        `latent_BND`: the encoder's rows of its class token, where it has one, and of the kept tokens.
        `latent_BQD`: the encoder's rows of the predicted tokens, where it is dense.
        """
        prefix = latent_BND.shape[1] - ids_keep_BK.shape[1]
        carried = self.config.decoder_cls == "carried"
        x = self.embed(latent_BND if carried else latent_BND[:, prefix:])
        cls, kept_BKE = (x[:, :prefix], x[:, prefix:]) if carried else (None, x)
        if latent_BQD is None:
            assert self.mask_token is not None
            wanted_BQE = self.mask_token.to(x.dtype).expand(len(x), ids_BQ.shape[1], -1)
        else:
            wanted_BQE = self.embed(latent_BQD)
        rows = torch.cat((kept_BKE, wanted_BQE), dim=1)
        rows = rows + self.pos.at(torch.cat((ids_keep_BK, ids_BQ), dim=1))
        if self.cls_token is not None:
            cls = self.cls_token.to(rows.dtype).expand(len(x), -1, -1)
        if cls is None:
            return self.norm(self.blocks(rows))
        assert self.pos.cls is not None
        rows = self.blocks(torch.cat(((cls + self.pos.cls).to(rows.dtype), rows), dim=1))
        return self.norm(rows[:, 1:])
