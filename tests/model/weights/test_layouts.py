"""Names and shapes of others' state dicts to ours and back."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from reelmae.model.classifier import ClassifierConfig
from reelmae.model.config import MotionConfig
from reelmae.model.weights import WeightsError
from reelmae.model.weights.infer import infer_config
from reelmae.model.weights.layouts import LAYOUTS, detect, encoder_part, from_ours, to_ours
from reelmae.model.weights.models import build

Make = Callable[..., Any]

VARIANTS = [
    ("mae_st", {}),
    ("mae_st", {"pos": "joint", "decoder_pos": "joint"}),
    ("mae_st", {"cls_token": False, "decoder_cls": "none"}),
    ("mae_st", {"cls_token": False, "decoder_cls": "none", "pos": "joint", "decoder_pos": "joint"}),
    ("mae_st", {"patch": 4, "t_patch": 1, "frames": 3, "size": 20, "mlp_ratio": 3.0, "depth": 3}),
    ("mae_st_classifier", {}),
    ("mae_st_classifier", {"pos": "joint"}),
    ("slowfast", {}),
    ("slowfast", {"decoder_pos": "separable", "decoder_depth": 3}),
    ("slowfast", {"pos": "joint"}),
    ("slowfast", {"cls_token": False, "decoder_cls": "none"}),
    ("slowfast_classifier", {}),
    ("slowfast_classifier", {"cls_token": False}),
    ("videomae", {}),
    ("videomae", {"pos": "joint"}),
    ("videomae_classifier", {}),
    ("timm", {"pos": "joint", "decoder_pos": "joint"}),
    ("timm", {"pos": "joint", "decoder_pos": "joint", "cls_token": False, "decoder_cls": "none"}),
]


def test_a_reference_file_is_recognised_and_comes_back_as_it_was(reference: Any) -> None:
    state = reference.state
    assert detect(state) == reference.layout
    config = infer_config(state, reference.layout, **reference.hints)
    ours = to_ours(state, reference.layout, config)
    back = from_ours(ours, reference.layout, config)
    again = to_ours(back, reference.layout, config)
    assert infer_config(back, reference.layout, **reference.hints) == config
    assert ours.keys() == again.keys() == build(config).state_dict().keys()
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    if not any(".attn.qkv." in name for name in state if reference.layout == "slowfast"):
        assert back.keys() == state.keys()  # PySlowFast's fused attention is written apart
        assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize(("layout", "changes"), VARIANTS, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_every_variant_is_recognised_and_comes_back(
    layout: str, changes: dict[str, Any], small: Make, randomised: Make
) -> None:
    config = small("mae_st" if layout == "timm" else layout, **changes)
    ours = randomised(config).state_dict()
    theirs = from_ours(ours, layout, config)
    assert detect(theirs) == layout
    back = to_ours(theirs, layout, config)
    expected = encoder_part(ours) if layout == "timm" else ours
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], expected[name]) for name in expected)


def test_q_k_and_v_are_fused_in_this_order(small: Make, randomised: Make) -> None:
    config = small("mae_st")
    theirs = from_ours(randomised(config).state_dict(), "mae_st", config)
    assert not any("qkv" in name for name in theirs)
    ours = to_ours(theirs, "mae_st", config)
    for kind in ("weight", "bias"):
        for q, third in zip("qkv", ours[f"encoder.blocks.1.attn.qkv.{kind}"].chunk(3), strict=True):
            assert torch.equal(third, theirs[f"blocks.1.attn.{q}.{kind}"])
            assert third.shape == theirs[f"blocks.1.attn.{q}.{kind}"].shape


def test_a_kernel_becomes_a_matrix_over_frame_row_column_channel() -> None:
    kernel = torch.arange(2 * 3 * 2 * 4 * 4.0).reshape(2, 3, 2, 4, 4)
    weight = to_ours({"patch_embed.proj.weight": kernel}, "mae_st")["encoder.patch_embed.weight"]
    assert weight.shape == (2, 2 * 4 * 4 * 3)
    for d, c, t, i, j in ((0, 0, 0, 0, 0), (1, 2, 1, 3, 2), (0, 1, 1, 0, 3), (1, 0, 0, 2, 1)):
        assert weight[d, ((t * 4 + i) * 4 + j) * 3 + c] == kernel[d, c, t, i, j]


def test_row_0_of_a_joint_table_is_the_class_tokens() -> None:
    table = torch.arange(10.0).reshape(1, 5, 2)
    token = torch.zeros(1, 1, 2)
    own = to_ours({"decoder_pos_embed": table, "decoder_cls_token": token}, "mae_st")
    assert own["decoder.pos.cls"].tolist() == [[[0, 1]]]
    assert own["decoder.pos.table"].tolist() == [[[2, 3], [4, 5], [6, 7], [8, 9]]]
    carried = to_ours({"decoder_pos_embed": table, "cls_token": token}, "slowfast")
    assert carried["decoder.pos.cls"].tolist() == [[[0, 1]]]
    without = to_ours({"decoder_pos_embed": table, "pos_embed": table}, "mae_st")
    assert without.keys() == {"decoder.pos.table", "encoder.pos.table"}
    assert torch.equal(without["encoder.pos.table"], table)


def test_pyslowfasts_fused_attention_is_read(small: Make, randomised: Make) -> None:
    config = small("slowfast")
    ours = randomised(config).state_dict()
    theirs = from_ours(ours, "slowfast", config)
    for name in [name for name in theirs if ".attn.q." in name]:
        parts = [theirs.pop(name.replace(".attn.q.", f".attn.{q}.")) for q in "qkv"]
        theirs[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
    assert detect(theirs) == "slowfast"
    back = to_ours(theirs, "slowfast", config)
    assert back.keys() == ours.keys() and all(torch.equal(back[name], ours[name]) for name in ours)


def test_an_encoder_with_fused_attention_is_timms_only_with_a_joint_table() -> None:
    fused = {"patch_embed.proj.weight": torch.ones(1), "blocks.0.attn.qkv.weight": torch.ones(1)}
    assert detect(fused | {"pos_embed": torch.ones(1)}) == "timm"
    assert detect(fused | {"pos_embed_spatial": torch.ones(1)}) == "mae_st"
    assert detect(fused | {"pos_embed_spatial": torch.ones(1), "head.weight": torch.ones(1)}) == "mae_st_classifier"


def test_the_norm_of_pyslowfasts_decoder_is_numbered_after_its_blocks(small: Make, randomised: Make) -> None:
    for depth in (1, 3):
        config = small("slowfast", decoder_depth=depth)
        theirs = from_ours(randomised(config).state_dict(), "slowfast", config)
        assert theirs[f"pred_head.transforms.0.{depth}.weight"].shape == (64,)
        assert f"pred_head.transforms.0.{depth - 1}.norm1.weight" in theirs
        assert "pred_head.projections.0.bias" in theirs


def test_a_pretrained_norm_is_a_classifiers_in_mae_st_and_not_in_videomae(small: Make) -> None:
    norm = {"norm.weight": torch.ones(3)}
    assert to_ours(norm, "mae_st", small("mae_st")).keys() == {"encoder.norm.weight"}
    assert to_ours(norm, "mae_st", small("mae_st_classifier")).keys() == {"norm.weight"}
    assert to_ours(norm, "slowfast", small("slowfast_classifier")).keys() == {"norm.weight"}
    assert to_ours(norm, "timm", small("mae_st_classifier")).keys() == {"norm.weight"}
    ours = {"encoder.norm.weight": torch.ones(3)}
    assert to_ours(ours, "reelmae", small("mae_st_classifier")).keys() == {"norm.weight"}
    assert to_ours(ours, "reelmae", small("videomae_classifier")).keys() == {"encoder.norm.weight"}
    assert to_ours(ours, "videomae", small("videomae_classifier")).keys() == {"encoder.norm.weight"}


def test_timm_gets_the_sum_of_separable_positions(small: Make, randomised: Make) -> None:
    config = small("mae_st")
    model = randomised(config)
    theirs = from_ours(model.state_dict(), "timm", config)
    pos = model.encoder.pos
    assert torch.equal(theirs["pos_embed"], torch.cat((pos.cls, pos.tokens()), dim=1))
    assert theirs["patch_embed.proj.weight"].shape == (24, 3, 2, 8, 8)
    assert {name.split(".")[0] for name in theirs} == {
        "cls_token",
        "pos_embed",
        "patch_embed",
        "blocks",
        "norm",
    }


def test_timm_gets_videomaes_fixed_positions_and_keys_with_a_bias_of_zero(small: Make, randomised: Make) -> None:
    config = small("videomae")
    model = randomised(config)
    theirs = from_ours(model.state_dict(), "timm", config)
    assert torch.equal(theirs["pos_embed"], model.encoder.pos.tokens())
    q, k, v = theirs["blocks.0.attn.qkv.bias"].chunk(3)
    assert torch.equal(q, model.encoder.blocks[0].attn.qkv.q_bias)
    assert torch.equal(v, model.encoder.blocks[0].attn.qkv.v_bias)
    assert not k.any()
    back = infer_config(theirs, "timm", heads=3, frames=config.frames)
    other = build(back).eval()
    other.load_state_dict({n.removeprefix("encoder."): v for n, v in to_ours(theirs, "timm").items()})
    clips = torch.rand(2, 3, config.frames, config.size, config.size)
    with torch.no_grad():
        assert torch.allclose(other(clips), model.encoder(clips), atol=1e-5)


@pytest.mark.parametrize(
    ("layout", "kind", "changes", "named"),
    [
        ("mae_st", "slowfast", {}, "decoder_pos='joint'"),
        ("mae_st", "mae_st", {"decoder_cls": "carried"}, "decoder_cls='carried'"),
        ("mae_st", "mae_st", {"encoder": "dense"}, "encoder='dense'"),
        ("mae_st", "mae_st", {"target": "hog"}, "target='hog'"),
        ("mae_st", "mae_st", {"target_frames": "stride"}, "target_frames='stride'"),
        ("mae_st", "motion", {}, "motion="),
        ("mae_st", "videomae", {}, "pos='sinusoid'"),
        ("mae_st_classifier", "videomae_classifier", {}, "pos='sinusoid'"),
        ("mae_st", "mae_st", {"target_norm": "none"}, "target_norm='none'"),
        ("mae_st", "mae_st", {"unit_pixels": True}, "unit_pixels=True"),
        ("mae_st", "mae_st_classifier", {"cls_token": False}, "cls_token=False"),
        ("slowfast", "slowfast", {"decoder_heads": 2}, "decoder_heads=2"),
        ("slowfast", "mae_st", {}, "decoder_cls='own'"),
        ("videomae", "mae_st", {}, "cls_token=True"),
        ("videomae", "videomae", {"pred_t_dim": 2}, "n_target_frames=2"),
        ("videomae", "videomae", {"target_norm": "patch"}, "target_norm='patch'"),
        ("videomae", "videomae", {"target_norm": "none"}, "target_norm='none'"),
    ],
)
def test_what_a_layouts_code_would_compute_otherwise_is_not_exported(
    layout: str, kind: str, changes: dict[str, Any], named: str, small: Make, randomised: Make
) -> None:
    config = small(kind, **changes)
    with pytest.raises(WeightsError, match=re.escape(named)):
        from_ours(randomised(config).state_dict(), layout, config)


CHANGES: dict[str, list[Any]] = {
    "frames": [8],
    "size": [16],
    "patch": [4],
    "t_patch": [1],
    "dim": [48],
    "depth": [1],
    "heads": [2],
    "mlp_ratio": [3.0],
    "cls_token": [True, False],
    "pos": ["separable", "joint", "sinusoid"],
    "qkv_bias": ["qkv", "qv"],
    "encoder": ["sparse", "dense"],
    "decoder_dim": [128],
    "decoder_depth": [2],
    "decoder_heads": [1, 2],
    "decoder_pos": ["separable", "joint", "sinusoid"],
    "decoder_cls": ["own", "carried", "none"],
    "embed_bias": [True, False],
    "target": ["pixels", "hog"],
    "target_norm": ["patch", "channel", "none"],
    "target_frames": ["linspace", "stride"],
    "pred_t_dim": [2, 4],
    "unit_pixels": [True, False],
    "motion": [MotionConfig()],
    "classes": [7],
}
NO_FACTS = {"pos_init", "pixel_mean", "pixel_std", "dropout", "drop_path"}  # of a trained model's state


@pytest.mark.parametrize("layout", ["mae_st", "slowfast", "videomae"])
@pytest.mark.parametrize("head", ["", "_classifier"])
def test_what_is_exported_says_all_that_the_config_did_or_nothing_is(
    layout: str, head: str, small: Make, randomised: Make
) -> None:
    """Each field is changed in turn: a config comes back from the layout as it was, or is refused."""
    start = small(layout + head)
    if not head:
        start = dataclasses.replace(start, pred_t_dim=start.n_target_frames)
    fields = {f.name for f in dataclasses.fields(start)} - NO_FACTS
    assert fields <= CHANGES.keys()
    exported = 0
    for name, value in [(field, value) for field in sorted(fields) for value in CHANGES[field]]:
        tubes = {"pred_t_dim": None} if not head and name in ("frames", "t_patch") else {}
        try:
            config = dataclasses.replace(start, **{**tubes, name: value})
        except ValueError:  # there is no such model
            continue
        if not head:
            config = dataclasses.replace(config, pred_t_dim=config.n_target_frames)
        try:
            theirs = from_ours(randomised(config).state_dict(), layout, config)
        except WeightsError:
            continue
        hints = {"heads": config.heads, "frames": config.frames, "size": config.size}
        hints |= {} if head or layout == "slowfast" else {"decoder_heads": config.decoder_heads}
        back = infer_config(theirs, detect(theirs), **hints)
        kept = {"pixel_mean": config.pixel_mean, "pixel_std": config.pixel_std}
        if not head and back.target_frame_index() == config.target_frame_index():
            kept["target_frames"] = config.target_frames  # another name for the same
        assert dataclasses.replace(back, **kept) == config, (name, value)
        exported += value != getattr(start, name)
    assert exported >= 6


def test_the_encoder_alone_of_a_motion_model_is_exported(small: Make, randomised: Make) -> None:
    config = small("motion")
    theirs = from_ours(encoder_part(randomised(config).state_dict()), "mae_st", config)
    assert detect(theirs) == "mae_st"
    assert "pos_embed" in theirs and not any("decoder" in name for name in theirs)


def test_a_key_that_has_no_place_is_named(small: Make, randomised: Make) -> None:
    config = small("mae_st")
    theirs = from_ours(randomised(config).state_dict(), "mae_st", config) | {"fc_norm.weight": torch.ones(1)}
    with pytest.raises(WeightsError, match=r"fc_norm\.weight"):
        to_ours(theirs, "mae_st", config)


def test_two_keys_for_one_place_are_named() -> None:
    state = {"fc_norm.weight": torch.ones(1), "norm.weight": torch.ones(1)}
    assert to_ours(state, "videomae_classifier").keys() == {"norm.weight", "encoder.norm.weight"}
    twice = {"encoder.norm.weight": torch.ones(1), "norm.weight": torch.ones(1)}
    with pytest.raises(WeightsError, match=r"encoder\.norm\.weight and norm\.weight"):
        to_ours(twice, "reelmae", ClassifierConfig())


def test_a_part_of_q_k_v_is_not_fused() -> None:
    state = {f"blocks.0.attn.{q}.weight": torch.ones(2, 2) for q in "qk"}
    assert to_ours(state, "mae_st").keys() == {f"encoder.blocks.0.attn.{q}.weight" for q in "qk"}


def test_q_k_and_v_of_different_shapes_are_refused_even_where_the_sum_fits() -> None:
    rows = {"q": 3, "k": 1, "v": 2}
    state = {f"blocks.0.attn.{q}.weight": torch.ones(n, 2) for q, n in rows.items()}
    with pytest.raises(WeightsError, match=r"attn\.q\.weight, .* are \[\[3, 2\], \[1, 2\], \[2, 2\]\]"):
        to_ours(state, "mae_st")


@pytest.mark.parametrize("shape", [(8, 3, 16, 16), (8, 1, 2, 16, 16), (8, 3, 2, 16, 8), (8, 1536)])
def test_a_kernel_that_is_no_videos_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(WeightsError, match=r"patch_embed\.proj\.weight is \[8"):
        to_ours({"patch_embed.proj.weight": torch.ones(shape)}, "mae_st")


@pytest.mark.parametrize("shape", [(5, 2), (2, 5, 2), (1, 1, 2)])
def test_a_table_that_is_none_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(WeightsError, match="table of positions"):
        to_ours({"cls_token": torch.ones(1, 1, 2), "pos_embed": torch.ones(shape)}, "mae_st")


def test_no_known_layout_and_no_weights_are_told() -> None:
    with pytest.raises(WeightsError, match="holds no weights"):
        detect({})
    with pytest.raises(WeightsError, match=r"layer1\.weight.*known are mae_st"):
        detect({"layer1.weight": torch.ones(1)})
    with pytest.raises(WeightsError, match="layout='mae'"):
        to_ours({}, "mae")
    assert set(LAYOUTS) >= {"mae_st", "slowfast", "videomae", "timm", "reelmae"}
