"""Checkpoint files: what is read, what is refused, and models that come back from disk."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from reelmae.model.classifier import Classifier
from reelmae.model.config import MotionConfig, ViTConfig
from reelmae.model.mae import MaskedAutoencoder
from reelmae.model.vit import Encoder
from reelmae.model.weights import WeightsError, load, load_model, read_checkpoint, save_as, save_safetensors
from reelmae.model.weights.configs import config_from_json, config_to_json
from reelmae.model.weights.layouts import from_ours
from reelmae.model.weights.pixels import pixel_statistics

Make = Callable[..., Any]
KINDS = ["mae_st", "slowfast", "videomae", "motion", "mae_st_classifier", "videomae_classifier"]
KERNEL = {"patch_embed.proj.weight": torch.zeros(4, 3, 2, 8, 8)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class _Runs:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_comes_back_from_its_file_with_its_config(
    kind: str, small: Make, randomised: Make, tmp_path: Path
) -> None:
    changes = {"motion": MotionConfig(decoders="shared", gap=2, weight=0.5)} if kind == "motion" else {}
    model = randomised(small(kind, **changes))
    save_safetensors(tmp_path / "a.safetensors", model)
    back = load_model(tmp_path / "a.safetensors")
    assert type(back) is type(model) and not back.training
    assert back.config == model.config
    assert same(back.state_dict(), model.state_dict())


def test_an_encoder_alone_comes_back_and_computes_the_same(small: Make, randomised: Make, tmp_path: Path) -> None:
    clips = torch.rand(2, 3, 4, 24, 24)
    for kind, norm in (("mae_st", True), ("videomae", True), ("mae_st_classifier", False)):
        model = randomised(small(kind))
        save_safetensors(tmp_path / "a.safetensors", model, encoder_only=True)
        back = load_model(tmp_path / "a.safetensors")
        assert isinstance(back, Encoder) and type(back.config) is ViTConfig
        assert isinstance(back.norm, nn.LayerNorm) == norm
        with torch.no_grad():
            assert torch.equal(back(clips), model.encoder(clips))
        save_safetensors(tmp_path / "b.safetensors", back)
        assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_dense_models_encoder_is_written_without_its_mask_token(
    small: Make, randomised: Make, tmp_path: Path
) -> None:
    save_safetensors(tmp_path / "a.safetensors", randomised(small("mae_st", encoder="dense")), encoder_only=True)
    assert "encoder.mask_token" not in read_checkpoint(tmp_path / "a.safetensors").state
    assert isinstance(load_model(tmp_path / "a.safetensors"), Encoder)


@pytest.mark.parametrize("layout", ["mae_st", "slowfast", "videomae"])
@pytest.mark.parametrize("as_safetensors", [False, True])
def test_import_export_import_gives_equal_tensors(
    layout: str, as_safetensors: bool, small: Make, randomised: Make, tmp_path: Path
) -> None:
    mean, std = pixel_statistics(layout)
    config = small(layout, pixel_mean=mean, pixel_std=std)
    model = randomised(dataclasses.replace(config, pred_t_dim=config.n_target_frames))
    save_as(tmp_path / "a", model, layout, as_safetensors=as_safetensors)
    hints = {"heads": 3, "decoder_heads": model.config.decoder_heads, "frames": 4, "size": 24}
    first = load_model(tmp_path / "a", **hints)
    assert isinstance(first, MaskedAutoencoder) and same(first.state_dict(), model.state_dict())
    assert first.config == model.config
    save_as(tmp_path / "b", first, layout)
    assert same(load_model(tmp_path / "b", **hints).state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("kind", "layout", "whole"),
    [
        ("videomae", "videomae", True),
        ("videomae_classifier", "videomae", True),
        ("mae_st_classifier", "mae_st", True),
        ("mae_st", "mae_st", False),
        ("mae_st", "timm", True),
    ],
)
def test_a_model_of_otherwise_normalised_pixels_computes_the_same_from_those_its_layout_is_fed(
    kind: str, layout: str, whole: bool, small: Make, randomised: Make, tmp_path: Path
) -> None:
    config = small(kind, pixel_mean=(0.3, 0.45, 0.5), pixel_std=(0.2, 0.225, 0.4))
    model = randomised(config)
    save_as(tmp_path / "a", model, layout, encoder_only=not whole)
    decoder = {"decoder_heads": 2} if kind == "videomae" else {}
    back = load_model(tmp_path / "a", heads=3, frames=4, size=24, **decoder)
    assert (back.config.pixel_mean, back.config.pixel_std) == pixel_statistics(layout)
    # float64 leaves the rounding of the written patch embedding, and not that of the blocks
    model, back = model.double(), back.double()
    pixels = torch.rand(2, 3, 4, 24, 24, dtype=torch.float64)

    def normalised(c: ViTConfig) -> Tensor:
        mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None, None] for v in (c.pixel_mean, c.pixel_std))
        return (pixels - mean) / std

    clips, theirs = normalised(config), normalised(back.config)
    with torch.no_grad():
        encoder = back if isinstance(back, Encoder) else back.encoder
        assert torch.allclose(encoder(theirs), model.encoder(clips), atol=2e-6)
        assert not torch.allclose(encoder(clips), model.encoder(clips), atol=1e-2)
        if isinstance(back, Classifier):
            assert torch.allclose(back(theirs), model(clips), atol=2e-6)
        if isinstance(back, MaskedAutoencoder):
            keep = torch.tensor([[0, 4, 9], [2, 3, 17]])
            assert abs(back(theirs, keep).loss - model(clips, keep).loss) <= 1e-5


def test_a_target_of_otherwise_normalised_pixels_is_not_exported(small: Make, randomised: Make, tmp_path: Path) -> None:
    model = randomised(small("mae_st", pixel_mean=(0.5, 0.5, 0.5)))
    with pytest.raises(WeightsError, match=r"pixel_mean=\(0\.5, .*'mae_st' takes .*: export the encoder only"):
        save_as(tmp_path / "a", model, "mae_st")
    assert not (tmp_path / "a").exists()


def test_the_encoder_alone_is_read_without_asking_for_the_rest(small: Make, randomised: Make, tmp_path: Path) -> None:
    for kind in KINDS:
        model = randomised(small(kind))
        save_safetensors(tmp_path / "a", model)
        encoder = load_model(tmp_path / "a", encoder_only=True)
        assert type(encoder.config) is ViTConfig
        assert same(encoder.state_dict(), model.encoder.state_dict())
    model = randomised(small("mae_st"))
    state = from_ours(model.state_dict(), "mae_st", model.config)
    state["decoder_pos_embed_spatial"] = torch.ones(1, 25, 16)  # of another grid, but nobody's business
    torch.save({"model": state}, tmp_path / "b")
    checkpoint = read_checkpoint(tmp_path / "b")
    encoder, report = load(checkpoint, encoder_only=True, heads=3)
    assert same(encoder.state_dict(), model.encoder.state_dict())
    decoder = [n for n in state if n.startswith("decoder") or n == "mask_token"]
    assert report.left == decoder and report.placed == list(encoder.state_dict())
    with pytest.raises(WeightsError, match="decoder_heads=2: a ViTConfig has no such field"):
        load(checkpoint, encoder_only=True, heads=3, decoder_heads=2)
    odd = dataclasses.replace(checkpoint, state=checkpoint.state | {"fc_norm.bias": torch.ones(1)})
    with pytest.raises(WeightsError, match=r"b: .*without a place: fc_norm\.bias\."):
        load(odd, encoder_only=True, heads=3)


def test_a_grid_that_the_file_contradicts_or_has_no_use_for_is_refused(
    small: Make, randomised: Make, tmp_path: Path
) -> None:
    save_safetensors(tmp_path / "a", randomised(small("motion")))
    with pytest.raises(WeightsError, match=r"grid=\[2, 1, 9\]: the file's config says \[2, 3, 3\]"):
        load_model(tmp_path / "a", grid=(2, 1, 9), size=32)
    assert load_model(tmp_path / "a", grid=(2, 3, 3), size=32).config.size == 32
    save_as(tmp_path / "b", randomised(small("videomae_classifier")), "videomae")
    with pytest.raises(WeightsError, match="has no table of positions"):
        load_model(tmp_path / "b", heads=3, frames=4, size=24, grid=(2, 3, 3))


def test_a_file_is_written_under_the_key_that_its_code_reads(small: Make, randomised: Make, tmp_path: Path) -> None:
    for layout, key in (("mae_st", "model"), ("slowfast", "model_state"), ("videomae", "model")):
        save_as(tmp_path / "a", randomised(small(layout)), layout)
        content = torch.load(tmp_path / "a", weights_only=True)
        assert list(content) == [key]
    save_as(tmp_path / "a", randomised(small("mae_st")), "timm")
    assert "cls_token" in torch.load(tmp_path / "a", weights_only=True)


def test_a_file_is_no_larger_than_its_tensors(small: Make, randomised: Make, tmp_path: Path) -> None:
    """q, k and v are parts of one tensor, which must not be written three times."""
    model = randomised(small("mae_st", dim=96))
    for layout in ("mae_st", "timm"):
        save_as(tmp_path / "a", model, layout)
        state = from_ours(model.state_dict(), layout, model.config)
        values = sum(value.nbytes for value in state.values())
        with zipfile.ZipFile(tmp_path / "a") as archive:
            stored = sum(entry.file_size for entry in archive.infolist() if "/data/" in entry.filename)
        assert stored == values


@pytest.mark.parametrize("key", ["model", "model_state", "module", None])
def test_a_state_dict_is_found_under_its_key_or_at_the_top(
    key: str | None, small: Make, randomised: Make, tmp_path: Path
) -> None:
    model = randomised(small("slowfast"))
    state = from_ours(model.state_dict(), "slowfast", model.config)
    rest = {
        "epoch": 3,
        "cfg": "MODEL:\n  ARCH: mvit\n",
        "optimizer_state": {"state": {0: {"step": torch.ones(1)}}},
    }
    torch.save(state if key is None else {key: state, **rest}, tmp_path / "a.pyth")
    checkpoint = read_checkpoint(tmp_path / "a.pyth")
    assert (checkpoint.layout, checkpoint.config, checkpoint.source) == ("slowfast", None, str(tmp_path / "a.pyth"))
    assert same(checkpoint.state, state)


def test_the_settings_that_mae_st_and_videomae_pickle_are_passed_over(tmp_path: Path) -> None:
    torch.save({"model": KERNEL, "args": argparse.Namespace(lr=1.0, sizes=[1, 2])}, tmp_path / "a.pth")
    assert read_checkpoint(tmp_path / "a.pth").layout == "mae_st"


def test_a_run_of_ours_is_read_with_the_config_of_its_model(small: Make, randomised: Make, tmp_path: Path) -> None:
    model = randomised(small("motion", motion=MotionConfig(decoders="shared", gap=2)))
    content = {"format": 2, "model_config": config_to_json(model.config), "model": model.state_dict()}
    torch.save(content, tmp_path / "step_000001.pt")
    back = load_model(tmp_path / "step_000001.pt")
    assert back.config == model.config and same(back.state_dict(), model.state_dict())


def test_an_own_file_is_loaded_for_longer_clips(small: Make, randomised: Make, tmp_path: Path) -> None:
    model = randomised(small("motion"))
    save_safetensors(tmp_path / "a.safetensors", model)
    longer = load_model(tmp_path / "a.safetensors", frames=8)
    assert longer.config == dataclasses.replace(model.config, frames=8)
    assert longer.encoder.pos.table.shape == (1, 36, 24)
    with pytest.raises(WeightsError, match="heads=7"):
        load_model(tmp_path / "a.safetensors", heads=7)
    with pytest.raises(WeightsError, match="frame_count"):
        load_model(tmp_path / "a.safetensors", frame_count=7)


@pytest.mark.parametrize("kind", ["mae_st", "slowfast", "videomae"])
def test_an_import_for_longer_clips_predicts_as_many_frames_of_a_tube(
    kind: str, small: Make, randomised: Make, tmp_path: Path
) -> None:
    model = randomised(small(kind, pred_t_dim=4))
    save_safetensors(tmp_path / "a.safetensors", model)
    longer = load_model(tmp_path / "a.safetensors", frames=8)
    assert isinstance(longer, MaskedAutoencoder)
    assert longer.config.pred_t_dim == 8
    assert torch.equal(longer.decoder.pred.weight, model.decoder.pred.weight)


@pytest.mark.parametrize("kind", ["mae_st", "slowfast", "videomae", "mae_st_classifier"])
def test_a_file_that_lost_or_changed_a_tensor_is_told_in_words(
    kind: str, small: Make, randomised: Make, tmp_path: Path
) -> None:
    """Every tensor in turn is dropped, flattened, emptied and made longer: a WeightsError, never another."""
    config = small(kind, depth=1)
    whole = from_ours(randomised(config).state_dict(), kind, config)
    hints = {"heads": 3, "frames": 4, "size": 24}
    hints |= {"decoder_heads": config.decoder_heads} if "classifier" not in kind else {}
    for name, value in whole.items():
        longer = torch.cat((value, value[:1]))
        for changed in (
            None,
            value.flatten()[:-1],
            value[:0],
            longer,
            value.reshape(1, 1, 1, -1),
            torch.tensor(1.0),
        ):
            state = {**whole, name: changed} if changed is not None else {n: v for n, v in whole.items() if n != name}
            save_file({n: v.clone(memory_format=torch.contiguous_format) for n, v in state.items()}, tmp_path / "a")
            with pytest.raises(WeightsError):
                load_model(tmp_path / "a", **hints)


def test_a_fine_tuned_file_is_a_classifier_and_its_unknown_key_is_named(
    small: Make, randomised: Make, tmp_path: Path
) -> None:
    model = randomised(small("mae_st_classifier"))
    save_as(tmp_path / "a", model, "mae_st")
    back = load_model(tmp_path / "a", heads=3)
    assert isinstance(back, Classifier) and same(back.state_dict(), model.state_dict())
    state = torch.load(tmp_path / "a", weights_only=True)["model"]
    torch.save({"model": state | {"head_dist.weight": torch.ones(1)}}, tmp_path / "b")
    with pytest.raises(WeightsError, match=r"b: .*without a place: head_dist\.weight\."):
        load_model(tmp_path / "b", heads=3)
    assert isinstance(load_model(tmp_path / "b", heads=3, allow=["head_dist.*"]), Classifier)


def test_nothing_in_a_pickle_is_run(tmp_path: Path) -> None:
    torch.save({"model": KERNEL, "x": _Runs(tmp_path / "ran")}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"a\.pth: is not opened.*mkdir; save its state dict alone"):
        read_checkpoint(tmp_path / "a.pth")
    assert not (tmp_path / "ran").exists()
    settings = argparse.Namespace(when=datetime.datetime(2022, 1, 1))
    torch.save({"model": KERNEL, "args": settings}, tmp_path / "b.pth")
    with pytest.raises(WeightsError, match=r"plain types.*: datetime\.datetime;"):
        read_checkpoint(tmp_path / "b.pth")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1], "holds a list, no state dict"),
        ({}, "holds no weights"),
        ({"model": {}}, "holds no weights"),
        ({"model": {"a": 1, "b": torch.ones(1)}}, "no tensor at a;"),
        ({"model": {"layer1.weight": torch.ones(1)}}, r"no known layout \(1 keys, such as layer1\.weight\)"),
        ({"model_config": "{", "model": KERNEL}, "config is not of this version"),
        ({"model_config": '{"kind": "mae", "config": {"wide": 3}}', "model": KERNEL}, "config is not .*wide"),
        ({"model_config": '{"kind": "mea", "config": {}}', "model": KERNEL}, "config is not .*mea"),
    ],
)
def test_another_content_is_told(content: Any, said: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match=rf"a\.pt: .*{said}"):
        read_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "strange",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.ones(3, device="meta"),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    ],
    ids=["sparse", "meta", "quantized"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch will drop some of these
def test_tensors_that_are_none_of_plain_values_are_refused(strange: Callable[[], Tensor], tmp_path: Path) -> None:
    torch.save({"model": {**KERNEL, "norm.bias": strange()}}, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match=r"a\.pt: sparse, .* without values: norm\.bias; save plain"):
        read_checkpoint(tmp_path / "a.pt")


def test_other_files_are_told(tmp_path: Path) -> None:
    torch.save({"model": KERNEL}, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    save_file(KERNEL, tmp_path / "tensors")
    tensors = (tmp_path / "tensors").read_bytes()
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("text", "text")
    at = whole.index(b"patch_embed") - 20
    files = {
        "random": (os.urandom(4000).replace(b"PK", b"__"), "is neither"),
        "nothing": (b"", "is neither"),
        "half": (whole[:-200], "is neither"),
        "pickle": (b"\x80\x02]q\x00.", "is neither"),
        "zip": ((tmp_path / "zip").read_bytes(), r"not a checkpoint of torch\.save, or damaged"),
        "damaged": (whole[:at] + b"\xff" * 20 + whole[at + 20 :], "or damaged"),
        "half_tensors": (tensors[:-9], "not a whole safetensors file"),
        "brace": ((9).to_bytes(8, "little") + b"{" + b"x" * 99, "not a whole safetensors file"),
    }
    for name, (content, said) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match=f"{name}: .*{said}"):
            read_checkpoint(tmp_path / name)
    with pytest.raises(WeightsError, match="is a folder"):
        read_checkpoint(tmp_path)
    with pytest.raises(WeightsError, match="no such file"):
        read_checkpoint(tmp_path / "absent")


def test_a_safetensors_file_is_known_by_its_content(tmp_path: Path) -> None:
    save_file(KERNEL, tmp_path / "weights.bin")
    assert read_checkpoint(tmp_path / "weights.bin").layout == "mae_st"
    for text in (
        "{}",
        "[]",
        "x",
        '{"kind": "mae", "config": {"wide": 3}}',
        '{"kind": "mae", "config": {"dim": 7}}',
        '{"kind": "mae", "config": {"dim": 48.0}}',
        '{"kind": "mae", "config": {"pixel_std": [1.0]}}',
        "[" * 100_000,
    ):
        save_file(KERNEL, tmp_path / "a", metadata={"reelmae": text})
        with pytest.raises(WeightsError, match="config is not of this version"):
            read_checkpoint(tmp_path / "a")


def test_a_config_is_json_and_back(small: Make, tmp_path: Path, randomised: Make) -> None:
    for kind in KINDS:
        config = small(kind)
        assert config_from_json(config_to_json(config)) == config
        assert hash(config_from_json(config_to_json(config))) == hash(config)
    save_safetensors(tmp_path / "a", randomised(config))
    with safetensors.safe_open(tmp_path / "a", framework="pt") as file:
        assert json.loads(file.metadata()["reelmae"])["kind"] == "classifier"
