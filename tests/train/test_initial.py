"""A run that begins from the weights of a file: what it takes, what it refuses, and what it needs when it is resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from reelmae.model.mae import MaskedAutoencoder
from reelmae.model.weights import from_ours, save_safetensors
from reelmae.pipeline.errors import InputError
from reelmae.train.config import PretrainConfig
from reelmae.train.initial import begin_from
from reelmae.train.pretraining import pretrain

MakeConfig = Callable[..., PretrainConfig]


def test_a_run_begins_where_the_file_ends(tiny: MakeConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first = pretrain(tiny(f"run.out={tmp_path / 'first'}", "run.steps=60", "optim.warmup=0.1"))
    again = tiny(f"run.out={tmp_path / 'again'}", "run.steps=1", f"run.init={first.checkpoint}")
    assert pretrain(again).loss_first < 0.9 * first.loss_first
    assert f"began from {first.checkpoint}: " in capfd.readouterr().err


def test_a_resumed_run_does_not_need_the_file(tiny: MakeConfig, tmp_path: Path) -> None:
    config = tiny()
    weights = tmp_path / "weights.safetensors"
    save_safetensors(weights, MaskedAutoencoder(config.model.mae()))
    pretrain(tiny("run.steps=2", f"run.init={weights}"))
    weights.unlink()
    assert pretrain(tiny("run.steps=3", f"run.init={weights}")).steps == 3


def test_what_the_file_says_and_no_shape_shows_must_agree(tiny: MakeConfig, tmp_path: Path) -> None:
    config = tiny()
    heads = config.model.mae().heads
    other = tiny(f"model.heads={2 * heads}")
    save_safetensors(tmp_path / "a.safetensors", MaskedAutoencoder(other.model.mae()))
    model = MaskedAutoencoder(config.model.mae())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=rf"heads={2 * heads} \(the model has {heads}\)"):
        begin_from(model, str(tmp_path / "a.safetensors"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_file_of_another_code_is_to_be_imported_first(tiny: MakeConfig, tmp_path: Path) -> None:
    config = tiny().model.mae()
    model = MaskedAutoencoder(config)
    torch.save({"model": from_ours(model.state_dict(), "mae_st", config)}, tmp_path / "theirs.pth")
    with pytest.raises(InputError, match=r"does not say its heads; .*reelmae import-weights .*theirs\.pth"):
        begin_from(model, str(tmp_path / "theirs.pth"))


def test_what_is_left_or_missing_is_refused_unless_allowed_and_then_told(tiny: MakeConfig, tmp_path: Path) -> None:
    save_safetensors(tmp_path / "a.safetensors", MaskedAutoencoder(tiny().model.mae()))
    model = MaskedAutoencoder(
        tiny("model.objective=motion", "model.pos=separable", "model.decoder_pos=separable").model.mae()
    )
    with pytest.raises(InputError, match=r"motion_decoder\.embed\.weight.*run\.init_allow"):
        begin_from(model, str(tmp_path / "a.safetensors"))
    told = begin_from(model, str(tmp_path / "a.safetensors"), allow=["motion_decoder*"])
    assert "as initialised: motion_decoder." in told
