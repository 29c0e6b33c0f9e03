"""The schedule and the groups, against the reference's own numbers where they are at hand."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from reelmae.model.mae import MAEConfig, MaskedAutoencoder
from reelmae.train.config import OptimSection
from reelmae.train.optim import adamw, learning_rate, parameter_groups, set_learning_rate

REPO = Path(__file__).parents[2]
SHARED = Path(os.environ.get("REELMAE_SHARED", REPO.parent / "shared"))
FACTS = Path(os.environ.get("REELMAE_FIXTURES", SHARED / "reference")) / "optim_facts.json"
SMALL = MAEConfig(
    frames=4, size=16, patch=8, dim=24, depth=1, heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2
)


@pytest.mark.skipif(not FACTS.is_file(), reason=f"no {FACTS}")
def test_learning_rates_are_the_references_at_every_step() -> None:
    facts = json.loads(FACTS.read_text())
    steps = facts["epochs"] * facts["iters_per_epoch"]
    for name in ("lr_pretrain", "lr_no_warmup"):
        args, expected = facts["mae_st"][name]["args"], facts["mae_st"][name]["lr"]
        warmup = args["warmup_epochs"] / args["epochs"]
        ours = [
            learning_rate(s, steps, peak=args["lr"], warmup=warmup, min_lr=args["min_lr"])
            for s in range(steps)
        ]
        assert ours == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_rate_rises_from_zero_to_the_peak_and_falls_towards_the_least() -> None:
    rates = [learning_rate(s, 100, peak=2.0, warmup=0.1, min_lr=0.5) for s in range(100)]
    assert rates[0] == 0 and rates[5] == pytest.approx(1.0) and rates[10] == 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(1.25) and 0.5 < rates[99] < 0.51


def test_biases_and_vectors_are_not_decayed_and_tokens_and_positions_are() -> None:
    model = MaskedAutoencoder(SMALL)
    names = {id(p): n for n, p in model.named_parameters()}
    decayed, plain = ({names[id(p)] for p in g["params"]} for g in parameter_groups(model, 0.05))
    assert decayed | plain == set(names.values()) and not decayed & plain
    assert {"encoder.cls_token", "encoder.pos.spatial", "decoder.pos.cls", "decoder.mask_token"} <= decayed
    assert {"encoder.patch_embed.bias", "encoder.norm.weight", "decoder.blocks.0.attn.qkv.bias"} <= plain
    assert all(p.ndim > 1 for p in parameter_groups(model, 0.05)[0]["params"])


def test_a_rate_reaches_every_group() -> None:
    optimizer = adamw(MaskedAutoencoder(SMALL), OptimSection())
    set_learning_rate(optimizer, 0.123)
    assert [g["lr"] for g in optimizer.param_groups] == [0.123, 0.123]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.05, 0.0]
