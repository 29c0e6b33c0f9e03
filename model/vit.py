"""The video ViT: patches to latents. It is pretrained, fine-tuned, probed and exported.

Legend: B batch, C channel, T frame, L token, K kept token, R removed token, D width.

Properties that hold:
- With ids only the kept patches are read, embedded and moved: a gather and one matrix product.
- A dense encoder puts a learned mask token in the place of each removed one, and all L pass through the blocks.
- Shapes are static and no value is read back to the host, so `torch.compile(fullgraph=True)` compiles one whole graph.
"""

from __future__ import annotations

from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reelmae.model.config import CHANNELS, ViTConfig
from reelmae.model.linear import Linear, QVLinear
from reelmae.model.patches import gather_patches, patchify
from reelmae.model.positions import positions

EPS = 1e-6
"""Of every LayerNorm."""


class Blocks(nn.ModuleList):
    """`depth` pre-norm blocks, one after the other: exact GELU, LayerNorm eps 1e-6, fused attention."""

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        *,
        qkv_bias: str = "qkv",
        drop_path: float = 0.0,
    ) -> None:
        norm = partial(nn.LayerNorm, eps=EPS)
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        super().__init__(
            Block(dim, heads, mlp_ratio, qkv_bias=True, norm_layer=norm, act_layer=nn.GELU, drop_path=rate)
            for rate in rates
        )
        self.checkpointing = False
        for block in self:
            _use_our_linears(block)
            if qkv_bias == "qv":
                block.get_submodule("attn").qkv = QVLinear(dim)

    def forward(self, x_BND: Tensor) -> Tensor:
        """[B, N, D] → [B, N, D]. With `checkpointing`, backward computes the activations inside a block again."""
        for block in self:
            if self.checkpointing and self.training and torch.is_grad_enabled():
                x_BND = checkpoint(block, x_BND, use_reentrant=False)
            else:
                x_BND = block(x_BND)
        return x_BND


def _use_our_linears(block: nn.Module) -> None:
    for module in list(block.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                bias = child.bias is not None
                setattr(module, name, Linear(child.in_features, child.out_features, bias=bias))


class Encoder(nn.Module):
    """Patches to latents. The class token, where the config has one, is row 0.

    `patch_embed` is a Linear over a patch's values in the order of `patchify` (frame in tube, row, column,
    channel); a Conv3d kernel [D, C, t, p, p] becomes its weight by `permute(0, 2, 3, 4, 1).flatten(1)`.

    `dense`: has a mask token. `norm`: ends with a LayerNorm.
    `drop_path`: rate of stochastic depth in the last block. It grows linearly from 0 in the first.
    """

    def __init__(self, config: ViTConfig, *, dense: bool = False, norm: bool = True, drop_path: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = Linear(config.patch_values, config.dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.dim)) if config.cls_token else None
        self.pos = positions(config.pos, config.grid_THW, config.dim, cls=config.cls_token, init=config.pos_init)
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.dim)) if dense else None
        self.blocks = Blocks(
            config.dim,
            config.depth,
            config.heads,
            config.mlp_ratio,
            qkv_bias=config.qkv_bias,
            drop_path=drop_path,
        )
        self.norm = nn.LayerNorm(config.dim, eps=EPS) if norm else nn.Identity()
        initialise(self, config)

    @property
    def n_prefix(self) -> int:
        """Rows before the tokens: 1 with a class token."""
        return int(self.config.cls_token)

    def forward(self, clips_BCTHW: Tensor, ids_BK: Tensor | None = None, ids_rest_BR: Tensor | None = None) -> Tensor:
        """Latents: with ids [B, n_prefix + K, D] in their order, without ids [B, n_prefix + L, D] by token number.

        Dense with ids: [B, n_prefix + L, D], first the kept tokens, then the removed ones (`ids_rest_BR`).
        """
        return self.norm(self.blocks(self.embed(clips_BCTHW, ids_BK, ids_rest_BR)))

    def embed(self, clips_BCTHW: Tensor, ids_BK: Tensor | None = None, ids_rest_BR: Tensor | None = None) -> Tensor:
        """Tokens with positions and class token, before the blocks. ValueError where the clips have another size."""
        c = self.config
        expected = (CHANNELS, c.frames, c.size, c.size)
        if tuple(clips_BCTHW.shape[1:]) != expected:
            raise ValueError(
                f"clips of {tuple(clips_BCTHW.shape)}: this model takes [B, {', '.join(map(str, expected))}]"
            )
        if ids_BK is None:
            x_BND = self.patch_embed(patchify(clips_BCTHW, c.t_patch, c.patch)) + self.pos.tokens()
        else:
            patches_BKP = gather_patches(clips_BCTHW, ids_BK, c.t_patch, c.patch)
            x_BND = self.patch_embed(patches_BKP)
            if self.mask_token is not None:
                assert ids_rest_BR is not None, "a dense encoder needs the removed tokens, ids_rest_BR"
                removed = self.mask_token.to(x_BND.dtype).expand(len(x_BND), ids_rest_BR.shape[1], -1)
                x_BND = torch.cat((x_BND, removed), dim=1)
                ids_BK = torch.cat((ids_BK, ids_rest_BR), dim=1)
            x_BND = x_BND + self.pos.at(ids_BK)
        if self.cls_token is None:
            return x_BND
        assert self.pos.cls is not None
        cls_B1D = (self.cls_token + self.pos.cls).to(x_BND.dtype).expand(len(x_BND), -1, -1)
        return torch.cat((cls_B1D, x_BND), dim=1)


@torch.no_grad()
def initialise(module: nn.Module, config: ViTConfig) -> None:
    """Initialise an encoder or a decoder as the reference codes do. Where a paper says something else, the code counts.

    - Both: xavier-uniform weights of Linears, biases 0, the patch embedding's bias as in a torch convolution.
    - MAE-ST: q, k and v each on their own, the patch kernel as a Linear, the encoder's class token trunc-normal(0.02),
      the decoder's 0, mask tokens normal(0.02).
    - VideoMAE (`qkv_bias` is qv): q, k and v as one matrix, the patch kernel and the layer between encoder and decoder
      as torch initialises them, mask tokens normal(0.02) cut at one deviation.
    """
    videomae = config.qkv_bias == "qv"
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    for part in module.modules():
        if isinstance(part, Block):
            for weight in [part.attn.qkv.weight] if videomae else part.attn.qkv.weight.chunk(3):
                nn.init.xavier_uniform_(weight)
    for name, parameter in module.named_parameters():
        plain = name == "patch_embed.bias" or (
            videomae and name in ("patch_embed.weight", "embed.weight", "embed.bias")
        )
        if plain:
            layer = module.get_submodule(name.partition(".")[0])
            assert isinstance(layer, nn.Linear)
            bound = layer.weight.shape[1] ** -0.5  # torch's own bound for a layer with so many inputs
            nn.init.uniform_(parameter, -bound, bound)
        elif name == "cls_token":
            if isinstance(module, Encoder):
                nn.init.trunc_normal_(parameter, std=0.02)
            else:
                nn.init.zeros_(parameter)
        elif name == "mask_token" and videomae:
            nn.init.trunc_normal_(parameter, std=0.02, a=-0.02, b=0.02)
        elif name == "mask_token":
            nn.init.normal_(parameter, std=0.02)
