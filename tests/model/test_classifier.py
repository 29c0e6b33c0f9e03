"""The classifier and the probes are what they say; test_reference.py holds the classifier to the reference codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reelmae.model.classifier import AttentiveProbe, Classifier, ClassifierConfig, LinearProbe

TINY: dict[str, Any] = {"frames": 4, "size": 16, "patch": 8, "dim": 16, "depth": 2, "heads": 2, "classes": 5}


def tiny(**changes: Any) -> Classifier:
    torch.manual_seed(0)
    return Classifier(ClassifierConfig(**{**TINY, **changes}))


def clips(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 4, 16, 16, generator=torch.Generator().manual_seed(1))


def test_it_pools_before_it_normalises_and_leaves_the_class_token_out() -> None:
    model = tiny().eval()
    with torch.no_grad():
        model.encoder.cls_token += 3  # reaches the mean through attention only
        model.norm.weight.copy_(torch.linspace(0.5, 2, 16))
        tokens = model.encoder(clips())
        mean = tokens[:, 1:].mean(1)
        standard = (mean - mean.mean(1, keepdim=True)) / (mean.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
        assert torch.allclose(model.features(clips()), standard * model.norm.weight + model.norm.bias, atol=1e-5)
        assert torch.allclose(
            model(clips()), model.features(clips()) @ model.head.weight.T + model.head.bias, atol=1e-6
        )


def test_without_a_class_token_every_patch_is_in_the_mean() -> None:
    model = tiny(cls_token=False).eval()
    with torch.no_grad():
        assert torch.allclose(model.features(clips()), model.norm(model.encoder(clips()).mean(1)), atol=1e-6)


def test_its_parameters_are_encoder_norm_and_head() -> None:
    model = tiny()
    assert {name.split(".")[0] for name in model.state_dict()} == {"encoder", "norm", "head"}
    assert not any(name.startswith("encoder.norm") for name in model.state_dict())
    assert model.head.weight.shape == (5, 16)


def test_the_head_begins_near_nothing_so_that_all_classes_are_alike() -> None:
    model = tiny(classes=2000)
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.1)
    assert not model.head.bias.any()


def test_dropout_and_drop_path_act_in_training_only() -> None:
    model = tiny(dropout=0.5, drop_path=0.5, depth=4)
    with torch.no_grad():
        model.head.weight.normal_()
        model.eval()
        assert torch.equal(model(clips()), model(clips()))
        model.train()
        assert torch.equal(tiny().train()(clips()), tiny().train()(clips()))  # rates of 0
        assert not torch.equal(model.features(clips()), model.features(clips()))  # drop path
        for block in model.encoder.blocks:
            block.eval()
        assert torch.equal(model.features(clips()), model.features(clips()))
        assert not torch.equal(model(clips()), model(clips()))  # dropout


def test_all_parameters_are_trained() -> None:
    model = tiny()
    with torch.no_grad():
        model.head.weight.normal_()
    nn.functional.cross_entropy(model(clips()), torch.tensor([0, 1, 2])).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"classes": 0}, "classes=0"),
        ({"dropout": 1.0}, r"dropout=1\.0"),
        ({"drop_path": -0.1}, r"drop_path=-0\.1"),
        ({"pixel_std": (0.1, 0, 0.1)}, "pixel_std"),
        ({"size": 15}, "size=15"),
    ],
)
def test_a_value_that_cannot_be_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ClassifierConfig(**{**TINY, **change})


def test_clips_of_another_size_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 2, 16, 16\).*3, 4, 16, 16"):
        tiny()(torch.zeros(1, 3, 2, 16, 16))


# --- probes


def test_a_linear_probe_brings_features_of_any_scale_to_one() -> None:
    torch.manual_seed(0)
    probe = LinearProbe(8, 3)
    features = torch.randn(64, 8)
    logits = probe(features)
    assert logits.shape == (64, 3)
    assert torch.allclose(probe(1000 * features + 5), logits, atol=1e-4)
    assert {name for name, _ in probe.named_parameters()} == {"head.weight", "head.bias"}


def test_a_linear_probe_in_eval_mode_takes_each_clip_for_itself() -> None:
    torch.manual_seed(0)
    probe, features = LinearProbe(8, 3), torch.randn(64, 8)
    probe(features)
    probe.eval()
    assert torch.allclose(probe(features)[:1], probe(features[:1]), atol=1e-6)


def test_an_attentive_probe_takes_tokens_in_any_order_and_number() -> None:
    torch.manual_seed(0)
    probe = AttentiveProbe(128, 3).eval()
    tokens = torch.randn(2, 10, 128)
    logits = probe(tokens)
    assert logits.shape == (2, 3)
    assert torch.allclose(probe(tokens[:, torch.randperm(10)]), logits, atol=1e-6)
    assert probe(tokens[:, :4]).shape == (2, 3)
    assert probe.pool.num_heads == 2
    with pytest.raises(ValueError, match="heads=3"):
        AttentiveProbe(128, 3, heads=3)


def test_an_attentive_probe_finds_one_token_of_many_and_a_mean_does_not() -> None:
    """The class is the sign of one feature of the one token that is marked; every other token has a random sign."""
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> tuple[Tensor, Tensor]:
        tokens = torch.zeros(n, 32, 16)
        tokens[..., 0] = torch.randint(0, 2, (n, 32), generator=generator) * 2 - 1
        at = torch.randint(0, 32, (n,), generator=generator)
        tokens[torch.arange(n), at, 1] = 3
        return tokens, (tokens[torch.arange(n), at, 0] > 0).long()

    def accuracy(probe: nn.Module, features: Callable[[Tensor], Tensor]) -> float:
        optimiser = torch.optim.AdamW(probe.parameters(), lr=3e-3)
        for _ in range(150):
            tokens, labels = draw(64)
            optimiser.zero_grad()
            nn.functional.cross_entropy(probe(features(tokens)), labels).backward()
            optimiser.step()
        tokens, labels = draw(500)
        with torch.no_grad():
            return float((probe.eval()(features(tokens)).argmax(1) == labels).float().mean())

    torch.manual_seed(0)
    assert accuracy(AttentiveProbe(16, 2, heads=2), lambda tokens: tokens) > 0.95
    assert accuracy(LinearProbe(16, 2), lambda tokens: tokens.mean(1)) < 0.75


@pytest.mark.parametrize(
    "model", [tiny().eval(), LinearProbe(16, 3), AttentiveProbe(16, 3)], ids=lambda m: type(m).__name__
)
def test_it_compiles_without_a_break(model: nn.Module) -> None:
    inputs = {Classifier: clips(), LinearProbe: torch.randn(4, 16), AttentiveProbe: torch.randn(4, 6, 16)}[type(model)]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(inputs), model(inputs), atol=1e-5)
