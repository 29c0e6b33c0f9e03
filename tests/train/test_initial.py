"""A run that begins from the weights of a file: what it takes, what it refuses, and what it needs when it is resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from reelmae.model.mae import MaskedAutoencoder
from reelmae.model.weights import load_model, save_as, save_safetensors
from reelmae.model.weights.layouts import from_ours
from reelmae.pipeline.errors import ConfigError, InputError
from reelmae.pipeline.loading.loader import ClipLoader
from reelmae.tools.convert import export, import_weights
from reelmae.train.config import PretrainConfig
from reelmae.train.initial import begin_from
from reelmae.train.pretraining import pretrain

MakeConfig = Callable[..., PretrainConfig]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET = ["model.pixel_mean=[0.485,0.456,0.406]", "model.pixel_std=[0.229,0.224,0.225]"]


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


def test_weights_of_a_published_videomae_begin_a_run_on_pixels_normalised_as_in_its_training(
    tiny: MakeConfig, tmp_path: Path
) -> None:
    sizes = ["model.objective=videomae", "model.frames=4", "run.steps=1"]
    torch.manual_seed(1)
    published = MaskedAutoencoder(tiny(*sizes, *IMAGENET).model.mae())
    with torch.no_grad():
        for parameter in published.parameters():
            parameter.mul_(4)  # predictions that depend on the input more than a fresh model's
    save_as(tmp_path / "theirs.pth", published, "videomae")
    import_weights(tmp_path / "theirs.pth", tmp_path / "a.safetensors", heads=2, decoder_heads=2, frames=4)
    init = f"run.init={tmp_path / 'a.safetensors'}"

    with pytest.raises(InputError, match=r"pixel_mean=\(0\.485, .*the model has \(0\.45, ") as e:
        pretrain(tiny(*sizes, init))
    keys = str(e.value).partition("give the run the same: ")[2].split(" ")  # ready to paste
    assert keys == IMAGENET

    config = tiny(*sizes, init, *keys)
    summary = pretrain(config)
    with ClipLoader(config.data.open(), tiny(*sizes).loader_config()) as loader:
        batch = next(iter(loader))
    pixels_BCTHW = batch.clips_BCTHW * 0.225 + 0.45
    mean, std = torch.tensor(MEAN).view(3, 1, 1, 1), torch.tensor(STD).view(3, 1, 1, 1)
    with ClipLoader(config.data.open(), config.loader_config()) as loader:
        fed = next(iter(loader)).clips_BCTHW
    assert torch.allclose(fed, (pixels_BCTHW - mean) / std, atol=1e-5)
    loss = published((pixels_BCTHW - mean) / std, batch.ids_keep_BK, batch.ids_decode_BQ).loss.item()
    assert summary.loss_first == pytest.approx(loss, rel=1e-5)
    wrong = published(batch.clips_BCTHW, batch.ids_keep_BK, batch.ids_decode_BQ).loss.item()
    assert summary.loss_first != pytest.approx(wrong, rel=1e-3)


def test_a_runs_pixel_statistics_are_in_its_checkpoint_and_export_and_do_not_change(
    tiny: MakeConfig, tmp_path: Path
) -> None:
    summary = pretrain(tiny("run.steps=1", *IMAGENET))
    facts = export(summary.checkpoint, tmp_path / "e.safetensors", encoder_only=True)
    for path in (summary.checkpoint, tmp_path / "e.safetensors"):
        config = load_model(path).config
        assert (config.pixel_mean, config.pixel_std) == (MEAN, STD)
    assert (facts["pixel_mean"], facts["pixel_std"]) == (list(MEAN), list(STD))
    assert pretrain(tiny("run.steps=2", *IMAGENET)).steps == 2
    written_out = [
        f"model.{name}={getattr(tiny(*IMAGENET).model.mae(), name)}" for name in ("mlp_ratio", "decoder_pos")
    ]
    assert pretrain(tiny("run.steps=3", *IMAGENET, *written_out)).steps == 3  # the same model, said in more words
    with pytest.raises(
        ConfigError, match=r"model\.pixel_mean=None \(was \(0\.485, 0\.456, 0\.406\)\); model\.pixel_std="
    ):
        pretrain(tiny("run.steps=4"))


def test_a_file_that_is_not_there_is_named_with_its_key(tiny: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run\.init=.*absent\.safetensors: no such file"):
        pretrain(tiny(f"run.init={tmp_path / 'absent.safetensors'}"))
