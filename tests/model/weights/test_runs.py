"""The checkpoints of a run: found in their order, read by the same entrance as other weights, refused in another
format.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reelmae.model.config import MAEConfig
from reelmae.model.mae import MaskedAutoencoder
from reelmae.model.vit import Encoder
from reelmae.model.weights import WeightsError, find_checkpoint, load_model, read_checkpoint, save_as, save_safetensors
from reelmae.model.weights.configs import config_to_json
from reelmae.model.weights.pixels import IMAGENET
from reelmae.model.weights.runs import FORMAT, checkpoints
from reelmae.pipeline.errors import InputError

Make = Callable[..., Any]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def save_step(run: Path, step: int, model: MaskedAutoencoder, **changes: Any) -> Path:
    """What pretraining saves, as far as the model is concerned."""
    path = run / "checkpoints" / f"step_{step:06d}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "format": FORMAT,
        "step": step,
        "config": "{}",
        "model_config": config_to_json(model.config),
        "index_digest": "0",
        "model": model.state_dict(),
        "optimizer": {"state": {0: {"step": torch.ones(1)}}},
    }
    torch.save({**content, **changes}, path)
    return path


def test_checkpoints_are_listed_by_number(tmp_path: Path) -> None:
    assert checkpoints(tmp_path) == []
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("step_1000000.pt", "step_000900.pt", "step_999999.pt", "step_last.pt", "step_000950.pt.part", "x.pt"):
        (folder / name).touch()
    expected = [folder / f"step_{n}.pt" for n in ("000900", "999999", "1000000")]
    assert checkpoints(tmp_path) == expected
    assert checkpoints(str(tmp_path)) == expected
    assert find_checkpoint(tmp_path) == find_checkpoint(str(tmp_path)) == expected[-1]
    assert find_checkpoint(folder / "x.pt") == folder / "x.pt"


def test_a_folder_without_checkpoints_and_a_missing_path_are_named(tmp_path: Path) -> None:
    for call in (find_checkpoint, load_model):
        with pytest.raises(InputError, match=rf"{tmp_path}: holds no checkpoints/step_\*\.pt; give a checkpoint or"):
            call(tmp_path)
        with pytest.raises(InputError, match=r"absent: no such file or folder; give a checkpoint or"):
            call(tmp_path / "absent")


def test_a_run_a_checkpoint_and_an_export_give_the_same_model(small: Make, randomised: Make, tmp_path: Path) -> None:
    old, new = randomised(small("mae_st"), 1), randomised(small("mae_st"), 2)
    save_step(tmp_path / "run", 999_999, old)
    path = save_step(tmp_path / "run", 1_000_000, new)
    save_safetensors(tmp_path / "new.safetensors", new)
    for source in (tmp_path / "run", str(tmp_path / "run"), path, tmp_path / "new.safetensors"):
        model = load_model(source)
        assert isinstance(model, MaskedAutoencoder) and not model.training
        assert model.config == new.config
        assert same(model.state_dict(), new.state_dict())
        encoder = load_model(source, encoder_only=True)
        assert isinstance(encoder, Encoder) and same(encoder.state_dict(), new.encoder.state_dict())
        assert load_model(source, frames=8).config.frames == 8
    first = load_model(checkpoints(tmp_path / "run")[0])
    assert same(first.state_dict(), old.state_dict())


def test_the_model_is_put_on_the_device(small: Make, randomised: Make, tmp_path: Path) -> None:
    """The device `meta` holds shapes only, and every machine has it."""
    save_step(tmp_path, 1, randomised(small("mae_st")))
    model = load_model(tmp_path, device="meta")
    assert {value.device.type for value in (*model.parameters(), *model.buffers())} == {"meta"}
    assert not model.training
    assert {value.device.type for value in load_model(tmp_path).parameters()} == {"cpu"}


@pytest.mark.parametrize(
    ("changes", "found"),
    [({"format": 1, "model_config": None}, "1"), ({"format": 3}, "3"), ({"format": torch.ones(2)}, r"tensor\(.*\)")],
)
def test_a_checkpoint_of_another_format_is_refused_with_the_remedy(
    changes: dict[str, Any], found: str, small: Make, randomised: Make, tmp_path: Path
) -> None:
    save_step(tmp_path, 7, randomised(small("mae_st")), **changes)
    said = rf"step_000007\.pt: is a checkpoint of reelmae of format {found}, and this version reads format 2; use the version"
    for call in (
        load_model,
        lambda run: load_model(run, encoder_only=True),
        lambda run: read_checkpoint(find_checkpoint(run)),
    ):
        with pytest.raises(InputError, match=said):
            call(tmp_path)


def test_the_key_format_of_another_code_is_not_looked_at(small: Make, randomised: Make, tmp_path: Path) -> None:
    save_as(tmp_path / "a", randomised(small("mae_st")), "mae_st")
    torch.save({**torch.load(tmp_path / "a", weights_only=True), "format": 7}, tmp_path / "b")
    assert read_checkpoint(tmp_path / "b").layout == "mae_st"


@pytest.mark.parametrize("kind", ["videomae", "videomae_classifier"])
def test_pixel_statistics_of_videomae_stay_through_import_export_and_runs(
    kind: str, small: Make, randomised: Make, tmp_path: Path
) -> None:
    """An import says ImageNet's, and so do an export of it, an export of that one's encoder, and a run's checkpoint."""
    save_as(tmp_path / "theirs.pth", randomised(small(kind, pixel_mean=IMAGENET[0], pixel_std=IMAGENET[1])), "videomae")
    hints = {"heads": 3, "frames": 4, "size": 24, **({"decoder_heads": 2} if kind == "videomae" else {})}
    imported = load_model(tmp_path / "theirs.pth", **hints)
    save_safetensors(tmp_path / "ours.safetensors", imported)
    exported = load_model(tmp_path / "ours.safetensors")
    save_safetensors(tmp_path / "encoder.safetensors", exported, encoder_only=True)
    save_as(tmp_path / "again.pth", exported, "videomae")
    models = [
        imported,
        exported,
        load_model(tmp_path / "encoder.safetensors"),
        load_model(tmp_path / "again.pth", **hints),
        load_model(tmp_path / "theirs.pth", encoder_only=True, heads=3, frames=4, size=24),
    ]
    if isinstance(imported.config, MAEConfig):
        save_step(tmp_path / "run", 1, imported)
        models.append(load_model(tmp_path / "run"))
    for model in models:
        assert model.config.pixel_mean == (0.485, 0.456, 0.406)
        assert model.config.pixel_std == (0.229, 0.224, 0.225)
    assert same(exported.state_dict(), imported.state_dict())
    assert same(load_model(tmp_path / "again.pth", **hints).state_dict(), imported.state_dict())


def test_an_error_of_weights_is_an_error_of_input(tmp_path: Path) -> None:
    assert issubclass(WeightsError, InputError) and WeightsError.exit_status == 2
    (tmp_path / "a.pt").write_bytes(b"x")
    with pytest.raises(InputError, match=r"a\.pt: is neither"):
        load_model(tmp_path / "a.pt")
