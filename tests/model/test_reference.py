"""Numerical equality with the reference codes: every .npz of REELMAE_FIXTURES.

Each file says what model it is (`cfg/*`), holds that model's weights under the reference's own names (`sd/*`), an
input, and what the reference made of it: predictions, latents, targets, losses, gradient norms, logits. The model is
built from the former, the weights go through our importer, and all of the latter must come out.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reelmae.model.classifier import ClassifierConfig
from reelmae.model.config import MAEConfig, ViTConfig, mae_config, slowfast_config, videomae_config
from reelmae.model.mae import MaskedAutoencoder, mean_squared_error
from reelmae.model.weights import load_into
from reelmae.model.weights.layouts import detect, from_ours
from reelmae.model.weights.models import build

REPO = Path(__file__).parents[2]
SHARED = Path(os.environ.get("REELMAE_SHARED", REPO.parent / "shared"))
FIXTURES = Path(os.environ.get("REELMAE_FIXTURES", SHARED / "reference"))
FILES = sorted(FIXTURES.glob("*.npz"))
pytestmark = pytest.mark.skipif(not FILES, reason=f"no .npz in {FIXTURES}")

IMAGENET: dict[str, Any] = {"pixel_mean": (0.485, 0.456, 0.406), "pixel_std": (0.229, 0.224, 0.225)}
MAE_ST, MAE_ST_FINETUNED, SLOWFAST, VIDEOMAE, VIDEOMAE_FINETUNED = range(5)
LAYOUTS = ("mae_st", "mae_st_classifier", "slowfast", "videomae", "videomae_classifier")
PREDICTION, LOGITS, LOSS, GRADIENT, ZERO = (
    2e-5,
    5e-6,
    2e-6,
    1e-4,
    1e-6,
)  # what may differ; GRADIENT is relative


def files(*kinds: int) -> Any:
    """The files of these kinds, as parameters of the fixture that opens them."""
    some = [path for path in FILES if int(np.load(path, allow_pickle=False)["cfg/kind"]) in kinds]
    return pytest.mark.parametrize("reference", some, ids=lambda path: path.stem, indirect=True)


every_model = files(*range(5))
autoencoders = files(MAE_ST, SLOWFAST, VIDEOMAE)
classifiers = files(MAE_ST_FINETUNED, VIDEOMAE_FINETUNED)
fixed_positions = files(VIDEOMAE, VIDEOMAE_FINETUNED)


def config_of(cfg: dict[str, Any]) -> ViTConfig:
    """The config of the model that a file's `cfg/*` describe."""
    sizes = {
        "frames": cfg["num_frames"],
        "size": cfg["img_size"],
        "patch": cfg["patch_size"],
        "t_patch": cfg["t_patch_size"],
        "dim": cfg["embed_dim"],
        "depth": cfg["depth"],
        "heads": cfg["num_heads"],
        "mlp_ratio": cfg["mlp_ratio"],
    }
    decoder = {"decoder_dim": cfg.get("decoder_embed_dim"), "decoder_depth": cfg.get("decoder_depth")}
    kind = cfg["kind"]
    pos = "separable" if cfg.get("sep_pos_embed", 1) else "joint"
    cls = bool(cfg.get("cls_embed", 1))
    if kind == MAE_ST:
        return mae_config(
            "B",
            **sizes,
            **decoder,
            decoder_heads=cfg["decoder_num_heads"],
            pred_t_dim=cfg["pred_t_dim"],
            pos=pos,
            decoder_pos=pos,
            cls_token=cls,
            decoder_cls="own" if cls else "none",
        )
    if kind == SLOWFAST:
        return slowfast_config("B", **sizes, **decoder, pos=pos)
    if kind == VIDEOMAE:
        return videomae_config("B", **sizes, **decoder, decoder_heads=cfg["decoder_num_heads"], **IMAGENET)
    if kind == MAE_ST_FINETUNED:
        return ClassifierConfig(**sizes, pos=pos, cls_token=cls, classes=cfg["num_classes"])
    assert kind == VIDEOMAE_FINETUNED, kind
    return ClassifierConfig(**sizes, pos="sinusoid", cls_token=False, qkv_bias="qv", classes=cfg["num_classes"])


class Fixture:
    def __init__(self, path: Path) -> None:
        self.data = dict(np.load(path, allow_pickle=False))
        self.cfg = {n.removeprefix("cfg/"): v.item() for n, v in self.data.items() if n.startswith("cfg/")}
        self.theirs = {n.removeprefix("sd/"): torch.from_numpy(v) for n, v in self.data.items() if n.startswith("sd/")}
        self.layout = LAYOUTS[self.cfg["kind"]]
        self.config = config_of(self.cfg)
        self.model = build(self.config).eval()
        self.report = load_into(self.model, self.theirs, self.layout)
        self.clips = torch.from_numpy(self.data["clip"])

    @property
    def ids_keep(self) -> Tensor:
        if "ids_keep" in self.data:
            return torch.from_numpy(self.data["ids_keep"])
        mask = torch.from_numpy(self.data["mask"])
        return mask.argsort(dim=1, stable=True)[:, : int((mask[0] == 0).sum())]

    def distance(self, name: str, ours: Tensor) -> float:
        """The largest difference to what the file holds, which must have as many values."""
        theirs = self.data[name]
        assert ours.numel() == theirs.size, name
        return float(np.abs(ours.detach().numpy().reshape(theirs.shape) - theirs).max())


@pytest.fixture
def reference(request: pytest.FixtureRequest) -> Fixture:
    return Fixture(request.param)


@every_model
def test_every_weight_of_the_reference_has_its_place(reference: Fixture) -> None:
    assert detect(reference.theirs) == reference.layout
    assert reference.report.left == reference.report.missing == []
    assert reference.report.resized == {}


@classifiers
def test_logits_are_the_references(reference: Fixture) -> None:
    model = reference.model
    assert reference.distance("pooled", model.features(reference.clips)) <= LOGITS
    logits = model(reference.clips)
    assert reference.distance("logits", logits) <= LOGITS
    assert reference.distance("logits_f64", logits) <= LOGITS


@autoencoders
def test_predictions_and_latents_are_the_references(reference: Fixture) -> None:
    model, clips, ids_keep = reference.model, reference.clips, reference.ids_keep
    out = model(clips, ids_keep)
    kept_BL = torch.ones(len(clips), model.config.n_tokens).scatter(1, ids_keep, 0.0)
    assert np.array_equal(kept_BL.numpy(), reference.data["mask"])
    whole = reference.cfg["kind"] == MAE_ST  # predicts kept tokens, too
    pred = model.predict(clips, ids_keep) if whole else out.preds["space"]
    assert reference.distance("pred", pred) <= PREDICTION
    latent = model.encoder(clips, ids_keep)
    if whole:
        latent = latent[:, model.encoder.n_prefix :]
    assert reference.distance("latent", latent) <= PREDICTION


@autoencoders
def test_targets_and_losses_are_the_references(reference: Fixture) -> None:
    model, clips = reference.model, reference.clips
    out = model(clips, reference.ids_keep)
    assert abs(out.loss.item() - reference.data["loss_f64"]) <= LOSS
    if "target_frame_index" in reference.data:
        assert model.config.target_frame_index() == reference.data["target_frame_index"].tolist()
    plain = MaskedAutoencoder(MAEConfig(**{**vars(model.config), "target_norm": "none"}))
    loss = mean_squared_error(out.preds["space"], plain.targets.space(clips, out.ids_BQ))
    assert abs(loss.item() - reference.data["loss_raw_f64"]) <= LOSS
    if "labels" in reference.data:
        assert reference.distance("labels", model.targets.space(clips, out.ids_BQ)) <= PREDICTION
    if "target" in reference.data:
        everything = torch.arange(model.config.n_tokens).expand(len(clips), -1)
        assert reference.distance("target", model.targets.space(clips, everything)) <= PREDICTION


@autoencoders
def test_gradient_norms_are_the_references(reference: Fixture) -> None:
    model = reference.model
    model(reference.clips, reference.ids_keep).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    theirs = from_ours(grads, reference.layout, model.config)
    for name in list(reference.theirs):
        if ".attn.qkv." in name and name not in theirs:  # the file has them fused, we write them apart
            theirs[name] = torch.cat([theirs.pop(name.replace(".qkv.", f".{part}.")) for part in "qkv"])
    norms = {n.removeprefix("gnorm/"): float(v) for n, v in reference.data.items() if n.startswith("gnorm/")}
    assert theirs.keys() == norms.keys()
    for name, expected in norms.items():
        norm = theirs[name].double().norm().item()
        if name.endswith("attn.k.bias"):  # zero, but for rounding: the softmax does not see it
            assert norm <= ZERO, name
        else:
            assert norm == pytest.approx(expected, rel=GRADIENT), name
    total = sum(g.double().square().sum() for g in grads.values()) ** 0.5
    assert float(total) == pytest.approx(float(reference.data["gnorm_total"]), rel=GRADIENT)


@fixed_positions
def test_positions_are_the_references(reference: Fixture) -> None:
    given = [name for name in ("pos_embed", "pos_embed_encoder", "pos_embed_decoder") if name in reference.data]
    assert given
    for name in given:
        part = reference.model.decoder if name.endswith("decoder") else reference.model.encoder
        assert reference.distance(name, part.pos.tokens()) <= 1e-7


@every_model
def test_weights_come_back_as_they_were(reference: Fixture) -> None:
    back = from_ours(reference.model.state_dict(), reference.layout, reference.config)
    for name, value in reference.theirs.items():
        if ".attn.qkv." in name and name not in back:
            back[name] = torch.cat([back.pop(name.replace(".qkv.", f".{part}.")) for part in "qkv"])
        assert torch.equal(back[name], value), name
    assert back.keys() == reference.theirs.keys()
