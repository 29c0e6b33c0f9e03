"""`import-weights` and `export`: what they write, what they say, what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from reelmae.model.classifier import Classifier, ClassifierConfig
from reelmae.model.config import MAEConfig, mae_config, slowfast_config
from reelmae.model.vit import Encoder
from reelmae.model.weights import load_model, read_checkpoint, save_as, save_safetensors
from reelmae.model.weights.layouts import from_ours
from reelmae.model.weights.models import build
from reelmae.pipeline.errors import ConfigError, InputError
from reelmae.tools.convert import export, import_weights

CLIP: dict[str, Any] = {"frames": 4, "size": 24, "patch": 8}
SIZES = CLIP | {"dim": 24, "depth": 1, "heads": 3, "decoder_dim": 64, "decoder_depth": 1, "decoder_heads": 1}


def published(path: Path, **changes: Any) -> nn.Module:
    """A model as PySlowFast publishes it, at `path`."""
    torch.manual_seed(0)
    model = build(slowfast_config("T", **{**SIZES, **changes}))
    state = from_ours(model.state_dict(), "slowfast", model.config)
    torch.save({"epoch": 1, "model_state": state, "optimizer_state": {}, "cfg": "A: 1\n"}, path)
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_published_file_becomes_ours_and_goes_back(tmp_path: Path) -> None:
    model = published(tmp_path / "a.pyth")
    said = import_weights(tmp_path / "a.pyth", tmp_path / "a.safetensors", heads=3)
    assert (said["layout"], said["model"], said["left"], said["resized"]) == (
        "slowfast",
        "MaskedAutoencoder",
        [],
        {},
    )
    assert set(said["placed"]) == set(model.state_dict())  # one block: no ranges
    assert said["config"]["heads"] == 3 and said["config"]["decoder_cls"] == "carried"
    assert same(load_model(tmp_path / "a.safetensors"), model)
    export(tmp_path / "a.safetensors", tmp_path / "b.pyth", format="slowfast")
    first, second = read_checkpoint(tmp_path / "a.pyth").state, read_checkpoint(tmp_path / "b.pyth").state
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_what_was_placed_and_left_is_named_with_its_blocks_in_one_line(tmp_path: Path) -> None:
    model = published(tmp_path / "a.pyth", depth=12, decoder_depth=3)
    said = import_weights(tmp_path / "a.pyth", tmp_path / "a.safetensors", heads=3, encoder_only=True)
    assert "encoder.blocks" not in str(said["placed"])  # the names of what was written: an encoder
    assert "blocks.0-11.attn.qkv.weight" in said["placed"] and "pos.spatial" in said["placed"]
    assert len(said["placed"]) == len(model.encoder.state_dict()) - 11 * 12
    assert "pred_head.transforms.0.0-2.norm1.bias" in said["left"]
    assert "pred_head.transforms.0.3.bias" in said["left"]  # the decoder's norm
    content = torch.load(tmp_path / "a.pyth", weights_only=True)
    content["model_state"] |= {f"aux.{i}.x": torch.ones(1) for i in (10, 0, 1, 2, 4)}
    torch.save(content, tmp_path / "a.pyth")
    said = import_weights(tmp_path / "a.pyth", tmp_path / "a.safetensors", heads=3, allow=["aux.*"])
    assert said["left"] == ["aux.0-2,4,10.x"]


def test_a_grid_that_cannot_be_is_told(tmp_path: Path) -> None:
    model = build(mae_config("T", **SIZES, pos="joint", decoder_pos="joint"))
    save_as(tmp_path / "a.pth", model, "mae_st")
    sizes = {"heads": 3, "decoder_heads": 1, "frames": 8, "size": 32}
    for grid in ((-2, -3, 3), (2, 9, 0)):
        with pytest.raises(InputError, match=r"a\.pth: grid=\[.*each at least 1"):
            import_weights(tmp_path / "a.pth", tmp_path / "a.safetensors", grid=grid, **sizes)
    said = import_weights(tmp_path / "a.pth", tmp_path / "a.safetensors", grid=(2, 3, 3), **sizes)
    assert len(said["resized"]) == 2


def test_an_export_says_how_the_model_is_to_be_fed(tmp_path: Path) -> None:
    sizes = {name: SIZES[name] for name in ("frames", "size", "patch", "dim", "depth", "heads")}
    videomae = {"cls_token": False, "pos": "sinusoid", "qkv_bias": "qv"}
    save_safetensors(tmp_path / "a.safetensors", build(ClassifierConfig(**sizes, **videomae, classes=5)))
    said = export(tmp_path / "a.safetensors", tmp_path / "b.pth", format="videomae")
    assert (said["pixel_mean"], said["pixel_std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    for format, out in (("timm", "c.pth"), ("safetensors", "c.safetensors")):
        assert export(tmp_path / "a.safetensors", tmp_path / out, format=format)["pixel_std"] == [0.225] * 3


def test_positions_are_resized_for_longer_clips_and_it_is_said(tmp_path: Path) -> None:
    published(tmp_path / "a.pyth")
    said = import_weights(tmp_path / "a.pyth", tmp_path / "a.safetensors", heads=3, frames=8, size=32)
    assert said["resized"]["encoder.pos.spatial"] == "[1, 9, 24] → [1, 16, 24]"
    assert len(said["resized"]) == 3
    config = load_model(tmp_path / "a.safetensors").config
    assert isinstance(config, MAEConfig) and (config.frames, config.size) == (8, 32)


def test_an_unknown_key_stops_an_import_unless_it_is_allowed(tmp_path: Path) -> None:
    published(tmp_path / "a.pyth")
    content = torch.load(tmp_path / "a.pyth", weights_only=True)
    content["model_state"]["pred_head.projections.1.weight"] = torch.ones(2)
    torch.save(content, tmp_path / "a.pyth")
    out = tmp_path / "a.safetensors"
    with pytest.raises(InputError, match=r"a\.pyth: .*pred_head\.projections\.1\.weight"):
        import_weights(tmp_path / "a.pyth", out, heads=3)
    assert not out.exists()
    said = import_weights(tmp_path / "a.pyth", out, heads=3, allow=["pred_head.projections.1.*"])
    assert said["left"] == ["pred_head.projections.1.weight"]


def test_an_initial_value_is_never_written_as_a_weight(tmp_path: Path) -> None:
    published(tmp_path / "a.pyth")
    content = torch.load(tmp_path / "a.pyth", weights_only=True)
    del content["model_state"]["norm.bias"]
    torch.save(content, tmp_path / "a.pyth")
    with pytest.raises(InputError, match=r"holds no encoder\.norm\.bias; give a whole checkpoint"):
        import_weights(tmp_path / "a.pyth", tmp_path / "a.safetensors", heads=3, allow=["*"])
    assert [path.name for path in tmp_path.iterdir()] == ["a.pyth"]


def test_the_encoder_alone_is_imported_and_exported(tmp_path: Path) -> None:
    model = published(tmp_path / "a.pyth")
    said = import_weights(tmp_path / "a.pyth", tmp_path / "a.safetensors", heads=3, encoder_only=True)
    assert said["model"] == "Encoder"
    encoder = load_model(tmp_path / "a.safetensors")
    assert isinstance(encoder, Encoder) and same(encoder, model.encoder)
    export(tmp_path / "a.safetensors", tmp_path / "b.pth", format="mae_st")
    assert same(load_model(tmp_path / "b.pth", heads=3), model.encoder)
    export(tmp_path / "a.safetensors", tmp_path / "c.safetensors", format="timm")
    clips = torch.rand(1, 3, 4, 24, 24)
    with torch.no_grad():
        joint = load_model(tmp_path / "c.safetensors", heads=3, frames=4)
        assert torch.allclose(joint(clips), model.encoder(clips), atol=1e-5)


def test_a_run_is_exported_from_its_newest_checkpoint(tiny_run: Path, tmp_path: Path) -> None:
    said = export(tiny_run / "train", tmp_path / "a.safetensors")
    assert (
        said["checkpoint"].endswith("step_000003.pt") and said["bytes"] == (tmp_path / "a.safetensors").stat().st_size
    )
    state = torch.load(said["checkpoint"], weights_only=True)["model"]
    model = load_model(tmp_path / "a.safetensors")
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    export(tiny_run / "train", tmp_path / "a.pth", format="mae_st")
    assert "decoder_pred.weight" in read_checkpoint(tmp_path / "a.pth").state


def test_a_classifier_is_exported_with_its_head(tmp_path: Path) -> None:
    sizes = {name: value for name, value in SIZES.items() if not name.startswith("decoder")}
    model = build(ClassifierConfig(**sizes, classes=5))
    save_safetensors(tmp_path / "a.safetensors", model)
    for format in ("mae_st", "slowfast", "timm"):
        export(tmp_path / "a.safetensors", tmp_path / "b.pth", format=format)
        back = load_model(tmp_path / "b.pth", heads=3, frames=4)
        assert isinstance(back, Classifier)
        assert torch.equal(back.head.weight, model.head.weight) and torch.equal(back.norm.bias, model.norm.bias)


def test_a_layout_that_has_no_place_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "a.safetensors", build(slowfast_config("T", **SIZES)))
    with pytest.raises(ConfigError, match=r"decoder_pos='joint' does not fit the layout 'mae_st'.*encoder only"):
        export(tmp_path / "a.safetensors", tmp_path / "b.pth", format="mae_st")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    export(tmp_path / "a.safetensors", tmp_path / "b.pth", format="mae_st", encoder_only=True)


def test_wrong_arguments_are_told(tmp_path: Path) -> None:
    save_as(tmp_path / "a.pth", build(mae_config("T", **SIZES)), "mae_st")
    with pytest.raises(ConfigError, match=r"ends in \.safetensors"):
        import_weights(tmp_path / "a.pth", tmp_path / "b.pt")
    with pytest.raises(ConfigError, match=r"ends in \.safetensors"):
        export(tmp_path / "a.pth", tmp_path / "b.pt")
    with pytest.raises(ConfigError, match="format=onnx"):
        export(tmp_path / "a.pth", tmp_path / "b.pt", format="onnx")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"a\.pth: heads: .*24 wide; give heads"):
        import_weights(tmp_path / "a.pth", tmp_path / "b.safetensors")
    with pytest.raises(InputError, match=r"a\.pth: .*'mae_st'.* first: reelmae import-weights .*a\.pth OUT"):
        export(tmp_path / "a.pth", tmp_path / "b.safetensors")
    with pytest.raises(InputError, match="no such"):
        import_weights(tmp_path / "c.pth", tmp_path / "b.safetensors")
    with pytest.raises(InputError, match="no such"):
        export(tmp_path / "c.pth", tmp_path / "b.safetensors")
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError, match="holds no checkpoints"):
        export(tmp_path / "run", tmp_path / "b.safetensors")
    with pytest.raises(InputError, match="is a folder"):
        import_weights(tmp_path / "run", tmp_path / "b.safetensors")
