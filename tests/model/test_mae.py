"""The masked autoencoder: what reaches the prediction, the loss, and dense against sparse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from reelmae.model.config import MAEConfig, mae_config, videomae_config
from reelmae.model.mae import MaskedAutoencoder, complement, mean_squared_error
from reelmae.model.patches import gather_patches, patchify

SMALL: dict[str, Any] = {
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


def make(**changes: Any) -> tuple[MaskedAutoencoder, Tensor, Tensor]:
    torch.manual_seed(0)
    model = MaskedAutoencoder(MAEConfig(**{**SMALL, **changes}))
    for parameter in model.parameters():  # nothing at a neutral value: what is dropped or swapped shows
        torch.nn.init.normal_(parameter, std=0.2)
    clips = torch.randn(2, 3, 8, 16, 16)
    ids = torch.stack([torch.randperm(16)[:5] for _ in range(2)])
    return model, clips, ids


def removed_only_noise(model: MaskedAutoencoder, clips: Tensor, ids: Tensor) -> Tensor:
    """The clip with the content of every removed patch replaced by noise."""
    c = model.config
    holes = (
        torch.ones(len(clips), c.n_tokens).scatter(1, ids, 0.0).reshape(-1, *c.grid_THW).repeat_interleave(c.t_patch, 1)
    )
    holes = holes.repeat_interleave(c.patch, 2).repeat_interleave(c.patch, 3)[:, None]
    return torch.where(holes.bool(), torch.randn_like(clips) * 9, clips)


@pytest.mark.parametrize("encoder", ["sparse", "dense"])
def test_the_content_of_removed_patches_cannot_reach_the_prediction(encoder: str) -> None:
    model, clips, ids = make(encoder=encoder)
    one = model(clips, ids)
    noisy = removed_only_noise(model, clips, ids)
    other = model(noisy, ids)
    assert not torch.equal(clips, noisy)
    assert torch.equal(one.preds["space"], other.preds["space"])
    assert one.loss != other.loss


@pytest.mark.parametrize("encoder", ["sparse", "dense"])
def test_the_content_of_kept_patches_reaches_the_prediction_of_all_tokens(encoder: str) -> None:
    model, clips, ids = make(encoder=encoder)
    other = clips.clone()
    t, h, w = ids[0, 0] // 4, ids[0, 0] // 2 % 2, ids[0, 0] % 2
    other[0, :, t * 2, h * 8, w * 8] += 5.0
    changed = (model.predict(clips, ids) != model.predict(other, ids)).any(-1)
    assert changed[0].all()
    assert not changed[1].any()


@pytest.mark.parametrize("encoder", ["sparse", "dense"])
@pytest.mark.parametrize(("target_norm", "pred_t_dim"), [("patch", None), ("none", None), ("patch", 8)])
def test_loss_is_that_of_the_plain_formula(encoder: str, target_norm: str, pred_t_dim: int | None) -> None:
    model, clips, ids = make(encoder=encoder, target_norm=target_norm, pred_t_dim=pred_t_dim)
    clips[0, :, :, :8] *= 1e-3  # nearly constant patches: there the eps matters
    out, pred_BLP = model(clips, ids), model.predict(clips, ids)
    frames = [0, 2, 4, 7] if pred_t_dim is None else list(range(8))
    per_token = len(frames) // 4
    losses = []
    for b in range(2):
        for token in set(range(16)) - set(ids[b].tolist()):
            t, h, w = token // 4, token // 2 % 2, token % 2
            values = [
                clips[b, c, frame, h * 8 + p, w * 8 + q].item()
                for frame in frames[t * per_token : (t + 1) * per_token]
                for p in range(8)
                for q in range(8)
                for c in range(3)
            ]
            if target_norm == "patch":
                mean = sum(values) / len(values)
                var = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
                values = [(v - mean) / (var + 1e-6) ** 0.5 for v in values]
            pred = pred_BLP[b, token].tolist()
            losses.append(sum((x - y) ** 2 for x, y in zip(pred, values, strict=True)) / len(values))
    assert len(losses) == out.ids_BQ.numel() == 2 * 11
    assert out.loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_sparse_encoder_is_the_blocks_on_gathered_tokens_of_a_full_embedding() -> None:
    model, clips, ids = make()
    encoder = model.encoder
    full = encoder.patch_embed(patchify(clips, 2, 8)) + encoder.pos.tokens()
    cls = encoder.cls_token + encoder.pos.cls + torch.zeros(2, 1, 24)
    x = torch.cat((cls, full.gather(1, ids[..., None].expand(-1, -1, 24))), dim=1)
    for block in encoder.blocks:
        x = block(x)
    torch.testing.assert_close(encoder(clips, ids), encoder.norm(x))


def test_keeping_all_tokens_is_the_unmasked_encoder() -> None:
    model, clips, _ = make()
    everything = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(model.encode(clips, everything), model.encode(clips))


@pytest.mark.parametrize("encoder", ["sparse", "dense"])
def test_the_order_of_kept_tokens_does_not_matter(encoder: str) -> None:
    model, clips, ids = make(encoder=encoder)
    shuffled = ids[:, torch.randperm(ids.shape[1])]
    one, other = model(clips, ids), model(clips, shuffled)
    torch.testing.assert_close(one.preds["space"], other.preds["space"], rtol=0, atol=2e-5)
    torch.testing.assert_close(model.predict(clips, ids), model.predict(clips, shuffled), rtol=0, atol=2e-5)
    torch.testing.assert_close(one.loss, other.loss)
    assert torch.equal(one.ids_BQ, other.ids_BQ)


def test_dense_encoder_carries_all_tokens_and_sparse_the_kept_ones() -> None:
    for encoder, tokens in (("sparse", 5), ("dense", 16)):
        model, clips, ids = make(encoder=encoder)
        seen: list[int] = []
        for block in model.encoder.blocks:
            block.register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out.shape[1]))
        model(clips, ids)
        assert seen == [tokens + 1] * 2


def test_dense_and_sparse_share_the_definition_of_the_loss() -> None:
    for encoder in ("sparse", "dense"):
        model, clips, ids = make(encoder=encoder)
        out = model(clips, ids)
        target = model.targets.space(clips, out.ids_BQ)
        torch.testing.assert_close(out.loss, mean_squared_error(out.preds["space"], target))
        assert torch.equal(out.ids_BQ, complement(ids, 16))


@pytest.mark.parametrize("encoder", ["sparse", "dense"])
def test_predicted_tokens_are_predicted_as_among_all(encoder: str) -> None:
    model, clips, ids = make(encoder=encoder)
    out, everything = model(clips, ids), model.predict(clips, ids)
    for b in range(2):
        torch.testing.assert_close(out.preds["space"][b], everything[b, out.ids_BQ[b]], rtol=0, atol=2e-5)


def test_removed_tokens_are_those_not_kept_ascending() -> None:
    ids = torch.tensor([[5, 0, 3], [1, 2, 6]])
    assert complement(ids, 7).tolist() == [[1, 2, 4, 6], [0, 3, 4, 5]]


@pytest.mark.parametrize("encoder", ["sparse", "dense"])
def test_every_parameter_gets_a_gradient(encoder: str) -> None:
    model, clips, ids = make(encoder=encoder)
    model(clips, ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def every_token(clips: Tensor) -> Tensor:
    return torch.arange(16).expand(len(clips), -1)


@pytest.mark.parametrize("target_norm", ["patch", "channel", "none"])
@pytest.mark.parametrize("unit_pixels", [True, False])
def test_the_true_target_as_prediction_gives_the_true_frames_back(target_norm: str, unit_pixels: bool) -> None:
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    model, clips, _ = make(target_norm=target_norm, unit_pixels=unit_pixels, pixel_mean=mean, pixel_std=std)
    frames = model.to_clip(model.targets.space(clips, every_token(clips)), clips)
    torch.testing.assert_close(frames, clips[:, :, [0, 2, 4, 7]], rtol=0, atol=1e-5)


def test_predicting_each_patch_mean_costs_about_one_with_normalised_targets() -> None:
    model, clips, ids = make()
    loss = mean_squared_error(torch.zeros(2, 11, 192), model.targets.space(clips, complement(ids, 16)))
    assert loss.item() == pytest.approx(191 / 192, abs=1e-4)  # unbiased variance


@pytest.mark.parametrize("encoder", ["sparse", "dense"])
def test_compiles_without_graph_breaks(encoder: str) -> None:
    model, clips, ids = make(encoder=encoder)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    one, other = model(clips, ids), compiled(clips, ids)
    torch.testing.assert_close(one.preds["space"], other.preds["space"], rtol=0, atol=2e-5)
    other.loss.backward()
    assert model.encoder.patch_embed.weight.grad is not None


@pytest.mark.parametrize("encoder", ["sparse", "dense"])
def test_bfloat16_autocast_stays_near_float32_and_gives_a_float32_loss(encoder: str) -> None:
    model, clips, ids = make(encoder=encoder)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(clips, ids)
    assert low.loss.dtype == torch.float32
    assert low.loss.item() == pytest.approx(model(clips, ids).loss.item(), rel=0.02)


def test_initialisation_is_that_of_mae_st() -> None:
    torch.manual_seed(0)
    model = MaskedAutoencoder(MAEConfig(frames=4, size=32, dim=192, depth=1, heads=3, decoder_dim=96, decoder_heads=3))
    for name, p in model.named_parameters():
        if name == "encoder.patch_embed.bias":  # as that of a convolution
            assert 0.95 / 1536**0.5 < p.abs().max().item() <= 1 / 1536**0.5
        elif name.endswith(".bias") or name == "decoder.cls_token":
            assert not p.any(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        elif p.dim() == 2:
            out_in = sum(p.shape) if "qkv" not in name else 2 * p.shape[1]  # q, k and v each for itself
            assert p.abs().max().item() == pytest.approx((6 / out_in) ** 0.5, rel=0.01), name
        else:
            assert p.std().item() == pytest.approx(0.02, rel=0.35), name


def test_initialisation_of_videomae_is_its_own() -> None:
    torch.manual_seed(0)
    model = MaskedAutoencoder(videomae_config("T", frames=4, size=32, depth=1, decoder_dim=96, decoder_heads=3))
    largest = {name: p.abs().max().item() for name, p in model.named_parameters()}
    xavier = {name: (6 / sum(p.shape)) ** 0.5 for name, p in model.named_parameters() if p.dim() == 2}
    for name, bound in xavier.items():
        if name not in ("encoder.patch_embed.weight", "decoder.embed.weight"):
            assert largest[name] == pytest.approx(bound, rel=0.01), name
    assert largest["encoder.patch_embed.weight"] == pytest.approx(1536**-0.5, rel=0.01)
    assert largest["encoder.patch_embed.bias"] == pytest.approx(1536**-0.5, rel=0.05)
    assert largest["decoder.embed.weight"] == pytest.approx(192**-0.5, rel=0.01)
    assert 0.017 < largest["decoder.mask_token"] <= 0.02
    assert largest["encoder.blocks.0.attn.qkv.q_bias"] == largest["decoder.pred.bias"] == 0


@pytest.mark.parametrize(
    ("changes", "value", "remedy"),
    [
        ({"frames": 15}, "frames=15", "t_patch=2 divides, such as 14"),
        ({"size": 100}, "size=100", "such as 96"),
        ({"heads": 7}, "dim=768", "heads=7"),
        ({"decoder_dim": 100}, "decoder_dim=100", "decoder_heads=16"),
        ({"pred_t_dim": 12}, "pred_t_dim=12", "multiple of frames / t_patch = 8"),
        ({"pred_t_dim": 32}, "pred_t_dim=32", "at most frames = 16"),
        ({"depth": 0}, "depth=0", "at least 1"),
        ({"encoder": "half"}, "encoder='half'", "'sparse' or 'dense'"),
    ],
)
def test_an_impossible_config_names_the_value_and_the_remedy(changes: dict[str, Any], value: str, remedy: str) -> None:
    with pytest.raises(ValueError) as e:
        MAEConfig(**changes)
    assert value in str(e.value) and remedy in str(e.value)


def test_presets_have_the_papers_sizes_and_take_overrides() -> None:
    assert mae_config("vit_b") == mae_config("B") == MAEConfig()
    large = mae_config("vit_l", frames=8)
    assert (large.dim, large.depth, large.heads, large.frames) == (1024, 24, 16, 8)
    assert MAEConfig().n_tokens == 1568
    with pytest.raises(ValueError, match=r"preset='vit_x': give one of vit_t, vit_s, vit_b, vit_l, vit_h"):
        mae_config("vit_x")


@pytest.mark.parametrize(("frames", "index"), [(4, [0, 3]), (16, [0, 2, 4, 6, 8, 10, 12, 15])])
def test_target_frames_are_the_truncated_linspace(frames: int, index: list[int]) -> None:
    assert MAEConfig(frames=frames).target_frame_index() == index


def test_wrong_shapes_are_named() -> None:
    model, clips, ids = make()
    with pytest.raises(ValueError, match=r"takes \[B, 3, 8, 16, 16\]"):
        model(clips[:, :, :6], ids)
    with pytest.raises(ValueError, match="keep at least 1 and remove at least 1"):
        model(clips, torch.arange(16).expand(2, -1))
    with pytest.raises(ValueError, match=r"give \[2, tokens\]"):
        model(clips, ids[:1])


def test_kept_patches_are_read_and_no_others() -> None:
    clips = torch.full((1, 3, 8, 16, 16), float("nan"))
    clips[:, :, 2:4, :8, 8:] = 1.0  # token 5 of a 4 × 2 × 2 grid
    assert (gather_patches(clips, torch.tensor([[5]]), 2, 8) == 1).all()
