"""Members of tars are read in pieces, each byte once; what cannot be taken out of a piece is copied by its range."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from reelmae.pipeline.errors import StorageError
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.plan.sources import access_of, list_sources
from reelmae.pipeline.ingest.run import members
from reelmae.pipeline.ingest.run.fetch import NoSourceError
from reelmae.pipeline.ingest.run.members import MemberReader
from reelmae.pipeline.ingest.sandbox import Sandbox
from reelmae.pipeline.ingest.tars.webdataset_child import TarChild
from reelmae.pipeline.storage.access import Access

WriteTar = Callable[..., Path]
SIZE = 10_000


class _Child(TarChild):
    """Remembers the stretches that were asked for, and how many bytes it has left in the folder."""

    fails = False

    def __init__(self, folder: Path) -> None:
        super().__init__(Sandbox(), folder)
        self.stretches: list[tuple[int, int, int]] = []
        self.most = 0

    def read(
        self, tar: Path, start: int, end: int, wanted: Mapping[tuple[str, int], Path], *, wall_s: float
    ) -> list[tuple[str, int]]:
        if self.fails:
            raise StorageError("it cannot")
        self.stretches.append((start, end, len(wanted)))
        done = super().read(tar, start, end, wanted, wall_s=wall_s)
        folder = next(iter(wanted.values())).parent
        self.most = max(self.most, sum(path.stat().st_size for path in folder.iterdir()))
        return done


@pytest.fixture
def child(tmp_path: Path) -> Iterator[_Child]:
    (tmp_path / "child").mkdir()
    child = _Child(tmp_path / "child")
    yield child
    child.close()


@pytest.fixture
def content() -> list[tuple[str, bytes]]:
    """Ten members of SIZE bytes."""
    return [(f"{i}.bin", os.urandom(SIZE)) for i in range(10)]


def _plan(src: Path, **fields: Any) -> list[dict[str, Any]]:
    rows = list_sources(str(src), ShardConfig()).table.to_pylist()
    return [row | fields for row in sorted(rows, key=lambda row: (row["tar"], row["offset"]))]


def _reader(sources: list[dict[str, Any]], child: TarChild, tmp_path: Path) -> MemberReader:
    reach = partial(access_of, src=str(tmp_path), access=Access())
    return MemberReader(sources, child, tmp_path / "members", reach, None)


def _name(source: dict[str, Any]) -> str:
    name: str = source["url"].partition("#")[2]
    return name


def _read(reader: MemberReader, sources: list[dict[str, Any]], to: Path) -> list[tuple[str, bytes]]:
    found = []
    for source in sources:
        fetched = reader.fetch(source, to)
        assert fetched.is_checked
        assert fetched.bytes == to.stat().st_size == source["size"]
        found.append((_name(source), to.read_bytes()))
    return found


def test_a_stretch_is_read_in_pieces_and_one_is_held(
    content: list[tuple[str, bytes]],
    child: _Child,
    write_tar: WriteTar,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_tar(tmp_path / "x.tar", content)
    sources = _plan(tmp_path / "x.tar")
    assert _read(_reader(sources, child, tmp_path), sources, tmp_path / "to") == content
    ((start, end, count),) = child.stretches
    assert (start, end, count) == (0, sources[-1]["end"], 10)
    child.stretches, child.most = [], 0
    monkeypatch.setattr(members, "PIECE", 4 * (SIZE + 1024))
    assert _read(_reader(sources, child, tmp_path), sources, tmp_path / "to") == content
    assert [count for _, _, count in child.stretches] == [4, 4, 2]
    assert all(end - start <= members.PIECE for start, end, _ in child.stretches)
    assert all(a[1] <= b[0] for a, b in pairwise(child.stretches))
    assert child.most <= members.PIECE
    monkeypatch.setattr(members, "PIECE", SIZE - 1)  # each is longer than a piece
    child.stretches = []
    assert _read(_reader(sources, child, tmp_path), sources, tmp_path / "to") == content
    assert child.stretches == []


def test_what_lies_far_apart_or_is_not_asked_for_is_not_read(
    child: _Child, write_tar: WriteTar, tmp_path: Path
) -> None:
    content = [(f"{i}.bin", os.urandom(200_000)) for i in range(6)]
    write_tar(tmp_path / "x.tar", content)
    every = _plan(tmp_path / "x.tar")
    some = [every[i] for i in (0, 3, 4, 5)]  # a limit, or an append, has left two out
    assert _read(_reader(some, child, tmp_path), some, tmp_path / "to") == [content[i] for i in (0, 3, 4, 5)]
    assert [count for _, _, count in child.stretches] == [1, 3]
    reader = _reader(every, child, tmp_path)
    child.stretches = []
    assert _read(reader, [every[0], every[5], every[2]], tmp_path / "to") == [content[0], content[5], content[2]]
    assert len(child.stretches) == 1


def test_what_the_child_does_not_give_is_copied_by_its_range(
    child: _Child, write_tar: WriteTar, tmp_path: Path
) -> None:
    content = [("a.bin", b"1"), ("a.bin", b"22"), ("b.txt", b"\xff"), ("__c__/d", b"3"), ("e.bin", b""), ("f", b"4")]
    path = write_tar(tmp_path / "x.tar", content)
    sources = _plan(path)
    shown = [("a.bin", b"1"), ("a.bin#2", b"22"), *content[2:]]
    assert _read(_reader(sources, child, tmp_path), sources, tmp_path / "to") == shown
    assert [count for _, _, count in child.stretches] == [4]  # once: the others are not worth another piece
    child.fails = True
    assert _read(_reader(sources, child, tmp_path), sources, tmp_path / "to") == shown
    child.fails = False
    child.stretches = []
    reader = _reader(sources, child, tmp_path)
    assert reader.fetch(sources[0], tmp_path / "to", again=True).bytes == 1
    assert child.stretches == []
    assert (tmp_path / "to").read_bytes() == b"1"


def test_a_header_that_is_broken_by_now_costs_one_member(
    content: list[tuple[str, bytes]], child: _Child, write_tar: WriteTar, tmp_path: Path
) -> None:
    path = write_tar(tmp_path / "x.tar", content)
    sources = _plan(path)
    data = bytearray(path.read_bytes())
    data[sources[3]["offset"]] ^= 0xFF
    path.write_bytes(bytes(data))
    reader = _reader(sources, child, tmp_path)
    assert _read(reader, sources[:3], tmp_path / "to") == content[:3]
    with pytest.raises(NoSourceError, match="the tar has changed since it was planned"):
        reader.fetch(sources[3], tmp_path / "to")
    assert _read(reader, sources[4:], tmp_path / "to") == content[4:]
    assert [count for _, _, count in child.stretches] == [10, 7, 6]
    path.write_bytes(bytes(data[: sources[6]["end"] - 1]))
    reader = _reader(sources, child, tmp_path)
    assert _read(reader, sources[4:6], tmp_path / "to") == content[4:6]
    for source in sources[6:]:
        with pytest.raises(NoSourceError, match="changed"):
            reader.fetch(source, tmp_path / "to")
    path.unlink()
    with pytest.raises(FileNotFoundError):
        _reader(sources, child, tmp_path).fetch(sources[0], tmp_path / "to")
    path.mkdir()
    with pytest.raises(NoSourceError, match="no plain file"):
        _reader(sources, child, tmp_path).fetch(sources[0], tmp_path / "to")
