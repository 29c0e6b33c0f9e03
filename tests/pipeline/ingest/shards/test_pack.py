"""Shards: the same bytes always; offsets that point at the clips; readable by others' readers."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import signal
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from reelmae.pipeline import schema
from reelmae.pipeline.errors import StorageFullError
from reelmae.pipeline.ingest.sandbox import Sandbox
from reelmae.pipeline.ingest.shards.pack import ClipRow, Packer
from reelmae.pipeline.ingest.tars.webdataset_child import TarChild
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


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TarChild]:
    child = TarChild(Sandbox(), tmp_path_factory.mktemp("tars"))
    yield child
    child.close()


Pack = Callable[..., Packer]


@pytest.fixture
def pack(tars: TarChild) -> Pack:
    """pack(folder, clips, shard_bytes, task, format) → the packer of a task, after its end."""

    def run(folder: Path, clips: list[bytes], shard_bytes: int = 1 << 30, task: int = 7, format: int = 2) -> Packer:
        (folder / "source").mkdir(parents=True)
        with Packer(folder, task, shard_bytes, format, tars) as packer:
            for i, data in enumerate(clips):
                path = folder / "source" / "clip.mp4"
                path.write_bytes(data)
                packer.add(path, _row(f"/b/{i}.mp4", 0))
                assert not path.exists()
        assert {p for p in folder.iterdir() if p.is_file()} == {f for s in packer.shards for f in (s.tar, s.idx)}
        return packer

    return run


CLIPS = [bytes([i]) * (1000 + 700 * i) for i in range(9)]


def test_offsets_and_digests_point_at_the_clips(pack: Pack, tmp_path: Path) -> None:
    packer = pack(tmp_path / "a", CLIPS)
    tar = packer.shards[0].tar.read_bytes()
    for row, data in zip(packer.rows, CLIPS, strict=True):
        assert tar[row.offset : row.offset + row.size] == data
        assert row.sha256 == hashlib.sha256(data).hexdigest()
        assert row.shard == "shards/000007-00.tar"


def test_packing_twice_gives_equal_bytes(pack: Pack, tmp_path: Path) -> None:
    one, two = pack(tmp_path / "a", CLIPS), pack(tmp_path / "b", CLIPS)
    assert one.shards[0].tar.read_bytes() == two.shards[0].tar.read_bytes()
    with tarfile.open(one.shards[0].tar) as f:
        owners = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in f}
    assert owners == {(0, 0, 0, "reelmae", "reelmae", 0o444)}


def test_a_shard_that_passes_the_size_is_closed(pack: Pack, tmp_path: Path) -> None:
    packer = pack(tmp_path / "a", CLIPS, shard_bytes=12_000)
    assert len(packer.shards) > 2
    assert [s.name for s in packer.shards] == [f"shards/000007-{i:02d}.tar" for i in range(len(packer.shards))]
    assert [r.key for r in packer.rows] == [clip_key(f"/b/{i}.mp4", 0) for i in range(9)]
    for shard in packer.shards[:-1]:
        assert 12_000 <= shard.tar.stat().st_size < 12_000 + 20_480


def test_index_has_dalis_form(pack: Pack, tmp_path: Path) -> None:
    packer = pack(tmp_path / "a", CLIPS[:2])
    lines = packer.shards[0].idx.read_text().splitlines()
    assert lines[0] == "v1.2 2"
    first = lines[1].split()
    assert (first[0], first[4]) == ("json", "mp4")
    assert first[5:7] == [str(packer.rows[0].offset), "1000"]
    assert len(lines) == 3


def test_nothing_added_gives_no_shard(pack: Pack, tmp_path: Path) -> None:
    assert pack(tmp_path / "a", []).shards == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its file open
def test_webdataset_reads_a_shard(pack: Pack, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    packer = pack(tmp_path / "a", CLIPS)
    read = list(webdataset.WebDataset(str(packer.shards[0].tar), shardshuffle=False))
    assert [s["mp4"] for s in read] == CLIPS
    assert [s["__key__"] for s in read] == [r.key for r in packer.rows]


def test_only_large_clips_of_format_2_have_blocks(pack: Pack, tmp_path: Path) -> None:
    clips = [random.Random(i).randbytes(schema.BLOCKS_FROM - 1 + i) for i in range(2)]
    new, old = pack(tmp_path / "new", clips), pack(tmp_path / "old", clips, format=1)
    assert [row.blocks for row in new.rows] == [None, schema.block_checks(clips[1])]
    assert [row.blocks for row in old.rows] == [None, None]
    assert new.shards[0].tar.read_bytes() == old.shards[0].tar.read_bytes()


def test_a_manifests_column_may_be_called_blocks_in_format_1(tmp_path: Path) -> None:
    row = replace(_row("/b/0.mp4", 0), extra={"blocks": "mine"})
    assert row.record()["blocks"] == "mine"


def test_the_shards_of_later_tasks_lie_in_folders(pack: Pack, tmp_path: Path) -> None:
    for format, name in ((1, "shards/000117-01.tar"), (2, "shards/0001/000117-01.tar")):
        packer = pack(tmp_path / str(format), CLIPS, shard_bytes=12_000, task=117, format=format)
        assert packer.shards[1].name == name
        assert packer.shards[1].tar == tmp_path / str(format) / "000117-01.tar"


def _plain_tars(packer: Packer, clips: list[bytes], shard_bytes: int) -> tuple[list[bytes], int]:
    """The same shards by the standard library alone, and where the first one's third clip ends."""
    tars: list[io.BytesIO] = []
    open_tar, third = None, 0
    for i, (row, data) in enumerate(zip(packer.rows, clips, strict=True)):
        if open_tar is None:
            tars.append(io.BytesIO())
            open_tar = tarfile.open(fileobj=tars[-1], mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        facts = {"codec": "h264", "fps": 25.0, "frames": 25, "height": 64, "label": None, "label_id": -1}
        facts |= {"source": row.source, "width": 64, "span_s": [0.0, 1.0], "manifest": {"views": 3}}
        for extension, content in (("json", json.dumps(facts, sort_keys=True).encode()), ("mp4", data)):
            member = tarfile.TarInfo(f"{row.key}.{extension}")
            member.size, member.mode = len(content), 0o444
            member.uname = member.gname = "reelmae"
            open_tar.addfile(member, io.BytesIO(content))
        third = open_tar.offset if i == 2 else third
        if open_tar.offset >= shard_bytes:
            open_tar.close()
            open_tar = None
    if open_tar is not None:
        open_tar.close()
    return [tar.getvalue() for tar in tars], third


def test_the_bytes_are_those_of_the_standard_library(pack: Pack, tmp_path: Path) -> None:
    """Which wrote them in versions before, shards of one clip to all clips, closed at the same byte."""
    clips = [*CLIPS, b"", random.Random(0).randbytes(3_000_000)]
    one = pack(tmp_path / "one", clips)
    _, third = _plain_tars(one, clips, 1 << 30)
    for shard_bytes in (1, 12_000, third - 1, third, third + 1, 1 << 30):
        packer = pack(tmp_path / str(shard_bytes), clips, shard_bytes)
        wanted, _ = _plain_tars(packer, clips, shard_bytes)
        assert [s.tar.read_bytes() for s in packer.shards] == wanted, shard_bytes
        assert len(packer.rows) == len(clips)


def test_the_child_starts_with_the_first_clip(tmp_path: Path, list_processes: Callable[[Path], list[int]]) -> None:
    """Not with the task, and without its shard being full: it gets ready while the next clip is made."""
    (tmp_path / "child").mkdir()
    tars = TarChild(Sandbox(), tmp_path / "child")
    with Packer(tmp_path, 7, 1 << 30, 2, tars) as packer:
        assert list_processes(tmp_path / "child") == []
        (tmp_path / "clip.mp4").write_bytes(b"clip")
        packer.add(tmp_path / "clip.mp4", _row("/b/0.mp4", 0))
        (process,) = list_processes(tmp_path / "child")
    assert list_processes(tmp_path / "child") == [process]
    tars.close()


@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGSEGV])
def test_a_child_that_dies_while_clips_wait_costs_nothing(
    signal_: signal.Signals, pack: Pack, tmp_path: Path, list_processes: Callable[[Path], list[int]]
) -> None:
    (tmp_path / "child").mkdir()
    tars = TarChild(Sandbox(), tmp_path / "child")
    with Packer(tmp_path, 7, 1 << 30, 2, tars) as packer:
        for i, data in enumerate(CLIPS):
            (tmp_path / "clip.mp4").write_bytes(data)
            packer.add(tmp_path / "clip.mp4", _row(f"/b/{i}.mp4", 0))
        (process,) = list_processes(tmp_path / "child")
        os.kill(process, signal_)
        while _state(process) not in "ZX":
            time.sleep(0.001)
    tars.close()
    wanted = pack(tmp_path / "undisturbed", CLIPS)
    assert packer.rows == wanted.rows
    assert packer.shards[0].tar.read_bytes() == wanted.shards[0].tar.read_bytes()


def _state(process: int) -> str:
    """R, S, Z, … as the system names it."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_full_disk_is_named(tars: TarChild, tmp_path: Path) -> None:
    (tmp_path / "000007-00.tar").symlink_to("/dev/full")
    (tmp_path / "clip.mp4").write_bytes(b"clip")
    packer = Packer(tmp_path, 7, 1, 2, tars)
    with pytest.raises(StorageFullError, match=f"^{tmp_path}: no space left for temporary files"):
        packer.add(tmp_path / "clip.mp4", _row("/b/0.mp4", 0))
    assert packer.shards == packer.rows == []
