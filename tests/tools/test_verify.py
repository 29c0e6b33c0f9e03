"""Each kind of damage to a dataset is found and named; an undamaged one has no faults."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reelmae.pipeline import schema
from reelmae.pipeline.errors import InputError
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.job import shard
from reelmae.tools.verify import verify


@pytest.fixture(scope="module")
def dataset(make_video: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    for i in range(4):
        make_video(folder / "src" / f"{i}.mp4", seed=i)
    (folder / "src" / "no.mp4").write_text("no video")
    shard(
        str(folder / "src"),
        str(folder / "dst"),
        ShardConfig(short_side=48, sources_per_task=2, shard_bytes=1),
        workers=1,
    )
    return folder / "dst"


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    return shutil.copytree(dataset, tmp_path / "dst")


def _tar(dst: Path) -> Path:
    return sorted(dst.glob("shards/*.tar"))[0]


def test_a_whole_dataset_has_no_faults(dataset: Path) -> None:
    for deep in (False, True):
        report = verify(str(dataset), deep=deep)
        assert (report.ok, report.faults, report.clips, report.shards) == (True, (), 4, 4)
        assert json.dumps(report.as_dict())


def test_a_flipped_byte_of_a_clip_is_found(copy: Path) -> None:
    row = pq.read_table(copy / schema.INDEX).to_pylist()[0]
    tar = copy / row["shard"]
    data = bytearray(tar.read_bytes())
    data[row["offset"] + row["size"] // 2] ^= 1
    tar.write_bytes(data)
    (fault,) = verify(str(copy)).faults
    assert row["shard"] in fault
    assert row["key"] in fault


def test_a_truncated_tar_is_found(copy: Path) -> None:
    tar = _tar(copy)
    tar.write_bytes(tar.read_bytes()[:1600])
    assert any(tar.name in f for f in verify(str(copy)).faults)


def test_a_missing_shard_is_found(copy: Path) -> None:
    _tar(copy).unlink()
    assert any("000000-00.tar" in f for f in verify(str(copy)).faults)


def test_a_shard_nobody_knows_is_found(copy: Path) -> None:
    shutil.copy(_tar(copy), copy / "shards/000099-00.tar")
    assert verify(str(copy)).faults == ("shards/000099-00.tar: is not in the index",)


def test_a_missing_commit_is_found(copy: Path) -> None:
    (copy / "commits/000001.parquet").unlink()
    assert any("commits/000001.parquet" in f for f in verify(str(copy)).faults)


def test_a_stale_idx_is_found(copy: Path) -> None:
    idx = _tar(copy).with_suffix(".idx")
    idx.write_text(idx.read_text().replace("mp4 1536", "mp4 1024"))
    (fault,) = verify(str(copy)).faults
    assert idx.name in fault


def test_wrong_counts_are_found(copy: Path) -> None:
    facts = json.loads((copy / schema.DATASET_JSON).read_text())
    (copy / schema.DATASET_JSON).write_text(json.dumps({**facts, "clips": 7}))
    assert verify(str(copy)).faults == ("dataset.json: clips is 7, found 4",)


def test_an_index_without_a_clip_is_found(copy: Path) -> None:
    table = pq.read_table(copy / schema.INDEX)
    pq.write_table(table.slice(1), copy / schema.INDEX)
    faults = " ".join(verify(str(copy)).faults)
    assert "not the 4 of the commits" in faults


def test_deep_finds_rows_that_lie_about_a_clip(copy: Path) -> None:
    table = pq.read_table(copy / schema.INDEX)
    at = table.schema.get_field_index("frames")
    lie = pa.array([n + 1 for n in table.column("frames").to_pylist()], "int32")
    pq.write_table(table.set_column(at, schema.CLIPS.field("frames"), lie), copy / schema.INDEX)
    assert verify(str(copy)).ok
    assert sum("frames: 20, wanted 21" in f for f in verify(str(copy), deep=True).faults) == 4


def test_what_is_no_dataset_is_told(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no dataset"):
        verify(str(tmp_path / "nowhere"))
    (copy / schema.DATASET_JSON).unlink()
    with pytest.raises(InputError, match="unfinished job"):
        verify(str(copy))
