"""What verify says of whole, unfinished, appended and retried datasets. Damage of each kind: see test_repairs.py."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reelmae.pipeline import schema
from reelmae.pipeline.dataset import shards
from reelmae.pipeline.dataset.faults import Mend
from reelmae.pipeline.dataset.repairs import repair
from reelmae.pipeline.dataset.verification import verify
from reelmae.pipeline.errors import InputError
from reelmae.pipeline.ingest.clips.probe import Prober
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.ffmpeg import find_ffmpeg
from reelmae.pipeline.ingest.job import shard
from reelmae.pipeline.ingest.plan import parts
from reelmae.pipeline.ingest.sandbox import TRIES
from reelmae.pipeline.storage.store import Store

CONFIG = ShardConfig(short_side=48, sources_per_task=2, shard_bytes=1, labels="folder")


@pytest.fixture(scope="module")
def bucket(make_video: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    for i in range(4):
        make_video(folder / "src" / ("ab"[i % 2]) / f"{i}.mp4", seed=i)
    (folder / "src" / "a" / "no.mp4").write_text("no video")
    shard(str(folder / "src"), str(folder / "dst"), CONFIG, workers=1)
    return folder


@pytest.fixture
def copy(bucket: Path, tmp_path: Path) -> Path:
    """src and dst, both to be changed: the sources are known by their place, so the dataset is made anew."""
    shutil.copytree(bucket / "src", tmp_path / "src")
    shard(str(tmp_path / "src"), str(tmp_path / "dst"), CONFIG, workers=2)
    return tmp_path / "dst"


def _appended_plan(dst: Path, make_video: Callable[..., Path]) -> parts.Plan:
    """Freeze an append of two videos, and run none of its tasks, as a job that was killed."""
    for name in ("new", "newer"):
        make_video(dst.parent / "src" / "c" / f"{name}.mp4", seed=7)
    store = Store(str(dst))
    there = parts.read_plan(store)
    assert there is not None
    return parts.append_sources(str(dst.parent / "src"), store, there, find_ffmpeg(), None)[0]


@pytest.mark.parametrize("deep", [False, True])
def test_a_whole_dataset_has_no_faults(bucket: Path, deep: bool) -> None:
    report = verify(str(bucket / "dst"), deep=deep)
    assert (report.ok, report.faults, report.damaged_tasks) == (True, (), ())
    assert (report.clips, report.shards) == (4, 4)
    assert report.bytes == sum(p.stat().st_size for p in bucket.glob("dst/shards/*.tar"))
    answer = json.loads(json.dumps(report.as_dict()))
    assert answer["faults"] == answer["damaged_tasks"] == []
    assert answer["ms_per_clip"] > 0
    assert "found" not in answer


def test_every_profile_passes_deep(bucket: Path, tmp_path: Path) -> None:
    for profile in ("copy", "small", "vp9"):
        shard(str(bucket / "src"), str(tmp_path / profile), CONFIG.model_copy(update={"profile": profile}))
        assert verify(str(tmp_path / profile), deep=True).faults == ()


def test_what_is_no_dataset_is_told(bucket: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no dataset"):
        verify(str(tmp_path / "nowhere"))
    shutil.copytree(bucket / "dst", tmp_path / "dst")
    (tmp_path / "dst" / schema.DATASET_JSON).unlink()
    with pytest.raises(InputError, match="unfinished job"):
        verify(str(tmp_path / "dst"))


def test_an_appended_and_retried_dataset_has_no_faults(copy: Path, make_video: Callable[..., Path]) -> None:
    _appended_plan(copy, make_video)
    shard(str(copy.parent / "src"), str(copy), CONFIG)
    make_video(copy.parent / "src" / "a" / "no.mp4", seed=9)
    shard(str(copy.parent / "src"), str(copy), CONFIG, retry_rejected="all")
    report = verify(str(copy), deep=True)
    assert (report.faults, report.clips) == ((), 7)
    (copy / schema.INDEX).write_bytes(b"noise")
    before = pq.read_table(copy / schema.REJECTS_FILE).num_rows
    assert repair(str(copy)).ok
    assert (before, pq.read_table(copy / schema.REJECTS_FILE).num_rows) == (0, 0)


def test_a_task_whose_reject_was_tried_again_gives_the_same_clips(copy: Path, make_video: Callable[..., Path]) -> None:
    make_video(copy.parent / "src" / "a" / "no.mp4", seed=9)
    shard(str(copy.parent / "src"), str(copy), CONFIG, retry_rejected="all")
    clips = _clips(copy)
    for commit in sorted(copy.glob("commits/*"))[:3]:
        commit.unlink()
    report = repair(str(copy))
    assert (report.tasks_run, report.after.faults) == ((0, 1, 2), ())
    assert _clips(copy) == clips


def test_an_append_that_has_not_finished_is_told_and_the_rest_is_checked(
    copy: Path, make_video: Callable[..., Path]
) -> None:
    plan = _appended_plan(copy, make_video)
    (fault,) = verify(str(copy)).found
    assert fault.text == "dataset.json: an append has not finished; run `reelmae shard` again"
    assert fault.mend == Mend.NONE
    assert plan.tasks == 4
    _edit_motion(copy)
    tar = sorted(copy.glob("shards/*.tar"))[0]
    tar.unlink()
    faults = verify(str(copy)).faults
    assert len(faults) == 3
    assert any(tar.name in f for f in faults)
    assert any(f.startswith("index.parquet") and "motion" in f for f in faults)


def test_repair_in_the_middle_of_an_append_lets_it_finish(copy: Path, make_video: Callable[..., Path]) -> None:
    _appended_plan(copy, make_video)
    sorted(copy.glob("shards/*.tar"))[0].unlink()
    report = repair(str(copy))
    assert report.after.faults == ("dataset.json: an append has not finished; run `reelmae shard` again",)
    assert len(report.mended) == len(report.tasks_run) == 1
    shard(str(copy.parent / "src"), str(copy), CONFIG)
    report = verify(str(copy))
    assert (report.faults, report.clips) == ((), 6)


def test_shards_of_a_task_that_is_committed_but_not_joined_are_no_faults(
    copy: Path, make_video: Callable[..., Path]
) -> None:
    before = {name: (copy / name).read_bytes() for name in (schema.DATASET_JSON, schema.INDEX)}
    _appended_plan(copy, make_video)
    shard(str(copy.parent / "src"), str(copy), CONFIG)
    after = (copy / schema.INDEX).read_bytes()
    (copy / schema.DATASET_JSON).write_bytes(before[schema.DATASET_JSON])
    for index in (before[schema.INDEX], after):  # stopped before and after it was published
        (copy / schema.INDEX).write_bytes(index)
        (fault,) = verify(str(copy)).found
        assert (fault.file, fault.mend) == (schema.DATASET_JSON, Mend.JOIN)
    assert repair(str(copy)).ok
    assert (copy / schema.INDEX).read_bytes() == after


def test_labels_that_a_killed_append_left_are_no_fault(bucket: Path, tmp_path: Path) -> None:
    dst = shutil.copytree(bucket / "dst", tmp_path / "dst")
    (dst / schema.LABELS).write_text('{"a": 0, "b": 1, "later": 2}')
    assert verify(str(dst)).faults == ()
    (dst / schema.LABELS).write_text('{"a": 0, "later": 1}')
    assert verify(str(dst)).faults == ("labels.json: label 'b' is None, its clips have 1",)


def test_rows_may_come_in_pieces_of_any_size(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reelmae.pipeline.dataset.tables.ROWS", 1)  # each task's rows come in several pieces
    assert verify(str(bucket / "dst")).faults == ()


def _clips(dst: Path) -> dict[str, str]:
    index = pq.read_table(dst / schema.INDEX)
    return dict(zip(index.column("key").to_pylist(), index.column("sha256").to_pylist(), strict=True))


def _edit_motion(dst: Path) -> None:
    table = pq.read_table(dst / schema.INDEX)
    at = table.schema.get_field_index("motion")
    values = [m + 1 for m in table.column("motion").to_pylist()]
    values[1:] = table.column("motion").to_pylist()[1:]
    pq.write_table(table.set_column(at, table.schema.field(at), pa.array(values, "float32")), dst / schema.INDEX)


@pytest.mark.parametrize("kills", [TRIES, 2 * TRIES - 1])
def test_a_clip_whose_child_was_killed_is_decoded_again(
    bucket: Path, monkeypatch: pytest.MonkeyPatch, kills: int
) -> None:
    """Whoever kills a child, such as the kernel for want of memory, says nothing about its clip."""
    left = list(range(kills))

    class Killed(Prober):
        """Its child dies, a moment after it was asked about the first clip."""

        def _ask(self, question: dict[str, Any], wall_s: float) -> dict[str, Any]:
            if left and question["paths"][0].endswith("/1.mp4"):
                left.pop()
                super()._ask({"op": "verify", "paths": []}, wall_s)
                assert self._child is not None
                os.kill(self._child.pid, signal.SIGSTOP)  # it has not answered yet when it is killed
                threading.Timer(0.05, os.kill, (self._child.pid, signal.SIGKILL)).start()
            return super()._ask(question, wall_s)

    monkeypatch.setattr(shards, "Prober", Killed)
    assert verify(str(bucket / "dst"), deep=True).faults == ()
    assert not left
