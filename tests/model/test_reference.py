"""Numerical equality with the reference: every `mae_st_pretrain_*` file of REELMAE_FIXTURES."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from reelmae.model.mae import MAEConfig, MaskedAutoencoder, masked_loss

REPO = Path(__file__).parents[2]
SHARED = Path(os.environ.get("REELMAE_SHARED", REPO.parent / "shared"))
FIXTURES = Path(os.environ.get("REELMAE_FIXTURES", SHARED / "reference"))
FILES = sorted(FIXTURES.glob("mae_st_pretrain_*.npz"))
pytestmark = pytest.mark.skipif(not FILES, reason=f"no mae_st_pretrain_*.npz in {FIXTURES}")

RENAMED = [  # reference prefix → ours; longest first
    ("decoder_pos_embed_class", "decoder.pos.cls"),
    ("decoder_pos_embed_", "decoder.pos."),
    ("decoder_blocks.", "decoder.blocks."),
    ("decoder_", "decoder."),
    ("mask_token", "decoder.mask_token"),
    ("pos_embed_class", "encoder.pos.cls"),
    ("pos_embed_", "encoder.pos."),
    ("patch_embed.proj.", "encoder.patch_embed."),
    ("", "encoder."),
]


def our_name(name: str) -> str:
    prefix, ours = next(pair for pair in RENAMED if name.startswith(pair[0]))
    return ours + name.removeprefix(prefix)


def our_state(reference: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reference's state under our names: q, k, v fused, the convolution as a matrix."""
    state = {}
    for name, value in reference.items():
        if ".attn.q." in name:
            parts = [reference[name.replace(".attn.q.", f".attn.{part}.")] for part in "qkv"]
            state[our_name(name.replace(".attn.q.", ".attn.qkv."))] = torch.cat(parts)
        elif ".attn.k." not in name and ".attn.v." not in name:
            if name == "patch_embed.proj.weight":
                value = value.permute(0, 2, 3, 4, 1).flatten(1)
            state[our_name(name)] = value
    return state


class Fixture:
    def __init__(self, path: Path) -> None:
        self.data = dict(np.load(path, allow_pickle=False))
        cfg = {
            name.removeprefix("cfg/"): v.item() for name, v in self.data.items() if name.startswith("cfg/")
        }
        self.config = MAEConfig(
            frames=cfg["num_frames"], size=cfg["img_size"], patch=cfg["patch_size"], t_patch=cfg["t_patch_size"],
            dim=cfg["embed_dim"], depth=cfg["depth"], heads=cfg["num_heads"],
            decoder_dim=cfg["decoder_embed_dim"], decoder_depth=cfg["decoder_depth"],
            decoder_heads=cfg["decoder_num_heads"], mlp_ratio=cfg["mlp_ratio"], pred_t_dim=cfg["pred_t_dim"],
        )  # fmt: skip
        self.model = MaskedAutoencoder(self.config)
        weights = {
            n.removeprefix("sd/"): torch.from_numpy(v) for n, v in self.data.items() if n.startswith("sd/")
        }
        self.model.load_state_dict(our_state(weights))
        self.clips = torch.from_numpy(self.data["clip"])
        self.ids_keep = torch.from_numpy(self.data["ids_keep"])


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def reference(request: pytest.FixtureRequest) -> Fixture:
    return Fixture(request.param)


def test_prediction_latent_and_loss_are_the_references(reference: Fixture) -> None:
    data, model = reference.data, reference.model
    with torch.no_grad():
        out = model(reference.clips, reference.ids_keep)
        latent = model.encode(reference.clips, reference.ids_keep)
    assert np.array_equal(out.mask_BL.numpy(), data["mask"])
    assert reference.config.target_frame_index() == data["target_frame_index"].tolist()
    assert np.abs(out.pred_BLP.numpy() - data["pred"]).max() <= 2e-5
    assert np.abs(latent.numpy() - data["latent"]).max() <= 2e-5
    assert abs(out.loss.item() - data["loss_f64"]) <= 2e-6
    raw_target = MaskedAutoencoder(MAEConfig(**{**vars(reference.config), "norm_target": False})).targets(
        reference.clips
    )
    assert abs(masked_loss(out.pred_BLP, raw_target, out.mask_BL).item() - data["loss_raw_f64"]) <= 2e-6
    if "target" in data:
        assert np.abs(model.targets(reference.clips).numpy() - data["target"]).max() <= 2e-5


def test_gradient_norms_are_the_references(reference: Fixture) -> None:
    model = reference.model
    model(reference.clips, reference.ids_keep).loss.backward()
    parameters = dict(model.named_parameters())
    total = sum(p.grad.double().square().sum() for p in parameters.values() if p.grad is not None) ** 0.5
    assert total.item() == pytest.approx(float(reference.data["gnorm_total"]), rel=1e-4)
    seen = set()
    for key, expected in reference.data.items():
        name = key.removeprefix("gnorm/")
        if name == key:
            continue
        part = next((i for i, q in enumerate("qkv") if f".attn.{q}." in name), None)
        fused = our_name(name if part is None else name.replace(f".attn.{'qkv'[part]}.", ".attn.qkv."))
        seen.add(fused)
        grad = parameters[fused].grad
        assert grad is not None
        norm = (grad if part is None else grad.chunk(3)[part]).double().norm().item()
        if name.endswith("attn.k.bias"):  # analytically zero: the softmax does not see it
            assert norm <= 1e-6, name
        else:
            assert norm == pytest.approx(float(expected), rel=1e-4), name
    assert seen == set(parameters)
