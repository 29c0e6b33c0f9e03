"""Configs told from shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from reelmae.model.classifier import ClassifierConfig
from reelmae.model.config import MAEConfig, ViTConfig, slowfast_config
from reelmae.model.mae import MaskedAutoencoder
from reelmae.model.weights import WeightsError
from reelmae.model.weights.infer import infer_config
from reelmae.model.weights.layouts import encoder_part, from_ours

Make = Callable[..., Any]
HEADS = {"heads": 3, "decoder_heads": 2}


def states(config: ViTConfig, randomised: Make, layout: str) -> dict[str, torch.Tensor]:
    return from_ours(randomised(config).state_dict(), layout, config)


def test_the_sizes_of_a_reference_file_are_told(reference: Any) -> None:
    cfg, config = reference.cfg, infer_config(reference.state, reference.layout, **reference.hints)
    names = {
        "num_frames": "frames",
        "img_size": "size",
        "patch_size": "patch",
        "t_patch_size": "t_patch",
        "embed_dim": "dim",
        "depth": "depth",
        "mlp_ratio": "mlp_ratio",
        "decoder_embed_dim": "decoder_dim",
        "decoder_depth": "decoder_depth",
        "num_classes": "classes",
        "num_heads": "heads",
        "decoder_num_heads": "decoder_heads",
    }
    for theirs, ours in names.items():
        if theirs in cfg:
            assert getattr(config, ours) == cfg[theirs], ours
    if "pred_t_dim" in cfg:
        assert config.pred_t_dim == cfg["pred_t_dim"]
    if "target_frame_index" in reference.data:
        assert config.target_frame_index() == reference.data["target_frame_index"].tolist()
    if reference.layout == "slowfast":
        assert config.decoder_heads == max(1, cfg["decoder_embed_dim"] // 64)
    if "sep_pos_embed" in cfg:
        assert (config.pos == "separable", config.cls_token) == (
            bool(cfg["sep_pos_embed"]),
            bool(cfg["cls_embed"]),
        )


@pytest.mark.parametrize(
    ("layout", "changes", "hints"),
    [
        ("mae_st", {"pred_t_dim": 4}, HEADS),
        ("mae_st", {"cls_token": False, "decoder_cls": "none", "pred_t_dim": 2}, HEADS),
        ("mae_st", {"pos": "joint", "decoder_pos": "joint", "pred_t_dim": 2}, HEADS | {"frames": 4}),
        ("mae_st", {"pos": "joint", "decoder_pos": "joint", "pred_t_dim": 2}, HEADS | {"size": 24}),
        ("slowfast", {"pred_t_dim": 2}, {"heads": 3}),
        ("slowfast", {"pred_t_dim": 2, "decoder_pos": "separable"}, {"heads": 3}),
        ("mae_st_classifier", {"classes": 7}, {"heads": 3}),
        ("slowfast_classifier", {"classes": 7}, {"heads": 3}),
    ],
)
def test_a_config_comes_back(
    layout: str, changes: dict[str, Any], hints: dict[str, int], small: Make, randomised: Make
) -> None:
    config = small(layout, **changes)
    assert infer_config(states(config, randomised, layout), layout, **hints) == config


def test_videomae_is_fed_pixels_normalised_as_for_imagenet(small: Make, randomised: Make) -> None:
    for kind, hints in (("videomae", HEADS), ("videomae_classifier", {"heads": 3})):
        config = small(kind)
        found = infer_config(states(config, randomised, kind), kind, frames=4, size=24, **hints)
        assert found.pixel_mean == (0.485, 0.456, 0.406)
        assert dataclasses.replace(found, pixel_mean=config.pixel_mean, pixel_std=config.pixel_std) == config


def test_heads_of_published_widths_are_known() -> None:
    """ViT-L as PySlowFast published it, without its blocks' values."""
    config = slowfast_config("L", depth=1, decoder_depth=1)
    with torch.device("meta"):
        state = MaskedAutoencoder(config).state_dict()
    found = infer_config(from_ours(state, "slowfast", config), "slowfast")
    assert isinstance(found, MAEConfig)
    assert (found.heads, found.decoder_heads, found.frames, found.size) == (16, 8, 16, 224)
    assert dataclasses.replace(found, pred_t_dim=None) == config


def test_heads_of_another_width_are_asked_for(small: Make, randomised: Make) -> None:
    state = states(small("mae_st"), randomised, "mae_st")
    with pytest.raises(WeightsError, match="24 wide; give heads"):
        infer_config(state, "mae_st")
    with pytest.raises(WeightsError, match="16 wide; give decoder_heads"):
        infer_config(state, "mae_st", heads=3)


def test_the_clip_of_a_joint_table_is_asked_for(small: Make, randomised: Make) -> None:
    config = small("mae_st", pos="joint", decoder_pos="joint")
    state = states(config, randomised, "mae_st")
    with pytest.raises(WeightsError, match=r"18 positions.*give frames or size"):
        infer_config(state, "mae_st", **HEADS)
    with pytest.raises(WeightsError, match="frames=10: 18 positions are none of such a clip"):
        infer_config(state, "mae_st", frames=10, **HEADS)


def test_a_hint_goes_before_what_the_file_says(small: Make, randomised: Make) -> None:
    state = states(small("mae_st"), randomised, "mae_st")
    wider = infer_config(state, "mae_st", frames=8, size=32, **HEADS)
    assert (wider.frames, wider.size, wider.grid_THW) == (8, 32, (4, 4, 4))
    assert isinstance(wider, MAEConfig) and wider.pred_t_dim == 4  # one frame per tube, as before


def test_an_encoder_alone_is_a_vit(small: Make, randomised: Make) -> None:
    config = small("mae_st")
    theirs = from_ours(encoder_part(randomised(config).state_dict()), "mae_st", config)
    found = infer_config(theirs, "mae_st", heads=3)
    assert type(found) is ViTConfig and found.frames == 4
    with_head = theirs | {"head.weight": torch.zeros(5, 24)}
    assert type(infer_config(with_head, "mae_st_classifier", heads=3)) is ClassifierConfig


def test_hints_that_cannot_be_are_told(small: Make, randomised: Make) -> None:
    state = states(small("mae_st"), randomised, "mae_st")
    with pytest.raises(WeightsError, match="classes=5: a MAEConfig has no such field"):
        infer_config(state, "mae_st", classes=5, **HEADS)
    with pytest.raises(WeightsError, match="heads=5"):
        infer_config(state, "mae_st", **HEADS | {"heads": 5})
    with pytest.raises(WeightsError, match="size=30"):
        infer_config(state, "mae_st", size=30, **HEADS)


def test_a_pretrained_state_of_ours_without_its_config_is_refused(small: Make, randomised: Make) -> None:
    state = randomised(small("mae_st")).state_dict()
    with pytest.raises(WeightsError, match="targets cannot be told from shapes"):
        infer_config(state, "reelmae")
    with pytest.raises(WeightsError, match="patch=None: 384 values do not tell a patch's side; give patch"):
        infer_config(encoder_part(state), "reelmae")
    assert infer_config(encoder_part(state), "reelmae", patch=8, heads=3).t_patch == 2


def test_a_classifier_that_leaves_a_patch_out_of_its_mean_is_refused(small: Make, randomised: Make) -> None:
    """That is what mae_st's does without a class token."""
    config = small("slowfast_classifier", cls_token=False)
    state = states(config, randomised, "slowfast_classifier")
    assert infer_config(state, "slowfast_classifier", heads=3) == config
    theirs = {name.replace("head.projection", "head"): value for name, value in state.items()}
    with pytest.raises(WeightsError, match="classifier without a class token: mae_st leaves"):
        infer_config(theirs, "mae_st_classifier", heads=3)


def test_places_that_are_no_square_are_refused(small: Make, randomised: Make) -> None:
    state = states(small("mae_st"), randomised, "mae_st")
    state["pos_embed_spatial"] = state["pos_embed_spatial"][:, :8]
    with pytest.raises(WeightsError, match="8 places: they are no square"):
        infer_config(state, "mae_st", **HEADS)


def test_a_part_of_an_encoder_is_told_as_such() -> None:
    with pytest.raises(WeightsError, match="no blocks"):
        infer_config({"patch_embed.proj.weight": torch.zeros(4, 3, 2, 8, 8)}, "mae_st")
    with pytest.raises(WeightsError, match=r"no encoder\.patch_embed\.weight"):
        infer_config({"norm.weight": torch.zeros(4)}, "mae_st")
