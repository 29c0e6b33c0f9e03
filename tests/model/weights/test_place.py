"""State dicts into models: all or nothing, everything named."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reelmae.model.classifier import Classifier
from reelmae.model.mae import MaskedAutoencoder
from reelmae.model.weights import WeightsError, finetuning_patterns, load_into
from reelmae.model.weights.infer import infer_config
from reelmae.model.weights.interpolate import resize_joint, resize_spatial, resize_temporal
from reelmae.model.weights.layouts import encoder_part, from_ours
from reelmae.model.weights.models import build

Make = Callable[..., Any]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_reference_file_computes_what_the_reference_did(reference: Any) -> None:
    config = infer_config(reference.state, reference.layout, **reference.hints)
    model = build(config).eval()
    report = load_into(model, reference.state, reference.layout)
    assert report.placed == list(model.state_dict())
    assert not (report.resized or report.left or report.missing)
    data, clips = reference.data, torch.from_numpy(reference.data["clip"])
    with torch.no_grad():
        if isinstance(model, Classifier):
            assert np.abs(model(clips).numpy() - data["logits"]).max() <= 5e-6
            return
        assert isinstance(model, MaskedAutoencoder)
        keep = np.stack([np.flatnonzero(row == 0) for row in data["mask"]])
        loss = model(clips, torch.from_numpy(data.get("ids_keep", keep))).loss
    assert abs(loss.item() - data["loss_f64"]) <= 2e-6


@pytest.mark.parametrize(
    ("layout", "loss"),
    [
        ("mae_st", "fc_norm.weight"),
        ("slowfast", "pred_head.projections.1.weight"),
        ("videomae", "encoder.norm2.bias"),
    ],
)
def test_a_key_that_has_no_place_is_named_and_nothing_is_loaded(
    layout: str, loss: str, small: Make, randomised: Make
) -> None:
    config = small(layout)
    model, state = randomised(config, 1), from_ours(randomised(config).state_dict(), layout, config)
    before = snapshot(model)
    with pytest.raises(WeightsError, match=rf"without a place: {re.escape(loss)}\. Nothing"):
        load_into(model, state | {loss: torch.ones(3)}, layout)
    assert same(before, model.state_dict())
    report = load_into(model, state | {loss: torch.ones(3)}, layout, allow=[loss[:-3] + "*"])
    assert report.left == [loss]
    assert same(model.state_dict(), randomised(config).state_dict())


def test_a_key_within_a_block_that_we_have_not_is_named_as_in_the_file(small: Make, randomised: Make) -> None:
    config = small("videomae_classifier")
    state = from_ours(randomised(config).state_dict(), "videomae", config) | {"blocks.0.gamma_1": torch.ones(24)}
    with pytest.raises(WeightsError, match=r"without a place: blocks\.0\.gamma_1\."):
        load_into(build(config), state, "videomae_classifier")


def test_a_part_of_the_model_without_a_value_is_named(small: Make, randomised: Make) -> None:
    config = small("mae_st")
    state = from_ours(randomised(config).state_dict(), "mae_st", config)
    del state["blocks.1.attn.k.weight"], state["decoder_norm.bias"]
    model = build(config)
    before = snapshot(model)
    with pytest.raises(WeightsError) as e:
        load_into(model, state, "mae_st")
    message = str(e.value)
    assert "without a place: blocks.1.attn.q.weight, blocks.1.attn.v.weight;" in message
    assert "without a value: encoder.blocks.1.attn.qkv.weight, decoder.norm.bias." in message
    assert same(before, model.state_dict())


def test_a_shape_that_differs_is_named_with_both_shapes(small: Make, randomised: Make) -> None:
    state = from_ours(randomised(small("mae_st")).state_dict(), "mae_st", small("mae_st"))
    model = build(small("mae_st", mlp_ratio=3.0))
    before = snapshot(model)
    with pytest.raises(WeightsError, match=r"mlp\.fc1\.weight.* is \[48, 24\] in the file and \[72, 24\] in the model"):
        load_into(model, state, "mae_st", allow=["*"])
    assert same(before, model.state_dict())


def test_as_many_values_in_another_shape_are_not_taken(small: Make, randomised: Make) -> None:
    config = small("mae_st")
    state = from_ours(randomised(config).state_dict(), "mae_st", config)
    state["blocks.0.mlp.fc1.weight"] = state["blocks.0.mlp.fc1.weight"].T
    with pytest.raises(WeightsError, match=r"is \[24, 48\] in the file and \[48, 24\] in the model"):
        load_into(build(config), state, "mae_st")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float, small: Make, randomised: Make) -> None:
    config = small("mae_st")
    state = from_ours(randomised(config).state_dict(), "mae_st", config)
    state["blocks.0.attn.v.bias"][3] = bad
    with pytest.raises(WeightsError, match=r"blocks\.0\.attn\.v\.bias\) holds values that are not finite"):
        load_into(build(config), state, "mae_st")


def test_half_precision_is_read_and_integers_are_not(small: Make, randomised: Make) -> None:
    config = small("mae_st")
    state = from_ours(randomised(config).state_dict(), "mae_st", config)
    model = build(config)
    load_into(model, {name: value.bfloat16() for name, value in state.items()}, "mae_st")
    assert model.encoder.norm.weight.dtype == torch.float32
    assert torch.equal(model.encoder.norm.weight, state["norm.weight"].bfloat16().float())
    with pytest.raises(WeightsError, match=r"torch\.int64, no floats"):
        load_into(model, state | {"norm.bias": torch.zeros(24, dtype=torch.int64)}, "mae_st")


@pytest.mark.parametrize("layout", ["mae_st", "slowfast", "videomae"])
def test_a_pretrained_file_begins_a_classifier(layout: str, small: Make, randomised: Make) -> None:
    config = small(layout)
    pretrained = randomised(config)
    kind = "videomae_classifier" if layout == "videomae" else "mae_st_classifier"
    for state, of in (
        (from_ours(pretrained.state_dict(), layout, config), layout),
        (pretrained.state_dict(), "reelmae"),
    ):
        model = randomised(small(kind), 1)
        before = snapshot(model)
        fresh = {"head.weight", "head.bias"} | ({"norm.weight", "norm.bias"} if layout == "videomae" else set())
        with pytest.raises(WeightsError, match=r"without a value: .*head"):
            load_into(model, state, of)
        allow = finetuning_patterns(of, model.config)
        report = load_into(model, state, of, allow=allow)
        assert set(report.missing) == fresh
        assert report.left and all("encoder.blocks" not in name for name in report.left)
        ours = pretrained.state_dict()
        for name, value in model.state_dict().items():
            expected = before[name] if name in fresh else ours[name if name in ours else f"encoder.{name}"]
            assert torch.equal(value, expected), name


def test_finetuning_forgives_no_key_that_pretraining_does_not_have(small: Make, randomised: Make) -> None:
    config = small("mae_st")
    state = from_ours(randomised(config).state_dict(), "mae_st", config) | {"fc_norm.weight": torch.ones(24)}
    model = build(small("mae_st_classifier"))
    with pytest.raises(WeightsError, match=r"without a place: fc_norm\.weight\."):
        load_into(model, state, "mae_st", allow=finetuning_patterns("mae_st", model.config))
    with pytest.raises(WeightsError, match="of a classifier already"):
        finetuning_patterns("mae_st_classifier", model.config)


def test_an_encoder_alone_takes_an_encoder(small: Make, randomised: Make) -> None:
    config = small("slowfast")
    whole = randomised(config)
    theirs = from_ours(encoder_part(whole.state_dict()), "slowfast", config)
    model = build(infer_config(theirs, "mae_st", heads=3))
    report = load_into(model, theirs, "mae_st")
    assert same(model.state_dict(), whole.encoder.state_dict())
    assert "norm.weight" in report.placed  # the module's own names
    with pytest.raises(WeightsError, match=r"without a place: .*decoder_embed\.weight"):
        load_into(model, from_ours(whole.state_dict(), "slowfast", config), "slowfast")


def test_positions_of_another_grid_are_resized_and_told(small: Make, randomised: Make) -> None:
    config, wider = small("slowfast"), small("slowfast", frames=8, size=32)
    source = randomised(config).state_dict()
    model = build(wider)
    report = load_into(model, from_ours(source, "slowfast", config), "slowfast")
    assert report.resized == {
        "encoder.pos.spatial": ((1, 9, 24), (1, 16, 24)),
        "encoder.pos.temporal": ((1, 2, 24), (1, 4, 24)),
        "decoder.pos.table": ((1, 18, 64), (1, 64, 64)),
    }
    state = model.state_dict()
    assert torch.equal(state["encoder.pos.spatial"], resize_spatial(source["encoder.pos.spatial"], (3, 3), (4, 4)))
    assert torch.equal(state["encoder.pos.temporal"], resize_temporal(source["encoder.pos.temporal"], 4))
    # the decoder's joint table has the grid of the encoder's separable ones
    assert torch.equal(state["decoder.pos.table"], resize_joint(source["decoder.pos.table"], (2, 3, 3), (4, 4, 4)))
    untouched = state.keys() - report.resized.keys()
    assert all(torch.equal(state[name], source[name]) for name in untouched)


def test_a_resized_table_holds_the_values_that_it_should(small: Make, randomised: Make) -> None:
    """By hand: a constant over space, and a ramp over time, at the centres of the new tokens."""
    config = small("slowfast")
    state = randomised(config).state_dict()
    state["encoder.pos.spatial"].fill_(0.5)
    state["encoder.pos.temporal"][0] = torch.tensor([0.0, 4.0])[:, None]
    decoder_THWD = state["decoder.pos.table"].view(2, 3, 3, 64)
    decoder_THWD[:] = torch.tensor([-1.0, 7.0])[:, None, None, None]
    model = build(small("slowfast", frames=8, size=32))
    load_into(model, from_ours(state, "slowfast", config), "slowfast")
    assert torch.allclose(model.encoder.pos.spatial, torch.tensor(0.5), atol=1e-6)
    over_time = torch.tensor([0.0, 1.0, 3.0, 4.0])  # tokens of half the length: at a quarter and three
    assert torch.equal(model.encoder.pos.temporal[0], over_time[:, None].expand(4, 24))
    frames_THWD = model.decoder.pos.table.view(4, 4, 4, 64)
    assert torch.allclose(frames_THWD, (over_time * 2 - 1)[:, None, None, None], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "rows", "said"),
    [
        ("decoder_pos_embed_spatial", 25, r"decoder\.pos\.spatial has 25 rows: .* \[2, 3, 3\] tokens, which are 9"),
        ("decoder_pos_embed_temporal", 0, r"decoder\.pos\.temporal has 0 rows"),
        ("decoder_pos_embed_temporal", 3, r"decoder\.pos\.temporal has 3 rows"),
    ],
)
def test_tables_of_two_grids_in_one_file_are_refused(
    name: str, rows: int, said: str, small: Make, randomised: Make
) -> None:
    config = small("mae_st")
    state = from_ours(randomised(config).state_dict(), "mae_st", config) | {name: torch.ones(1, rows, 16)}
    for sizes in ({}, {"size": 40}, {"frames": 8, "size": 32}):
        with pytest.raises(WeightsError, match=said):
            load_into(build(small("mae_st", **sizes)), state, "mae_st")


@pytest.mark.parametrize("changed", [(0, 18, 24), (2, 18, 24)])
def test_a_joint_table_of_no_or_two_models_is_refused(changed: tuple[int, ...], small: Make, randomised: Make) -> None:
    config = small("motion")
    state = randomised(config).state_dict() | {"encoder.pos.table": torch.ones(changed)}
    with pytest.raises(WeightsError, match=r"encoder\.pos\.table is \[\d, 18, 24\] in the file"):
        load_into(build(small("motion", size=32)), state, "reelmae", grid=(2, 3, 3))


def test_a_joint_table_of_as_many_tokens_of_another_grid_is_resized(small: Make, randomised: Make) -> None:
    config, other = small("motion", frames=8, size=16), small("motion", frames=2, size=32)
    assert config.n_tokens == other.n_tokens
    source, model = randomised(config).state_dict(), build(other)
    report = load_into(model, source, "reelmae", grid=config.grid_THW)
    assert "encoder.pos.table" in report.resized
    table = resize_joint(source["encoder.pos.table"], (4, 2, 2), (1, 4, 4))
    assert torch.equal(model.state_dict()["encoder.pos.table"], table)


def test_the_grid_of_a_joint_table_is_asked_for(small: Make, randomised: Make) -> None:
    config = small("mae_st", pos="joint", decoder_pos="joint")
    state = from_ours(randomised(config).state_dict(), "mae_st", config)
    model = build(small("mae_st", pos="joint", decoder_pos="joint", size=32))
    with pytest.raises(WeightsError, match=r"encoder\.pos\.table is for 18 tokens: give grid"):
        load_into(model, state, "mae_st")
    with pytest.raises(WeightsError, match=r"not the \[2, 4, 4\] given"):
        load_into(model, state, "mae_st", grid=(2, 4, 4))
    for grid in ((-2, -3, 3), (18, 1), (0, 3, 3)):
        with pytest.raises(WeightsError, match=r"grid=\[.*: give T', H' and W', each at least 1"):
            load_into(model, state, "mae_st", grid=grid)  # type: ignore[arg-type]
    assert len(load_into(model, state, "mae_st", grid=(2, 3, 3)).resized) == 2


def test_a_grid_that_the_files_tables_contradict_is_refused(small: Make, randomised: Make) -> None:
    config = small("mae_st")
    state = from_ours(randomised(config).state_dict(), "mae_st", config)
    with pytest.raises(WeightsError, match=r"grid=\[1, 3, 6\].* are for \[2, 3, 3\]; give that"):
        load_into(build(small("mae_st", size=32)), state, "mae_st", grid=(1, 3, 6))
    assert load_into(build(small("mae_st", size=32)), state, "mae_st", grid=(2, 3, 3)).resized


def test_the_wrong_layout_is_an_error_that_names_keys(small: Make, randomised: Make) -> None:
    config = small("mae_st")
    state = from_ours(randomised(config).state_dict(), "mae_st", config)
    for layout in ("slowfast", "videomae", "timm", "reelmae"):
        with pytest.raises(WeightsError, match="decoder_"):
            load_into(build(config), state, layout)
    with pytest.raises(WeightsError, match="Linear is not a model of ours"):
        load_into(nn.Linear(2, 2), state, "mae_st")
