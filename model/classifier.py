"""What is put on a pretrained encoder: a classifier to fine-tune, and probes over frozen features.

    clips_BCTHW ── encoder, without its last norm ── mean of the tokens ── norm ── dropout ── head ── logits_BN
    frozen tokens_BLD ── their mean, pooled_BD ── LinearProbe ── logits_BN
                     └── AttentiveProbe ── logits_BN

Properties that hold:
- the classifier is that of MAE-ST (arXiv 2205.09113) and of VideoMAE (arXiv 2203.12602): it pools first and normalises
  then, and the class token, which goes through the blocks, is left out of the mean;
- a pretrained encoder's last norm is what `norm` begins from, where its weights are loaded (MAE-ST);
- shapes are static and nothing is read back to the host: `torch.compile(fullgraph=True)` takes each whole.

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

HEAD_STD = 2e-5  # of its weights at the start, when it is fine-tuned (mae_st)
PROBE_STD = 0.01  # of a probe's, as in MAE's linear probing
PROBE_HEAD_WIDTH = 64


@dataclass(frozen=True)
class ClassifierConfig(ViTConfig):
    """A Classifier; as it stands MAE-ST's ViT-B for Kinetics-400.

    `dropout`: before the head. `drop_path`: the last block's rate, the first has 0.
    """

    classes: int = 400
    dropout: float = 0.0
    drop_path: float = 0.0

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
        """Logits [B, N] of clips that are float and normalised."""
        return self.head(self.dropout(self.pooled(clips_BCTHW)))

    def pooled(self, clips_BCTHW: Tensor) -> Tensor:
        """What the head reads, before dropout: [B, D]. ValueError where the clips are of another size."""
        return self.norm(self.encoder(clips_BCTHW)[:, self.encoder.n_prefix :].mean(dim=1))


class LinearProbe(nn.Module):
    """Linear probing as in MAE (arXiv 2111.06377, A.1): batch norm without parameters of its own, then a linear layer.

    The norm brings features of any scale to one, so that a rate of learning serves all encoders.
    """

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=EPS)
        self.head = _head(dim, classes, PROBE_STD)

    def forward(self, pooled_BD: Tensor) -> Tensor:
        """Logits [B, N] of frozen features."""
        return self.head(self.norm(pooled_BD))


class AttentiveProbe(nn.Module):
    """Attentive probing as in V-JEPA (arXiv 2404.08471): one learned query looks at all frozen tokens, then a two-layer
    MLP beside a shortcut, then a linear layer. Its shortcut past the attention is left out: it would add the query, which is
    a constant, as the attention's bias already does.

    The tokens are normalised first, as they come from encoders of any scale. `heads` is dim / 64 unless given;
    ValueError where it does not divide `dim`.
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
        """Logits [B, N] of frozen tokens, any number of them."""
        return self.head(self.pool(self.norm(tokens_BLD)))


def _head(dim: int, classes: int, std: float) -> Linear:
    require(classes >= 1, f"classes={classes}", "give at least 1")
    head = Linear(dim, classes)
    nn.init.trunc_normal_(head.weight, std=std)
    nn.init.zeros_(head.bias)
    return head
