"""A job grows: append, retry, limit; manifests carry spans and columns; repeats are marked; a dry run writes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reelmae.pipeline import schema
from reelmae.pipeline.dataset.verification import verify
from reelmae.pipeline.errors import ConfigError, InputError, JobMismatchError
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.estimate import estimate
from reelmae.pipeline.ingest.job import shard
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.loading.index.selection import Selection

Make = Callable[..., Path]
SMALL = ShardConfig(short_side=48, clip_seconds=1, sources_per_task=2)


def _index(dst: Path) -> list[dict[str, object]]:
    return pq.read_table(dst / schema.INDEX).to_pylist()


def _rejects(dst: Path) -> dict[str, str]:
    return {Path(r["source"]).name: r["reason"] for r in pq.read_table(dst / schema.REJECTS_FILE).to_pylist()}


@pytest.fixture
def src(make_video: Make, tmp_path: Path) -> Path:
    for i, label in enumerate("abab"):
        make_video(tmp_path / "src" / label / f"{i}.mp4", seed=i)
    (tmp_path / "src/b/broken.mp4").write_text("no video yet")
    return tmp_path / "src"


def test_append_adds_what_is_new_and_keeps_what_was_there(src: Path, make_video: Make, tmp_path: Path) -> None:
    dst, config = tmp_path / "dst", SMALL.model_copy(update={"labels": "folder"})
    shard(str(src), str(dst), config)
    before, bytes_before = _index(dst), {p: p.read_bytes() for p in dst.glob("shards/*")}
    make_video(src / "_new/first.mp4", seed=9)  # sorts before the old ones
    make_video(src / "a/more.mp4", seed=10)
    make_video(src / "a/0.mp4", seed=11, frames=30)  # changed, but planned already
    assert shard(str(src), str(dst), config).new_sources == 0  # resuming takes nothing new
    summary = shard(str(src), str(dst), config, append=True)
    assert (summary.new_sources, summary.changed_sources, summary.sources) == (2, 1, 7)
    after = _index(dst)
    assert after[: len(before)] == before
    assert sorted(Path(str(r["source"])).name for r in after[len(before) :]) == ["first.mp4", "more.mp4"]
    assert {p: p.read_bytes() for p in bytes_before} == bytes_before
    assert json.loads((dst / schema.LABELS).read_text()) == {"a": 0, "b": 1, "_new": 2}
    assert verify(str(dst), deep=True).faults == ()
    again = shard(str(src), str(dst), config, append=True)
    assert (again.new_sources, again.changed_sources) == (0, 1)


def test_another_bucket_can_be_appended(src: Path, make_video: Make, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    shard(str(src), str(dst), SMALL)
    make_video(tmp_path / "other/x.mp4", seed=20)
    with pytest.raises(JobMismatchError, match="src: "):
        shard(str(tmp_path / "other"), str(dst), SMALL)
    assert shard(str(tmp_path / "other"), str(dst), SMALL, append=True).sources == 6
    assert shard(str(tmp_path / "other"), str(dst), SMALL).sources == 6  # now it is one of its sources
    with pytest.raises(JobMismatchError, match="gop: 16 there, 8 here"):
        shard(str(src), str(dst), SMALL.model_copy(update={"gop": 8}), append=True)


def test_rejected_sources_are_tried_again_for_the_reason_that_is_named(
    src: Path, make_video: Make, tmp_path: Path
) -> None:
    dst = tmp_path / "dst"
    (src / "a/empty.mp4").write_bytes(b"")
    shard(str(src), str(dst), SMALL)
    assert _rejects(dst) == {"broken.mp4": "not_a_video", "empty.mp4": "empty_file"}
    with pytest.raises(InputError, match="no source was rejected for it"):
        shard(str(src), str(dst), SMALL, retry_rejected="crashed")
    with pytest.raises(InputError, match="is not a reason; take one of all, empty_file"):
        shard(str(src), str(dst), SMALL, retry_rejected="bad luck")
    make_video(src / "b/broken.mp4", seed=30)
    summary = shard(str(src), str(dst), SMALL, retry_rejected="not_a_video")
    assert (summary.sources, summary.sources_kept, summary.rejected) == (6, 5, {"empty_file": 1})
    assert _rejects(dst) == {"empty.mp4": "empty_file"}
    assert verify(str(dst), deep=True).faults == ()
    make_video(src / "a/empty.mp4", seed=31)
    assert shard(str(src), str(dst), SMALL, retry_rejected="all").sources_kept == 6
    assert verify(str(dst)).faults == ()


def test_a_limited_job_is_a_fair_draw_and_append_takes_the_others(src: Path, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    assert shard(str(src), str(dst), SMALL, limit=3).sources == 3
    assert shard(str(src), str(dst), SMALL).sources == 3
    with pytest.raises(JobMismatchError, match="limit: 3 there, 4 here"):
        shard(str(src), str(dst), SMALL, limit=4)
    assert shard(str(src), str(dst), SMALL, append=True, limit=1).sources == 4
    assert shard(str(src), str(dst), SMALL, append=True).sources == 5
    assert verify(str(dst)).faults == ()
    with pytest.raises(ConfigError, match="--limit 0"):
        shard(str(src), str(tmp_path / "other"), SMALL, limit=0)


def test_a_dry_run_plans_and_estimates_and_writes_nothing(src: Path, tmp_path: Path) -> None:
    found = estimate(str(src), str(tmp_path / "dst"), SMALL)
    assert not (tmp_path / "dst").exists()
    assert (found["listed_sources"], found["new_sources"], found["tasks"]) == (5, 5, 3)
    assert found["source_bytes"] == sum(p.stat().st_size for p in src.rglob("*") if p.is_file())
    assert found["estimate"]["clips"] == 4
    assert found["estimate"]["rejected_in_sample"] == {"not_a_video": 1}
    shard(str(src), str(tmp_path / "dst"), SMALL, limit=2)
    later = estimate(str(src), str(tmp_path / "dst"), SMALL)
    assert (later["sources_in_dst"], later["new_sources"]) == (2, 3)


def test_a_manifests_spans_labels_and_columns_reach_the_index(make_video: Make, tmp_path: Path) -> None:
    make_video(tmp_path / "a.mp4", frames=100)
    make_video(tmp_path / "b.mp4", seed=1)
    (tmp_path / "list.csv").write_text(
        "clip;name;from;to;views;width\n"
        "a.mp4;run;0.4;1.4;12;5\n"
        "a.mp4;jump;1:00;2:00;7;6\n"
        "a.mp4;jump;2;3.6;;\n"
        "b.mp4;;;;99;7\n"
    )
    config = SMALL.model_copy(
        update={"url_column": "clip", "label_column": "name", "start_column": "from", "end_column": "to"}
    )
    dst = tmp_path / "dst"
    shard(str(tmp_path / "list.csv"), str(dst), config)
    rows = sorted(_index(dst), key=lambda r: (str(r["source"]), str(r["key"])))
    names = ("label", "label_id", "wanted_start_s", "frames", "views")
    found = [(Path(str(r["source"])).name, *(r[name] for name in names)) for r in rows]
    assert found == [
        ("a.mp4", "run", 1, 0.4, 25, 12),
        ("a.mp4", "jump", 0, 2.0, 40, None),
        ("b.mp4", None, -1, 0.0, 20, 99),
    ]
    assert [r["manifest_width"] for r in rows] == [5, None, 7]
    index = pq.read_schema(dst / schema.INDEX)
    assert index.field("views").type == pa.int64()
    (outside,) = pq.read_table(dst / schema.REJECTS_FILE).to_pylist()
    assert (outside["reason"], outside["span_start_s"], outside["span_end_s"]) == (
        "span_outside",
        60.0,
        120.0,
    )
    assert verify(str(dst), deep=True).faults == ()
    assert len(ClipIndex.open(str(dst))) == 3


def test_repeats_are_marked_at_the_end_and_the_loader_leaves_them_out(
    src: Path, make_video: Make, tmp_path: Path
) -> None:
    (src / "a/broken.mp4").write_bytes(b"")
    shutil.copy(src / "a/0.mp4", src / "b/the same.mp4")
    for name, seed in (("b/1.mp4", 1), ("a/2.mp4", 2)):
        make_video(src / name, seed=seed, options=(("preset", "ultrafast"), ("crf", "4")))
    make_video(src / "b/as well.mp4", seed=1, options=(("preset", "medium"), ("crf", "8")))
    dst = tmp_path / "dst"
    config = SMALL.model_copy(update={"duplicates": "near"})
    summary = shard(str(src), str(dst), config)
    assert summary.duplicates == 2
    by_key = {str(r["key"]): Path(str(r["source"])).name for r in _index(dst)}
    pairs = {
        frozenset((by_key[str(r["key"])], by_key[str(r["duplicate_of"])])) for r in _index(dst) if r["duplicate_of"]
    }
    assert pairs == {frozenset(("0.mp4", "the same.mp4")), frozenset(("1.mp4", "as well.mp4"))}
    index = ClipIndex.open(str(dst))
    assert (len(index), index.left_out) == (4, 2)
    assert len(ClipIndex.open(str(dst), Selection(duplicates=True))) == 6
    exact = shard(str(src), str(tmp_path / "exact"), SMALL.model_copy(update={"duplicates": "exact"}))
    assert exact.duplicates == 1
    assert shard(str(src), str(tmp_path / "off"), SMALL).duplicates == 0
    make_video(src / "new.mp4", seed=2, options=(("preset", "medium"), ("crf", "8")))
    assert shard(str(src), str(dst), config, append=True).duplicates == 3  # it repeats one of the old
    assert verify(str(dst)).faults == ()
