"""Heads for a pretrained encoder: a classifier to fine-tune, and probes over frozen features.

    clips_BCTHW ── encoder, without its last norm ── mean of the tokens ── norm ── dropout ── head ── logits_BN
    frozen tokens_BLD ── their mean, pooled_BD ── LinearProbe ── logits_BN
                     └── AttentiveProbe ── logits_BN

Properties that hold:
- The classifier is that of MAE-ST (arXiv 2205.09113) and of VideoMAE (arXiv 2203.12602). It pools first and normalises
  then. The class token passes through the blocks, but is not in the mean.
- In MAE-ST `norm` starts from the pretrained encoder's last norm.
- Shapes are static and no value is read back to the host, so `torch.compile(fullgraph=True)` compiles one whole graph.

Legend: B batch, C channel, T frame, H height, W width, L token, D width, N class.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from reelmae.model.config import ViTConfig, is_count, require
from reelmae.model.linear import Linear
from reelmae.model.vit import EPS, Encoder

HEAD_STD = 2e-5
"""Deviation of a classifier's initial head weights, as in mae_st."""

PROBE_STD = 0.01
"""Deviation of a probe's initial head weights, as in MAE's linear probing."""

PROBE_HEAD_WIDTH = 64
"""Width of an attentive probe's attention heads."""


@dataclass(frozen=True)
class ClassifierConfig(ViTConfig):
    """A Classifier. The defaults are MAE-ST's ViT-B for Kinetics-400."""

    classes: int = 400
    """Number of classes."""

    dropout: float = 0.0
    """Rate of the dropout before the head."""

    drop_path: float = 0.0
    """Rate of stochastic depth in the last block. It grows linearly from 0 in the first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_count(self.classes), f"classes={self.classes}", "give a whole number, at least 1")
        for name in ("dropout", "drop_path"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name}={value}", "give a share from 0 to below 1")


class Classifier(nn.Module):
    """Clips to logits. Parameters: `encoder.*`, `norm.*`, `head.*`."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, norm=False, drop_path=config.drop_path)
        self.norm = nn.LayerNorm(config.dim, eps=EPS)
        self.dropout = nn.Dropout(config.dropout)
        self.head = _head(config.dim, config.classes, HEAD_STD)

    def forward(self, clips_BCTHW: Tensor) -> Tensor:
        """Logits [B, N] of clips that are float and normalised with the config's pixel statistics."""
        return self.head(self.dropout(self.features(clips_BCTHW)))

    def features(self, clips_BCTHW: Tensor) -> Tensor:
        """The head's input before dropout: [B, D]. ValueError where the clips have another size."""
        return self.norm(self.encoder(clips_BCTHW)[:, self.encoder.n_prefix :].mean(dim=1))


class LinearProbe(nn.Module):
    """Linear probing as in MAE (arXiv 2111.06377, A.1): batch norm without parameters, then a linear layer.

    The norm brings features of all encoders to the same scale, so that one learning rate fits them.
    """

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=EPS)
        self.head = _head(dim, classes, PROBE_STD)

    def forward(self, pooled_BD: Tensor) -> Tensor:
        """Logits [B, N] of frozen features."""
        return self.head(self.norm(pooled_BD))


class AttentiveProbe(nn.Module):
    """Attentive probing as in V-JEPA (arXiv 2404.08471): one learned query attends to all frozen tokens, then a
    two-layer MLP with a residual connection, then a linear layer.

    V-JEPA's residual connection around the attention is left out. It would add the query, which is a constant, and the
    attention's bias already adds one. The tokens are normalised first, because encoders differ in scale.

    `heads`: dim / 64 unless given. ValueError where it does not divide `dim`.
    """

    def __init__(self, dim: int, classes: int, *, heads: int | None = None) -> None:
        super().__init__()
        heads = max(1, dim // PROBE_HEAD_WIDTH) if heads is None else heads
        require(heads >= 1 and dim % heads == 0, f"heads={heads}", f"give a number that divides dim={dim}")
        norm = partial(nn.LayerNorm, eps=EPS)
        self.norm = norm(dim)
        self.pool = AttentionPoolLatent(dim, num_heads=heads, norm_layer=norm)
        self.head = _head(dim, classes, PROBE_STD)

    def forward(self, tokens_BLD: Tensor) -> Tensor:
        """Logits [B, N] of any number of frozen tokens."""
        return self.head(self.pool(self.norm(tokens_BLD)))


def _head(dim: int, classes: int, std: float) -> Linear:
    require(classes >= 1, f"classes={classes}", "give at least 1")
    head = Linear(dim, classes)
    nn.init.trunc_normal_(head.weight, std=std)
    nn.init.zeros_(head.bias)
    return head
