"""Shards: the same bytes always; offsets that point at the clips; readable by others' readers."""

from __future__ import annotations

import hashlib
import random
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from reelmae.pipeline import schema
from reelmae.pipeline.ingest.shards.pack import ClipRow, Packer
from reelmae.pipeline.schema import clip_key


def _row(url: str, ordinal: int) -> ClipRow:
    return ClipRow(
        key=clip_key(url, ordinal),
        shard="",
        offset=0,
        size=0,
        sha256="",
        source=url,
        span_start_s=0.0,
        span_end_s=1.0,
        frames=25,
        fps=25.0,
        width=64,
        height=64,
        codec="h264",
        label=None,
        label_id=-1,
        wanted_start_s=0.0,
        wanted_end_s=1.0,
        motion=1.0,
        luma=1.0,
        contrast=1.0,
        border=0.0,
        phash=None,
        duplicate_of=None,
        source_bytes=1,
        source_container="mov",
        source_codec="h264",
        source_width=64,
        source_height=64,
        source_fps=25.0,
        source_seconds=1.0,
        encoder="x264",
        colour="none",
        extra={"views": 3},
    )


def _pack(folder: Path, clips: list[bytes], shard_bytes: int = 1 << 30, task: int = 7, format: int = 2) -> Packer:
    folder.mkdir()
    with Packer(folder, task, shard_bytes, format) as packer:
        for i, data in enumerate(clips):
            path = folder / "clip.mp4"
            path.write_bytes(data)
            packer.add(path, _row(f"/b/{i}.mp4", 0))
            path.unlink()
    return packer


CLIPS = [bytes([i]) * (1000 + 700 * i) for i in range(9)]


def test_offsets_and_digests_point_at_the_clips(tmp_path: Path) -> None:
    packer = _pack(tmp_path / "a", CLIPS)
    tar = packer.shards[0].tar.read_bytes()
    for row, data in zip(packer.rows, CLIPS, strict=True):
        assert tar[row.offset : row.offset + row.size] == data
        assert row.sha256 == hashlib.sha256(data).hexdigest()
        assert row.shard == "shards/000007-00.tar"


def test_packing_twice_gives_equal_bytes(tmp_path: Path) -> None:
    one, two = _pack(tmp_path / "a", CLIPS), _pack(tmp_path / "b", CLIPS)
    assert one.shards[0].tar.read_bytes() == two.shards[0].tar.read_bytes()
    with tarfile.open(one.shards[0].tar) as f:
        owners = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in f}
    assert owners == {(0, 0, 0, "reelmae", "reelmae", 0o444)}


def test_a_shard_that_passes_the_size_is_closed(tmp_path: Path) -> None:
    packer = _pack(tmp_path / "a", CLIPS, shard_bytes=12_000)
    assert len(packer.shards) > 2
    assert [s.name for s in packer.shards] == [f"shards/000007-{i:02d}.tar" for i in range(len(packer.shards))]
    assert [r.key for r in packer.rows] == [clip_key(f"/b/{i}.mp4", 0) for i in range(9)]
    for shard in packer.shards[:-1]:
        assert 12_000 <= shard.tar.stat().st_size < 12_000 + 20_480


def test_index_has_dalis_form(tmp_path: Path) -> None:
    packer = _pack(tmp_path / "a", CLIPS[:2])
    lines = packer.shards[0].idx.read_text().splitlines()
    assert lines[0] == "v1.2 2"
    first = lines[1].split()
    assert (first[0], first[4]) == ("json", "mp4")
    assert first[5:7] == [str(packer.rows[0].offset), "1000"]
    assert len(lines) == 3


def test_nothing_added_gives_no_shard(tmp_path: Path) -> None:
    assert _pack(tmp_path / "a", []).shards == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its file open
def test_webdataset_reads_a_shard(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    packer = _pack(tmp_path / "a", CLIPS)
    read = list(webdataset.WebDataset(str(packer.shards[0].tar), shardshuffle=False))
    assert [s["mp4"] for s in read] == CLIPS
    assert [s["__key__"] for s in read] == [r.key for r in packer.rows]


def test_only_large_clips_of_format_2_have_blocks(tmp_path: Path) -> None:
    clips = [random.Random(i).randbytes(schema.BLOCKS_FROM - 1 + i) for i in range(2)]
    new, old = _pack(tmp_path / "new", clips), _pack(tmp_path / "old", clips, format=1)
    assert [row.blocks for row in new.rows] == [None, schema.block_checks(clips[1])]
    assert [row.blocks for row in old.rows] == [None, None]
    assert new.shards[0].tar.read_bytes() == old.shards[0].tar.read_bytes()


def test_a_manifests_column_may_be_called_blocks_in_format_1(tmp_path: Path) -> None:
    row = replace(_row("/b/0.mp4", 0), extra={"blocks": "mine"})
    assert row.record()["blocks"] == "mine"


def test_the_shards_of_later_tasks_lie_in_folders(tmp_path: Path) -> None:
    for format, name in ((1, "shards/000117-01.tar"), (2, "shards/0001/000117-01.tar")):
        packer = _pack(tmp_path / str(format), CLIPS, shard_bytes=12_000, task=117, format=format)
        assert packer.shards[1].name == name
        assert packer.shards[1].tar == tmp_path / str(format) / "000117-01.tar"
