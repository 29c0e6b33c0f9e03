"""The objectives: what MotionMAE and VideoMAE do that MAE-ST does not, decoder masking, and that each compiles whole."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reelmae.model.config import (
    MAEConfig,
    MotionConfig,
    mae_config,
    motion_config,
    slowfast_config,
    videomae_config,
)
from reelmae.model.mae import MaskedAutoencoder, complement, mean_squared_error

SIZES: dict[str, Any] = {
    "frames": 8,
    "size": 16,
    "patch": 8,
    "t_patch": 2,
    "dim": 24,
    "depth": 2,
    "heads": 3,
    "decoder_dim": 16,
    "decoder_depth": 1,
    "decoder_heads": 2,
}
OBJECTIVES: dict[str, MAEConfig] = {
    "mae": mae_config("B", **SIZES),
    "mae_dense": mae_config("B", **SIZES, encoder="dense"),
    "mae_hog": mae_config("B", **SIZES, target="hog"),
    "mae_no_cls": mae_config("B", **SIZES, cls_token=False, decoder_cls="none"),
    "slowfast": slowfast_config("B", **SIZES),
    "videomae": videomae_config("B", **SIZES),
    "videomae_dense": videomae_config("B", **SIZES, encoder="dense"),
    "motion_separate": motion_config("B", **SIZES),
    "motion_shared": motion_config("B", **SIZES, motion=MotionConfig(decoders="shared", norm="patch")),
    "motion_dense": motion_config("B", **SIZES, encoder="dense"),
}
DECODE = torch.tensor([[0, 3, 4, 7, 8, 11, 12, 15]])  # half of the 16 tokens: running cells of a 4 × 2 × 2 grid


def make(config: MAEConfig) -> tuple[MaskedAutoencoder, Tensor, Tensor]:
    torch.manual_seed(0)
    model = MaskedAutoencoder(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model, torch.randn(2, 3, 8, 16, 16), torch.stack([torch.randperm(16)[:5] for _ in range(2)])


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("decode", [False, True])
def test_each_objective_compiles_without_graph_breaks(name: str, decode: bool) -> None:
    model, clips, ids = make(OBJECTIVES[name])
    ids_decode = DECODE.expand(2, -1) if decode else None
    eager = model(clips, ids, ids_decode)
    torch.compiler.reset()  # each model counts as one function compiled once more, and there is a limit
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(clips, ids, ids_decode)
    torch.testing.assert_close(compiled.loss, eager.loss)
    for what, pred in eager.preds.items():
        torch.testing.assert_close(compiled.preds[what], pred, rtol=0, atol=2e-5)
    compiled.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler for torch's default backend")
def test_the_default_backend_computes_the_same() -> None:
    model, clips, ids = make(motion_config("B", **{**SIZES, "depth": 1}))
    eager = model(clips, ids, DECODE.expand(2, -1))
    eager.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)(clips, ids, DECODE.expand(2, -1))
    torch.testing.assert_close(compiled.loss, eager.loss)
    compiled.loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model, clips, ids = make(OBJECTIVES[name])
    model(clips, ids).loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize("name", OBJECTIVES)
def test_checkpointing_changes_memory_and_not_gradients(name: str) -> None:
    model, clips, ids = make(OBJECTIVES[name])
    model(clips, ids).loss.backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    calls = []
    model.encoder.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.set_checkpointing(True)
    model(clips, ids).loss.backward()
    assert len(calls) == 2  # forward, and again in backward
    for n, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(p.grad, plain[n], rtol=0, atol=1e-6)


# --- decoder masking -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
def test_decoder_masking_predicts_the_asked_tokens_and_counts_the_removed_ones(name: str) -> None:
    model, clips, ids = make(OBJECTIVES[name])
    decode = DECODE.expand(2, -1)
    out = model(clips, ids, decode)
    assert torch.equal(out.ids_BQ, decode)
    assert out.preds["space"].shape[:2] == (2, 8)
    gone = [set(range(16)) - set(row) for row in ids.tolist()]
    assert out.weight_BQ is not None
    assert out.weight_BQ.tolist() == [[float(token in gone[b]) for token in decode[b].tolist()] for b in range(2)]
    target = model.targets.space(clips, decode)
    error = (out.preds["space"] - target).square().mean(-1)
    expected = (error * out.weight_BQ).sum() / out.weight_BQ.sum()
    torch.testing.assert_close(out.losses["space"], expected)


def test_with_decoder_masking_the_decoder_sees_fewer_tokens() -> None:
    model, clips, ids = make(OBJECTIVES["mae"])
    seen: list[int] = []
    model.decoder.blocks[0].register_forward_hook(lambda _m, _i, out: seen.append(out.shape[1]))
    model(clips, ids)
    model(clips, ids, DECODE.expand(2, -1))
    assert seen == [1 + 16, 1 + 5 + 8]


@pytest.mark.parametrize("name", ["mae", "mae_dense", "videomae", "motion_separate"])
def test_asking_for_all_removed_tokens_is_no_decoder_masking(name: str) -> None:
    model, clips, ids = make(OBJECTIVES[name])
    plain, asked = model(clips, ids), model(clips, ids, complement(ids, 16))
    torch.testing.assert_close(asked.loss, plain.loss)


# --- VideoMAE --------------------------------------------------------------------------------------------------


def test_videomae_targets_are_cubes_in_unit_pixels_normalised_within_each_channel() -> None:
    config = videomae_config("B", **SIZES, pixel_mean=(0.485, 0.456, 0.406), pixel_std=(0.229, 0.224, 0.225))
    model, clips, _ = make(config)
    token = 5  # of 4 × 2 × 2: time 1, row 0, column 1
    target = model.targets.space(clips, torch.tensor([[token]] * 2))[0, 0]
    mean, std = torch.tensor(config.pixel_mean), torch.tensor(config.pixel_std)
    cube = clips[0, :, 2:4, 0:8, 8:16] * std[:, None, None, None] + mean[:, None, None, None]
    for channel in range(3):
        values = cube[channel].flatten()
        expected = (values - values.mean()) / (values.std() + 1e-6)
        torch.testing.assert_close(target.view(-1, 3)[:, channel], expected, rtol=1e-5, atol=1e-5)


def test_videomae_has_no_class_token_no_learned_positions_and_no_bias_of_keys() -> None:
    names = [name for name, _ in MaskedAutoencoder(OBJECTIVES["videomae"]).named_parameters()]
    assert not [n for n in names if "cls" in n or "pos" in n or n.endswith("qkv.bias")]
    assert "decoder.embed.bias" not in names
    assert "encoder.blocks.0.attn.qkv.q_bias" in names


# --- MotionMAE -------------------------------------------------------------------------------------------------


def test_motion_loss_is_space_plus_weighted_motion_each_told_apart() -> None:
    config = motion_config("B", **SIZES, motion=MotionConfig(weight=0.25))
    model, clips, ids = make(config)
    out = model(clips, ids)
    assert set(out.losses) == set(out.preds) == {"space", "motion"}
    torch.testing.assert_close(out.loss, out.losses["space"] + 0.25 * out.losses["motion"])
    expected = mean_squared_error(out.preds["motion"], model.targets.motion(clips, out.ids_BQ))
    torch.testing.assert_close(out.losses["motion"], expected)


def test_the_motion_target_of_a_moving_square_is_minus_where_it_was_and_plus_where_it_is() -> None:
    """A square of one pixel steps a column a frame; token 0 covers frames 0 and 1, its target is frame 1 - frame 0."""
    config = motion_config("B", **SIZES, target_frames="stride")
    model = MaskedAutoencoder(config)
    clips = torch.zeros(1, 3, 8, 16, 16)
    for t in range(8):
        clips[0, :, t, 2, t] = 1.0
    target = model.targets.motion(clips, torch.tensor([[0, 4, 1]]))[0].view(3, 8, 8, 3)
    expected = torch.zeros(3, 8, 8, 3)
    expected[0, 2, 0], expected[0, 2, 1] = -1.0, 1.0  # time 0: column 0 → 1
    expected[1, 2, 2], expected[1, 2, 3] = (
        -1.0,
        1.0,
    )  # time 1: column 2 → 3; token 1, right of token 0, is still
    assert torch.equal(target, expected)


@pytest.mark.parametrize("decoders", ["separate", "shared"])
def test_each_loss_alone_reaches_its_own_head_and_the_encoder(decoders: str) -> None:
    heads = {
        "space": "decoder.pred.weight",
        "motion": "decoder.pred_motion.weight" if decoders == "shared" else "motion_decoder.pred.weight",
    }
    for loss, other in (("space", "motion"), ("motion", "space")):
        model, clips, ids = make(OBJECTIVES[f"motion_{decoders}"])
        model(clips, ids).losses[loss].backward()
        reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert heads[loss] in reached
        assert heads[other] not in reached
        assert "encoder.patch_embed.weight" in reached
        assert ("decoder.blocks.0.mlp.fc1.weight" in reached) == (loss == "space" or decoders == "shared")


def test_shared_and_separate_decoders_have_as_many_parameters_as_stated() -> None:
    plain = parameters(MaskedAutoencoder(mae_config("B", **SIZES, pos="joint", decoder_pos="joint")))
    shared = parameters(MaskedAutoencoder(OBJECTIVES["motion_shared"]))
    separate = MaskedAutoencoder(OBJECTIVES["motion_separate"])
    assert separate.motion_decoder is not None
    assert shared == plain + 16 * 192 + 192  # one more last layer: 8 · 8 · 3 values from a width of 16
    assert parameters(separate) == plain + parameters(separate.decoder)


def test_motion_options_change_the_target() -> None:
    _, clips, ids = make(OBJECTIVES["motion_separate"])

    def target(**options: Any) -> Tensor:
        config = motion_config("B", **SIZES, motion=MotionConfig(**options))
        return MaskedAutoencoder(config).targets.motion(clips, ids)

    signed = target()
    assert torch.equal(target(sign="absolute"), signed.abs())
    assert not torch.equal(target(gap=2), signed)
    normalised = target(norm="patch")
    torch.testing.assert_close(normalised.mean(-1), torch.zeros(2, 5), rtol=0, atol=1e-5)
    torch.testing.assert_close(normalised.var(-1), torch.ones(2, 5), rtol=1e-3, atol=0)
