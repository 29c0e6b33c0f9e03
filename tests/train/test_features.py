"""Features of a whole dataset equal the encoder's own on the same frames; every clip once; a bad one named."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from reelmae.model.classifier import Classifier, ClassifierConfig
from reelmae.model.config import MAEConfig
from reelmae.model.mae import MaskedAutoencoder
from reelmae.model.weights import find_checkpoint, load_model, save_safetensors
from reelmae.pipeline import schema
from reelmae.pipeline.errors import ClusterError, ConfigError, DatasetError, InputError
from reelmae.pipeline.loading.decode.pyav import AvDecoder
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.loading.index.selection import Selection
from reelmae.pipeline.loading.order.draws import SamplePolicy
from reelmae.pipeline.loading.sweep import view_draws
from reelmae.pipeline.loading.tasks import ClipTask
from reelmae.pipeline.runners.local import LocalRunner
from reelmae.pipeline.runners.ray import RayRunner
from reelmae.pipeline.runners.runner import Runner
from reelmae.pipeline.storage.store import Store
from reelmae.tools.show import ClipProgress
from reelmae.train.config import PretrainConfig, load_config
from reelmae.train.feature_parts import FeatureParts
from reelmae.train.feature_worker import FeatureSpec, FeatureWorker, file_digest, find_problem, find_versions
from reelmae.train.features import features, table_schema, task_needs

TINY: dict[str, Any] = {"frames": 4, "size": 32, "patch": 16, "t_patch": 2, "dim": 24, "depth": 1, "heads": 2}


def whole_index(run: Path) -> ClipIndex:
    return ClipIndex.open(str(run / "shards"), Selection(duplicates=True))


def config_of(run: Path) -> PretrainConfig:
    return load_config(find_checkpoint(run))


def read(path: str | Path) -> tuple[list[tuple[str, int]], np.ndarray]:
    """[(key, view), …] and float32 [rows, D]."""
    table = pq.read_table(path)
    rows = list(zip(table["key"].to_pylist(), table["view"].to_pylist(), strict=True))
    return rows, np.stack([np.asarray(f, np.float32) for f in table["feature"].to_pylist()])


def pixels(index: ClipIndex, row: int, sample: SamplePolicy, views: int) -> np.ndarray:
    """uint8 [R, C, T, H, W] of a clip's views, decoded here."""
    frames = int(index.frames[row])
    size = {"height": int(index.height[row]), "width": int(index.width[row])}
    draws = view_draws(sample, views, frames=frames, fps=float(index.fps[row]), **size)
    place: dict[str, Any] = {"shard": index.shard(row), "offset": int(index.offset[row]), "size": int(index.size[row])}
    data = index.store.read_range(place["shard"], place["offset"], place["size"])
    place["key"] = index.key(row)
    task = ClipTask(clip=row, dataset=0, check=0, frames=frames, draws=draws, planned=row, epoch=0, attempt=0, **place)
    out = np.empty((views, 3, sample.frames, sample.size, sample.size), np.uint8)
    AvDecoder(frames=sample.frames, size=sample.size).decode(task, data, out)
    return out


def damage(run: Path, row: int) -> str:
    """Overwrite a clip's bytes; its key."""
    index = whole_index(run)
    with index.store.local_path(index.shard(row)).open("r+b") as f:
        f.seek(int(index.offset[row]))
        f.write(b"\xa5" * int(index.size[row]))
    return index.key(row)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_features_are_the_encoders_on_the_same_frames(tiny_run: Path, tmp_path: Path, pool: Any) -> None:
    data, out = str(tiny_run / "shards"), tmp_path / "f.parquet"
    summary = features(tiny_run / "train", data, out, views=2, pool=pool, batch=3, workers=0)
    rows, found = read(tmp_path / "f.parquet")
    index = whole_index(tiny_run)
    assert rows == [(index.key(row), view) for row in range(len(index)) for view in range(2)]
    model, trained = load_model(tiny_run / "train"), config_of(tiny_run / "train").loader.sample
    assert isinstance(model, MaskedAutoencoder)
    sample = SamplePolicy(frames=model.config.frames, size=model.config.size, stride=trained.stride, fps=trained.fps)
    for row in range(len(index)):
        clips = torch.from_numpy(pixels(index, row, sample, 2)).float()
        with torch.no_grad():
            tokens = model.encoder((clips / 255 - 0.45) / 0.225)
        wanted = tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(1)
        assert np.abs(found[2 * row : 2 * row + 2] - wanted.numpy()).max() < 1e-4
    assert (summary["clips"], summary["views"], summary["dim"]) == (len(index), 2, model.config.dim)
    assert summary["bad"] == {}
    assert summary["clips_per_s"] > 0


def test_the_table_says_label_and_how_it_was_made(tiny_run: Path, tmp_path: Path) -> None:
    features(tiny_run / "train", str(tiny_run / "shards"), tmp_path / "f.parquet", workers=0)
    table = pq.read_table(tmp_path / "f.parquet")
    assert table.schema.names == ["key", "label", "label_id", "view", "feature"]
    index = whole_index(tiny_run)
    assert table["label_id"].to_pylist() == index.label_id.tolist()
    assert [index.labels.get(name, -1) for name in table["label"].to_pylist()] == index.label_id.tolist()
    assert len(set(table["label_id"].to_pylist())) > 1
    about = json.loads(table.schema.metadata[b"reelmae"])
    assert about["index"] == index.digest
    summary = json.loads((tmp_path / "f.json").read_text())
    assert about.items() <= summary.items()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.json", "f.parquet"]


def test_the_same_comes_out_for_any_workers_and_batch(tiny_run: Path, tmp_path: Path) -> None:
    run, data = tiny_run / "train", str(tiny_run / "shards")
    features(run, data, tmp_path / "a.parquet", views=3, workers=0, batch=1)
    features(run, data, tmp_path / "b.parquet", views=3, workers=2, batch=7)
    (rows, a), (again, b) = read(tmp_path / "a.parquet"), read(tmp_path / "b.parquet")
    assert rows == again
    assert np.abs(a - b).max() < 1e-4


def test_more_rows_than_one_group_keep_their_order(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reelmae.train.features.ROWS_TO_WRITE", 4)
    features(tiny_run / "train", str(tiny_run / "shards"), tmp_path / "f.parquet", views=3, workers=0, batch=3)
    index = whole_index(tiny_run)
    rows, _ = read(tmp_path / "f.parquet")
    assert rows == [(index.key(row), view) for row in range(len(index)) for view in range(3)]
    assert pq.ParquetFile(tmp_path / "f.parquet").num_row_groups > 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_clip_is_left_out_counted_and_named(run_copy: Path, tmp_path: Path, workers: int) -> None:
    index, data = whole_index(run_copy), str(run_copy / "shards")
    features(run_copy / "train", data, tmp_path / "whole.parquet", workers=0)
    whole_rows, whole = read(tmp_path / "whole.parquet")
    key = damage(run_copy, len(index) - 1)
    summary = features(run_copy / "train", data, tmp_path / "f.parquet", workers=workers, batch=4)
    rows, found = read(tmp_path / "f.parquet")
    assert rows == whole_rows[:-1]
    assert np.abs(found - whole[:-1]).max() < 1e-4
    assert summary["clips"] == len(index) - 1
    assert summary["bad_clips"] == 1
    assert list(summary["bad"]) == [key]
    assert "sha256" in summary["bad"][key]
    assert json.loads((tmp_path / "f.json").read_text())["bad"] == summary["bad"]


def test_where_no_clip_can_be_decoded_nothing_is_written(run_copy: Path, tmp_path: Path) -> None:
    for row in range(len(whole_index(run_copy))):
        damage(run_copy, row)
    with pytest.raises(DatasetError, match="not one of"):
        features(run_copy / "train", str(run_copy / "shards"), tmp_path / "f.parquet", workers=0)
    assert not list(tmp_path.glob("*f.*"))


def test_clips_that_repeat_others_are_among_them(run_copy: Path, tmp_path: Path) -> None:
    path = run_copy / "shards" / schema.INDEX
    rows = pq.read_table(path).to_pylist()
    rows[3]["duplicate_of"] = rows[0]["key"]
    pq.write_table(pa.Table.from_pylist(rows, schema.CLIPS), path)
    assert len(ClipIndex.open(str(run_copy / "shards"))) == len(rows) - 1
    summary = features(run_copy / "train", str(run_copy / "shards"), tmp_path / "f.parquet", workers=0)
    assert summary["clips"] == len(rows)


def test_a_condition_chooses_clips(tiny_run: Path, tmp_path: Path) -> None:
    index = whole_index(tiny_run)
    label = sorted(index.labels)[0]
    data, out = str(tiny_run / "shards"), tmp_path / "f.parquet"
    summary = features(tiny_run / "train", data, out, where=f"label == {label!r}", workers=0)
    assert 0 < summary["clips"] == int((index.label_id == index.labels[label]).sum()) < len(index)
    assert set(pq.read_table(tmp_path / "f.parquet")["label"].to_pylist()) == {label}


def test_frames_a_second_are_the_runs_unless_given(tiny_run: Path, tmp_path: Path) -> None:
    run, data = tiny_run / "train", str(tiny_run / "shards")
    trained = config_of(run).loader.sample
    own = features(run, data, tmp_path / "a.parquet", workers=0)
    assert (own["sample"]["stride"], own["sample"]["fps"]) == (trained.stride, trained.fps)
    given = features(run, data, tmp_path / "b.parquet", workers=0, fps=30.0)
    assert (given["sample"]["stride"], given["sample"]["fps"]) == (None, 30.0)
    assert np.abs(read(tmp_path / "a.parquet")[1] - read(tmp_path / "b.parquet")[1]).max() > 1e-3


def test_exported_weights_give_what_the_checkpoint_gives(tiny_run: Path, tmp_path: Path) -> None:
    model, config = load_model(tiny_run / "train"), config_of(tiny_run / "train")
    save_safetensors(tmp_path / "w.safetensors", model)
    save_safetensors(tmp_path / "e.safetensors", model, encoder_only=True)
    data, fps = str(tiny_run / "shards"), config.loader.sample.fps or 7.5
    features(tiny_run / "train", data, tmp_path / "a.parquet", workers=0, fps=fps)
    features(tmp_path / "w.safetensors", data, tmp_path / "b.parquet", workers=0, fps=fps)
    features(tmp_path / "e.safetensors", data, tmp_path / "c.parquet", workers=0, fps=fps)
    _, found = read(tmp_path / "a.parquet")
    assert np.array_equal(found, read(tmp_path / "b.parquet")[1])
    assert np.array_equal(found, read(tmp_path / "c.parquet")[1])


def test_of_a_classifier_comes_what_its_head_reads_on_pixels_normalised_its_own_way(
    tiny_run: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    imagenet = {"pixel_mean": (0.485, 0.456, 0.406), "pixel_std": (0.229, 0.224, 0.225)}
    model = Classifier(ClassifierConfig(**TINY, **imagenet, classes=3)).eval()
    weights = tmp_path / "c.safetensors"
    save_safetensors(weights, model)
    features(weights, str(tiny_run / "shards"), tmp_path / "f.parquet", workers=0)
    _, found = read(tmp_path / "f.parquet")
    clip = torch.from_numpy(pixels(whole_index(tiny_run), 1, SamplePolicy(frames=4, size=32), 1)).double()
    mean, std = (torch.tensor(imagenet[f"pixel_{n}"]).view(3, 1, 1, 1) for n in ("mean", "std"))
    with torch.no_grad():
        wanted = model.features(((clip / 255 - mean) / std).float())
    assert np.abs(found[1] - wanted[0].numpy()).max() < 1e-4
    with pytest.raises(ConfigError, match="reads the mean"):
        features(weights, str(tiny_run / "shards"), tmp_path / "g.parquet", pool="cls", workers=0)


def test_a_class_token_that_is_not_there_is_missed(tiny_run: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = {**TINY, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    model = MaskedAutoencoder(MAEConfig(**small, cls_token=False))
    save_safetensors(tmp_path / "e.safetensors", model, encoder_only=True)
    data = str(tiny_run / "shards")
    assert features(tmp_path / "e.safetensors", data, tmp_path / "f.parquet", workers=0)["dim"] == 24
    with pytest.raises(ConfigError, match="has no class token"):
        features(tmp_path / "e.safetensors", data, tmp_path / "g.parquet", pool="cls", workers=0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"views": 0}, "views=0"),
        ({"batch": 0}, "batch=0"),
        ({"fps": -1.0}, r"fps=-1\.0"),
        ({"out": "f.csv"}, r"f\.csv"),
        ({"workers": -1}, "workers=-1"),
        ({"where": "nothing > 3"}, "nothing"),
        ({"device": "tpu"}, "tpu"),
    ],
)
def test_a_setting_that_cannot_be_is_named(tiny_run: Path, tmp_path: Path, change: dict[str, Any], named: str) -> None:
    out = tmp_path / change.pop("out", "f.parquet")
    with pytest.raises(ConfigError, match=named):
        features(tiny_run / "train", str(tiny_run / "shards"), out, **change)
    assert not list(tmp_path.iterdir())


def test_what_is_no_checkpoint_is_named(tiny_run: Path, tmp_path: Path) -> None:
    data = str(tiny_run / "shards")
    (tmp_path / "w.safetensors").write_bytes(b"not weights")
    for given, named in (
        ("nowhere", "nowhere"),
        ("no.safetensors", "no such file"),
        ("w.safetensors", "w.safe"),
    ):
        with pytest.raises(InputError, match=named):
            features(tmp_path / given, data, tmp_path / "f.parquet")
    with pytest.raises(InputError, match=r"dataset\.json"):
        features(tiny_run / "train", str(tmp_path), tmp_path / "f.parquet")


def test_progress_is_told_in_lines_where_there_is_no_terminal(tiny_run: Path, tmp_path: Path) -> None:
    told = io.StringIO()
    with ClipProgress(console=Console(file=told)) as progress:
        data, out = str(tiny_run / "shards"), tmp_path / "f.parquet"
        features(tiny_run / "train", data, out, workers=0, on_progress=progress)
    lines = [json.loads(line) for line in told.getvalue().splitlines()]
    total = len(whole_index(tiny_run))
    assert lines[-1] == {"event": "done", "clips": total, "of": total}


# --- killed and run again


class CrashError(RuntimeError):
    """Stands for whatever ends a run."""


def crash_at(clips: int) -> Any:
    """A callback that ends the run once so many clips are done."""

    def on_progress(done: int, of: int) -> None:
        if done >= clips:
            raise CrashError(done)

    return on_progress


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part for each batch, and row groups that end within parts."""
    monkeypatch.setattr("reelmae.train.features.PART_SECONDS", 0.0)
    monkeypatch.setattr("reelmae.train.features.ROWS_TO_WRITE", 5)


@pytest.mark.usefixtures("small_parts")
def test_a_run_that_was_killed_goes_on_and_gives_the_same_bytes(
    run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, last = damage(run_copy, 3), damage(run_copy, len(whole_index(run_copy)) - 1)
    how: dict[str, Any] = {"views": 2, "batch": 4, "workers": 0}
    run, data = run_copy / "train", str(run_copy / "shards")
    with monkeypatch.context() as patch:
        patch.setattr("reelmae.train.features.PART_SECONDS", 60.0)  # other parts
        whole = features(run, data, tmp_path / "whole.parquet", **how)
    out = tmp_path / "f.parquet"
    for stop in (2, 6):
        with pytest.raises(CrashError):
            features(run, data, out, on_progress=crash_at(stop), **how)
        assert not out.exists()
    told: list[int] = []
    summary = features(run, data, out, on_progress=lambda done, of: told.append(done), **how)
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert told[0] == 6 and told[-1] == len(whole_index(run_copy)), "it went on at the last part"
    assert summary["clips_before"] == 5 and whole["clips_before"] == 0  # one of the six is bad
    assert list(summary["bad"]) == list(whole["bad"]) == [key, last]
    assert summary["clips"] == whole["clips"] == len(whole_index(run_copy)) - 2
    assert sorted(p.name for p in tmp_path.glob("*f.*")) == ["f.json", "f.parquet"], "the parts are gone"


@pytest.mark.usefixtures("small_parts")
def test_parts_of_other_settings_or_damaged_ones_are_made_again(run_copy: Path, tmp_path: Path) -> None:
    run, data, out = run_copy / "train", str(run_copy / "shards"), tmp_path / "f.parquet"
    how: dict[str, Any] = {"batch": 2, "workers": 0}
    features(run, data, tmp_path / "whole.parquet", fps=20.0, **how)
    with pytest.raises(CrashError):
        features(run, data, out, on_progress=crash_at(4), **how)
    with pytest.raises(CrashError):  # another rate: other features
        features(run, data, out, fps=20.0, on_progress=crash_at(4), **how)
    _, second = sorted((tmp_path / ".f.parquet.parts").iterdir())
    second.write_bytes(second.read_bytes()[:-9])
    told: list[int] = []
    summary = features(run, data, out, fps=20.0, on_progress=lambda done, of: told.append(done), **how)
    assert told[0] == summary["clips_before"] == 2
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()


@pytest.mark.usefixtures("small_parts")
def test_parts_of_the_same_clips_with_other_labels_are_made_again(run_copy: Path, tmp_path: Path) -> None:
    run, data, out = run_copy / "train", run_copy / "shards", tmp_path / "f.parquet"
    with pytest.raises(CrashError):
        features(run, str(data), out, batch=2, workers=0, on_progress=crash_at(4))
    table = pq.read_table(data / schema.INDEX)
    for name, column in (
        ("label", pa.repeat("new", len(table))),
        ("label_id", pa.repeat(pa.scalar(0, pa.int32()), len(table))),
    ):
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(at), pa.chunked_array([column]))
    pq.write_table(table, data / schema.INDEX)
    (data / schema.LABELS).write_text(json.dumps({"new": 0}))
    assert features(run, str(data), out, batch=2, workers=0)["clips_before"] == 0
    assert set(pq.read_table(out)["label"].to_pylist()) == {"new"}


# --- on the workers of a runner


@pytest.fixture(scope="module")
def ray() -> Iterator[Runner]:
    with RayRunner(workers=2) as runner:
        yield runner


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tasks, of two batches each."""
    monkeypatch.setattr("reelmae.train.features.BLOCK_FEATURES", 8)


def told(summary: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in summary.items() if k not in ("out", "seconds", "clips_per_s")}


@pytest.mark.usefixtures("small_blocks", "small_parts")
def test_workers_of_a_runner_give_the_same_bytes(run_copy: Path, tmp_path: Path, ray: Runner) -> None:
    total = len(whole_index(run_copy))
    damage(run_copy, 3), damage(run_copy, total - 1)
    run, data, how = run_copy / "train", str(run_copy / "shards"), {"views": 2, "batch": 5}
    whole = features(run, data, tmp_path / "none.parquet", workers=0, **how)  # type: ignore[arg-type]
    assert len(whole["bad"]) == 2
    for name, runner in (("threads", LocalRunner(2)), ("ray", ray)):
        done: list[int] = []
        out = tmp_path / f"{name}.parquet"
        summary = features(run, data, out, runner=runner, on_progress=lambda n, of, done=done: done.append(n), **how)  # type: ignore[misc]
        assert out.read_bytes() == (tmp_path / "none.parquet").read_bytes()
        assert told(summary) == told(whole)
        assert list(summary["bad"]) == list(whole["bad"])
        assert done[-1] == total and len(done) == -(-total // 4), "a task for each block of 4 clips"


@pytest.mark.usefixtures("small_blocks", "small_parts")
def test_a_run_goes_on_with_a_runner_and_without(run_copy: Path, tmp_path: Path, ray: Runner) -> None:
    """Parts in any order, of blocks and of batches, are not made again."""
    run, data, out = run_copy / "train", str(run_copy / "shards"), tmp_path / "f.parquet"
    how: dict[str, Any] = {"batch": 3, "workers": 0}
    total = len(whole_index(run_copy))
    features(run, data, tmp_path / "whole.parquet", **how)
    with pytest.raises(CrashError):
        features(run, data, out, on_progress=crash_at(3), **how)
    with pytest.raises(CrashError):
        features(run, data, out, runner=LocalRunner(1), on_progress=crash_at(6), **how)
    first, *rest = sorted((tmp_path / ".f.parquet.parts").iterdir())
    first.unlink()
    assert [p.stem for p in rest] == ["000000000003-000000000006"]
    done: list[int] = []
    summary = features(run, data, out, runner=ray, on_progress=lambda n, of: done.append(n), **how)
    assert done[0] == summary["clips_before"] == 3 and done[-1] == total
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_a_worker_that_dies_costs_its_block(
    tiny_run: Path, tmp_path: Path, ray: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reelmae.train.features.BLOCK_FEATURES", 2)
    run, data = tiny_run / "train", str(tiny_run / "shards")
    how: dict[str, Any] = {"views": 2, "batch": 2, "workers": 0}
    features(run, data, tmp_path / "whole.parquet", **how)
    killed: list[int] = []

    def kill(done: int, of: int) -> None:
        if not killed:
            killed.extend(_busy_workers())
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    features(run, data, tmp_path / "f.parquet", runner=ray, on_progress=kill, **how)
    assert killed
    assert (tmp_path / "f.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def _busy_workers() -> list[int]:
    """Processes of our Ray that run a task now."""
    found = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in found.splitlines()]
    parents = {int(pid): int(parent) for pid, parent, _ in rows}

    def is_ours(pid: int) -> bool:
        while pid in parents and pid != os.getpid():
            pid = parents[pid]
        return pid == os.getpid()

    return [int(pid) for pid, _, words in rows if words.startswith("ray::run_task") and is_ours(int(pid))]


def test_a_node_that_does_not_see_the_dataset_is_named(tiny_run: Path, tmp_path: Path, ray: Runner) -> None:
    here = Store("memory://features/shards")  # of this process alone
    for path in (tiny_run / "shards").rglob("*"):
        if path.is_file():
            here.publish(path, path.relative_to(tiny_run / "shards").as_posix())
    with pytest.raises(
        ClusterError, match=r"^node .* does not see the dataset at memory:///?features/shards; give DATA"
    ):
        features(tiny_run / "train", here.url(), tmp_path / "f.parquet", runner=ray)
    assert not list(tmp_path.glob("f.*"))


def test_a_worker_refuses_other_weights_clips_and_versions(tiny_run: Path) -> None:
    path, index = find_checkpoint(tiny_run / "train"), whole_index(tiny_run)
    model = load_model(path).config
    sample = SamplePolicy(frames=model.frames, size=model.size)
    common: dict[str, Any] = {"where": None, "sample": sample, "views": 1, "pool": "mean", "batch": 2, "workers": 0}
    spec = FeatureSpec(
        checkpoint=str(path),
        sha256=file_digest(path),
        data=str(tiny_run / "shards"),
        index=index.digest,
        device="cpu",
        precision="auto",
        blocks=(range(2),),
        **common,
    )
    with FeatureWorker(spec) as worker:
        assert worker.run(0).clip_V.tolist() == [0, 1]
    for change, named in (
        ({"checkpoint": "/nowhere/w.pt"}, "/nowhere/w.pt: not found on .* where all nodes see it"),
        ({"sha256": "00"}, "holds other weights on"),
        ({"index": "00"}, "its clips have changed"),
    ):
        with pytest.raises((InputError, DatasetError), match=named):
            FeatureWorker(replace(spec, **change))  # type: ignore[arg-type]
    assert find_problem(spec, find_versions()) == ""
    assert find_problem(spec, find_versions() | {"torch": "1.0"}).endswith(
        "this machine 1.0; install the same on all nodes"
    )
    assert "put the checkpoint where" in find_problem(replace(spec, checkpoint="/nowhere/w.pt"), find_versions())
    assert "give DATA that all nodes share" in find_problem(replace(spec, data="/nowhere/shards"), find_versions())


def test_what_a_task_needs(tiny_run: Path, tmp_path: Path) -> None:
    run = tiny_run / "train"
    needs = [task_needs(run, device, workers) for device, workers in (("cpu", None), ("cuda", None), ("cuda", 8))]
    assert [(n["cores"], n["gpus"]) for n in needs] == [(1, 0), (4, 1), (8, 1)]
    assert needs[0]["memory_bytes"] > find_checkpoint(run).stat().st_size
    with pytest.raises(ConfigError, match="device=cuda:1: with a runner, give"):
        features(run, str(tiny_run / "shards"), tmp_path / "f.parquet", device="cuda:1", runner=LocalRunner(1))


def test_parts_lie_in_any_order_and_none_counts_twice(tmp_path: Path) -> None:
    schema_ = table_schema({"dim": 2})
    row = {"key": "k", "label": None, "label_id": -1, "view": 0, "feature": [1.0, 2.0]}
    parts = FeatureParts(tmp_path / "f.parquet", {"is": 1}, schema_)
    for rows, bad in ((range(6, 8), {"late": "torn"}), (range(0, 2), {"early": "torn"})):
        parts.add(rows, [pa.Table.from_pylist([row], schema_)], 1, bad)
    (parts.folder / "000000000001-000000000003.parquet").write_bytes(next(parts.folder.glob("*06-*")).read_bytes())
    again = FeatureParts(tmp_path / "f.parquet", {"is": 1}, schema_)
    assert (again.rows, again.clips, list(again.bad)) == (4, 2, ["early", "late"])
    assert again.missing(10) == [range(2, 6), range(8, 10)]
    assert len(list(parts.folder.iterdir())) == 2, "the part with rows of another is removed"
    other = FeatureParts(tmp_path / "f.parquet", {"is": 2}, schema_)
    assert (other.rows, other.missing(3)) == (0, [range(0, 3)])
