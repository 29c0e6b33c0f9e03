"""The schedules, the groups and the layers' shares, by hand; test_optim_facts.py holds them against the references."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from reelmae.model.config import MAEConfig
from reelmae.model.mae import MaskedAutoencoder
from reelmae.train.optim import (
    SPARED,
    OptimConfig,
    Schedule,
    adamw,
    kind,
    layer_scale,
    learning_rate,
    parameter_groups,
    set_learning_rate,
)

SMALL = MAEConfig(
    frames=4, size=16, patch=8, dim=24, depth=2, heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2
)


def rates(steps: int, schedule: Schedule = "after_warmup", **options: float) -> list[float]:
    return [learning_rate(s, steps, schedule=schedule, **options) for s in range(steps)]


def test_rate_rises_from_zero_to_the_peak_and_falls_towards_the_least() -> None:
    r = rates(100, peak=2.0, warmup=0.1, min_lr=0.5)
    assert r[0] == 0 and r[5] == pytest.approx(1.0) and r[10] == 2.0
    assert r[10:] == sorted(r[10:], reverse=True)
    assert r[55] == pytest.approx(1.25) and 0.5 < r[99] < 0.51


def test_warm_up_begins_where_it_is_told() -> None:
    assert rates(10, peak=1.0, warmup=0.4, start_lr=0.2)[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_a_cosine_from_the_start_meets_the_warm_up_below_the_peak() -> None:
    r = rates(8, "from_start", peak=1.0, warmup=0.5)
    assert r[4] == pytest.approx(0.5)  # half of the half cosine is over
    assert r[:4] == pytest.approx([0, 0.125, 0.25, 0.375])
    assert r[6] == pytest.approx(0.5 - 0.5 * 0.5**0.5)


def test_videomaes_warm_up_ends_at_the_peak_and_repeats_it() -> None:
    r = rates(10, "videomae", peak=1.0, warmup=0.3)
    assert r[:4] == pytest.approx([0, 0.5, 1, 1]) and r[4] == pytest.approx(0.5 + 0.5 * 0.900969, abs=1e-6)
    assert rates(10, "videomae", peak=1.0, warmup=0.1, start_lr=0.2)[:2] == [0.2, 1.0]
    # 0.29 · 100 is 28.999… in floating point, and 29 steps
    assert [s for s, x in enumerate(rates(100, "videomae", peak=1.0, warmup=0.29)) if x == 1] == [28, 29]


@pytest.mark.parametrize("schedule", ["after_warmup", "from_start", "videomae"])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.3, 0.99])
def test_any_schedule_stays_between_its_ends_and_falls_after_the_warm_up(schedule: Schedule, warmup: float) -> None:
    r = rates(20, schedule, peak=1.0, warmup=warmup, min_lr=0.1)
    assert all(0 <= x <= 1 for x in r)
    assert warmup or r[0] == 1
    falling = r[round(20 * warmup) + 1 :]
    assert all(a > b >= 0.1 for a, b in pairwise(falling))


def test_an_unknown_schedule_is_named() -> None:
    with pytest.raises(ValueError, match="schedule='linear': give one of after_warmup, from_start, videomae"):
        rates(2, "linear", peak=1.0, warmup=0.0)  # type: ignore[arg-type]


def test_biases_and_vectors_are_not_decayed_and_tokens_and_positions_are() -> None:
    model = MaskedAutoencoder(SMALL)
    names = {id(p): n for n, p in model.named_parameters()}
    decayed, plain = ({names[id(p)] for p in g["params"]} for g in parameter_groups(model, 0.05))
    assert decayed | plain == set(names.values()) and not decayed & plain
    assert {"encoder.cls_token", "encoder.pos.spatial", "decoder.pos.cls", "decoder.mask_token"} <= decayed
    assert {"encoder.patch_embed.bias", "encoder.norm.weight", "decoder.blocks.0.attn.qkv.bias"} <= plain
    assert all(p.ndim > 1 for p in parameter_groups(model, 0.05)[0]["params"])


@pytest.mark.parametrize(
    ("name", "ndim", "expected"),
    [
        ("encoder.patch_embed.weight", 2, "matrix"),
        ("encoder.patch_embed.bias", 1, "bias"),
        ("encoder.blocks.0.attn.q_bias", 1, "bias"),
        ("encoder.blocks.11.norm1.weight", 1, "vector"),
        ("encoder.cls_token", 3, "position"),
        ("decoder.cls_token", 3, "position"),
        ("encoder.pos.temporal", 3, "position"),
        ("motion_decoder.pos.table", 3, "position"),
        ("encoder.pos.cls", 3, "position"),
        ("decoder.mask_token", 3, "mask_token"),
        ("decoder.pred.weight", 2, "matrix"),
        ("head.weight", 2, "matrix"),
    ],
)
def test_a_parameters_kind_follows_from_its_name_and_dimensions(name: str, ndim: int, expected: str) -> None:
    assert kind(name, ndim) == expected


@pytest.mark.parametrize(
    ("rule", "tokens", "mask_token", "gain"),
    [
        ("mae_st", True, True, False),
        ("mae_st_bias_wd", True, True, True),
        ("mae_st_finetune", False, True, False),
        ("slowfast", True, True, False),
        ("videomae", False, False, False),
    ],
)
def test_a_rule_decays_what_its_table_says(rule: str, tokens: bool, mask_token: bool, gain: bool) -> None:
    model = MaskedAutoencoder(SMALL)
    groups = parameter_groups(model, 0.05, rule=rule)  # type: ignore[arg-type]
    decayed = {id(p) for g in groups if g["weight_decay"] == 0.05 for p in g["params"]}
    found = {n: id(p) in decayed for n, p in model.named_parameters()}
    assert found["encoder.blocks.0.attn.proj.weight"] and not found["encoder.blocks.0.attn.proj.bias"]
    assert {found["encoder.cls_token"], found["decoder.pos.spatial"], found["encoder.pos.cls"]} == {tokens}
    assert found["decoder.mask_token"] == mask_token and found["decoder.norm.weight"] == gain


def test_lower_layers_learn_more_slowly() -> None:
    names = {
        0: ["encoder.cls_token", "encoder.mask_token", "encoder.pos.spatial", "encoder.patch_embed.bias"],
        1: ["encoder.blocks.0.norm1.weight", "encoder.blocks.0.attn.qkv.weight"],
        3: ["encoder.blocks.2.mlp.fc2.bias"],
        12: ["encoder.blocks.11.mlp.fc1.weight"],
        13: [
            "encoder.norm.weight",
            "norm.bias",
            "head.weight",
            "decoder.blocks.0.norm1.weight",
            "decoder.mask_token",
        ],
    }
    for layer, of_layer in names.items():
        for name in of_layer:
            assert layer_scale(name, 12, 0.75) == pytest.approx(0.75 ** (13 - layer)), name


@pytest.mark.parametrize("name", ["encoder.blocks.12.norm1.weight", "encoder.adapter.weight", "encoder.position"])
def test_a_parameter_without_a_layer_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: no layer of an encoder with 12 blocks"):
        layer_scale(name, 12, 0.75)


def test_groups_have_each_learning_parameter_once_with_its_share() -> None:
    model = MaskedAutoencoder(SMALL)
    model.encoder.patch_embed.requires_grad_(False)
    groups = parameter_groups(model, 0.05, rule="mae_st_finetune", layer_decay=0.5)
    shares = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(shares) == sum(len(g["params"]) for g in groups)
    assert set(shares) == {id(p) for p in model.parameters() if p.requires_grad}
    # depth 2; the patch embedding, alone with decay in its layer, does not learn
    pairs = [(g["lr_scale"], g["weight_decay"]) for g in groups]
    assert pairs == [(0.125, 0.0), *((scale, decay) for scale in (0.25, 0.5, 1.0) for decay in (0.05, 0.0))]
    assert shares[id(model.encoder.pos.spatial)] == (0.125, 0.0)
    assert shares[id(model.encoder.blocks[1].mlp.fc1.weight)] == (0.5, 0.05)
    assert shares[id(model.decoder.pred.weight)] == (1.0, 0.05)


def test_a_frozen_block_still_counts_as_a_layer() -> None:
    model = MaskedAutoencoder(SMALL)
    model.encoder.blocks[0].requires_grad_(False)
    groups = parameter_groups(model, 0.05, layer_decay=0.5)
    shares = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    assert shares[id(model.encoder.blocks[1].norm1.weight)] == 0.5


def test_layers_of_a_wrapped_model_are_not_decayed_silently() -> None:
    wrapped = nn.ModuleDict({"module": MaskedAutoencoder(SMALL)})
    with pytest.raises(ValueError, match=r"layer_decay=0\.75: no encoder\.blocks\.\* in the model"):
        parameter_groups(wrapped, 0.05, layer_decay=0.75)
    assert len(parameter_groups(wrapped, 0.05)) == 2


def test_an_unknown_rule_is_named() -> None:
    with pytest.raises(ValueError, match=f"rule='timm': give one of {', '.join(SPARED)}"):
        parameter_groups(nn.Linear(2, 2), 0.05, rule="timm")  # type: ignore[arg-type]


def test_the_optimiser_is_that_of_mae_sts_pretraining() -> None:
    optimizer = adamw(MaskedAutoencoder(SMALL), OptimConfig())
    assert all(g["betas"] == (0.9, 0.95) and g["eps"] == 1e-8 for g in optimizer.param_groups)


def test_a_rate_reaches_every_group() -> None:
    optimizer = adamw(MaskedAutoencoder(SMALL), OptimConfig())
    set_learning_rate(optimizer, 0.123)
    assert [g["lr"] for g in optimizer.param_groups] == [0.123, 0.123]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.05, 0.0]


def test_each_group_gets_its_share_of_the_rate_and_the_step_obeys() -> None:
    model = MaskedAutoencoder(SMALL)
    optimizer = torch.optim.SGD(parameter_groups(model, 0.0, layer_decay=0.5), lr=1.0)
    set_learning_rate(optimizer, 0.5)
    low, high = model.encoder.pos.spatial, model.decoder.pred.weight
    before = low.detach().clone(), high.detach().clone()
    low.grad, high.grad = torch.ones_like(low), torch.ones_like(high)
    optimizer.step()
    assert torch.allclose(before[0] - low, torch.tensor(0.5 * 0.125))
    assert torch.allclose(before[1] - high, torch.tensor(0.5))
