"""Reference checkpoints and small models of every kind."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reelmae.model.classifier import ClassifierConfig
from reelmae.model.config import MAEConfig, mae_config, motion_config, slowfast_config, videomae_config
from reelmae.model.weights.models import build

REPO = Path(__file__).parents[3]
SHARED = Path(os.environ.get("REELMAE_SHARED", REPO.parent / "shared"))
FIXTURES = Path(os.environ.get("REELMAE_FIXTURES", SHARED / "reference"))
LAYOUT_OF_KIND = ["mae_st", "mae_st_classifier", "slowfast", "videomae", "videomae_classifier"]
SIZES: dict[str, Any] = {
    "frames": 4,
    "size": 24,
    "patch": 8,
    "t_patch": 2,
    "dim": 24,
    "depth": 2,
    "heads": 3,
    "mlp_ratio": 2.0,
}
DECODER: dict[str, Any] = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}


@dataclass(frozen=True)
class Reference:
    """One file of the reference codes; `hints`: what its shapes do not tell."""

    state: dict[str, Tensor]
    layout: str
    cfg: dict[str, Any]
    data: dict[str, np.ndarray]

    @property
    def hints(self) -> dict[str, int]:
        """Heads always; the clip where positions are fixed or joint."""
        hints = {"heads": self.cfg["num_heads"]}
        if "decoder_num_heads" in self.cfg:
            hints["decoder_heads"] = self.cfg["decoder_num_heads"]
        if not self.cfg.get("sep_pos_embed", self.layout == "slowfast"):
            hints |= {"frames": self.cfg["num_frames"], "size": self.cfg["img_size"]}
        return hints


@pytest.fixture(
    params=sorted(FIXTURES.glob("*.npz")) or [pytest.param(None, marks=pytest.mark.skip(f"no *.npz in {FIXTURES}"))],
    ids=lambda path: path.stem if path else "none",
)
def reference(request: pytest.FixtureRequest) -> Reference:
    data = dict(np.load(request.param, allow_pickle=False))
    cfg = {name.removeprefix("cfg/"): v.item() for name, v in data.items() if name.startswith("cfg/")}
    state = {n.removeprefix("sd/"): torch.from_numpy(v) for n, v in data.items() if n.startswith("sd/")}
    return Reference(state, LAYOUT_OF_KIND[cfg["kind"]], cfg, data)


def _small(kind: str, **changes: Any) -> MAEConfig | ClassifierConfig:
    if kind.endswith("_classifier"):
        videomae = {"cls_token": False, "pos": "sinusoid", "qkv_bias": "qv"} if kind.startswith("video") else {}
        return ClassifierConfig(**{**SIZES, "classes": 5, **videomae, **changes})
    make = {
        "mae_st": mae_config,
        "slowfast": slowfast_config,
        "videomae": videomae_config,
        "motion": motion_config,
    }
    decoder = DECODER | ({"decoder_dim": 64, "decoder_heads": 1} if kind == "slowfast" else {})
    return make[kind]("T", **{**SIZES, **decoder, **changes})


def _randomised(config: MAEConfig | ClassifierConfig, seed: int = 0) -> nn.Module:
    model = build(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    return model.eval()


@pytest.fixture
def small() -> Callable[..., Any]:
    """small("mae_st", depth=3) → a small config: mae_st, slowfast, videomae or motion, `…_classifier`."""
    return _small


@pytest.fixture
def randomised() -> Callable[..., Any]:
    """randomised(config, seed) → its model, none of whose tensors is at a neutral value."""
    return _randomised
