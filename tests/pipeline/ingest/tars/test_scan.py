"""Members of a tar, found by its headers alone: in tars of every kind, broken in every way."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from reelmae.pipeline.ingest.tars import scan
from reelmae.pipeline.ingest.tars.scan import (
    BLOCK,
    ENDS_BEFORE,
    FIRST,
    BrokenHeaderError,
    Member,
    TarScan,
    read_header,
)

WriteTar = Callable[..., Path]
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
BIG = 200_000


class _Bytes:
    """A tar in memory that knows what was read of it."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.reads: list[tuple[int, int]] = []

    def read(self, offset: int, size: int) -> bytes:
        assert 0 <= offset <= offset + size <= len(self.data)
        self.reads.append((offset, size))
        return self.data[offset : offset + size]

    @property
    def bytes_read(self) -> int:
        return sum(size for _, size in self.reads)


def _scan(data: bytes) -> tuple[list[Member], list[str]]:
    found = TarScan(_Bytes(data).read, len(data))
    return list(found), found.faults


@pytest.fixture
def plain(write_tar: WriteTar, tmp_path: Path) -> bytes:
    """Four videos of BIG bytes with their json."""
    members = [(f"{i}.{ext}", os.urandom(size)) for i in range(4) for ext, size in (("json", 40), ("mp4", BIG))]
    return write_tar(tmp_path / "plain.tar", members).read_bytes()


def _link(name: str, kind: bytes = tarfile.SYMTYPE, to: str = "/etc/passwd") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info


@pytest.mark.parametrize("format", FORMATS)
def test_the_members_are_those_that_tarfile_finds_and_their_bytes_are_not_read(
    format: int, write_tar: WriteTar, tmp_path: Path
) -> None:
    folder = tarfile.TarInfo("folder")
    folder.type = tarfile.DIRTYPE
    names = ["folder/a.mp4", "./b.mp4", "ä\n'.mp4", "no extension", ".hidden", f"{'d' * 120}/{'e' * 90}.mp4"]
    if format != tarfile.USTAR_FORMAT:
        names += ["x" * 300, "y" * 1000 + "/z.mp4"]
    members = [folder, *((name, os.urandom(BIG + i)) for i, name in enumerate(names))]
    path = write_tar(tmp_path / "x.tar", members, format)
    source = _Bytes(path.read_bytes())
    found = TarScan(source.read, len(source.data))
    got = list(found)
    with tarfile.open(path) as tar:
        assert [(m.name, m.offset, m.data, m.size) for m in got] == [
            (m.name, m.offset, m.offset_data, m.size) for m in tar if m.isreg()
        ]
    assert len(got) == len(names)
    assert found.faults == []
    assert found.is_tar
    assert source.bytes_read <= (len(names) + 2) * FIRST
    for member in got:
        assert read_header(source.data[member.offset : member.data]) == (member.name, member.size)
        assert found.content(member) == source.data[member.data : member.end]


def test_small_members_are_read_in_few_windows(write_tar: WriteTar, tmp_path: Path) -> None:
    data = write_tar(tmp_path / "x.tar", [(f"{i}.json", b"{}") for i in range(2000)]).read_bytes()
    source = _Bytes(data)
    assert len(list(TarScan(source.read, len(data)))) == 2000
    assert len(source.reads) < 30
    assert source.bytes_read <= len(data) + tarfile.RECORDSIZE  # what follows the end mark is looked at again


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (tarfile.SYMTYPE, "a link in a tar; not followed"),
        (tarfile.LNKTYPE, "a link in a tar; not followed"),
        (tarfile.CHRTYPE, "a device, no plain file"),
        (tarfile.FIFOTYPE, "a pipe, no plain file"),
        (tarfile.GNUTYPE_SPARSE, "stored as a sparse file; pack it as a plain one"),
    ],
)
def test_what_is_no_plain_file_is_a_member_that_cannot_be_read(
    kind: bytes, words: str, write_tar: WriteTar, tmp_path: Path
) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.mp4", b"a"), _link("b.mp4", kind), ("c.mp4", b"c")])
    got, faults = _scan(path.read_bytes())
    assert [(m.name, m.fault) for m in got] == [("a.mp4", ""), ("b.mp4", words), ("c.mp4", "")]
    assert faults == []


def test_a_tar_that_breaks_off_has_the_members_before_and_one_that_it_ends_before(plain: bytes) -> None:
    whole, _ = _scan(plain)
    third = whole[5]
    got, faults = _scan(plain[: third.data + 1000])
    assert got[:5] == whole[:5]
    assert [(m.name, m.fault) for m in got[5:]] == [("2.mp4", ENDS_BEFORE)]
    assert faults == [f"ends {BIG - 1000} bytes before its member '2.mp4' does"]


def test_a_tar_that_breaks_off_between_two_members_says_that_it_has_no_end(plain: bytes) -> None:
    whole, _ = _scan(plain)
    got, faults = _scan(plain[: whole[4].offset])
    assert got == whole[:4]
    assert faults == ["ends without an end mark: it may be cut short"]
    assert _scan(plain[: whole[-1].data + -(-BIG // BLOCK) * BLOCK + BLOCK]) == (whole, [])  # one block of zeros


def test_after_a_broken_header_the_search_goes_on(plain: bytes) -> None:
    whole, _ = _scan(plain)
    for i in (0, 3, 7):
        at = whole[i].offset
        got, faults = _scan(plain[: at + 20] + b"\xff" + plain[at + 21 :])
        assert got == whole[:i] + whole[i + 1 :]
        assert faults == [f"has a broken header at byte {at}"]


@pytest.mark.parametrize("lie", [10, BIG - 5000, BIG + 5000, 10**12, 1 << 62, -1])
def test_a_lie_about_a_size_costs_no_other_member(lie: int, plain: bytes) -> None:
    whole, _ = _scan(plain)
    info = tarfile.TarInfo("1.mp4")
    info.size = lie
    at = whole[3].offset
    got, faults = _scan(plain[:at] + info.tobuf(tarfile.GNU_FORMAT) + plain[at + BLOCK :])
    others = [m for m in got if m.name != "1.mp4"]
    assert others == whole[:3] + whole[4:]
    assert len(faults) == 1
    assert [(m.size, bool(m.fault)) for m in got if m.name == "1.mp4"] == ([(lie, lie > 10**6)] if lie > 0 else [])


def test_tars_behind_one_another_are_read_to_the_last(plain: bytes) -> None:
    got, faults = _scan(plain + plain)
    assert [m.name for m in got] == 2 * [m.name for m in _scan(plain)[0]]
    assert faults == []


@pytest.mark.parametrize(
    ("data", "faults", "is_tar"),
    [
        (b"", ["is empty"], False),
        (bytes(10240), ["holds no file"], True),
        (b"no tar" * 1000, ["has a broken header at byte 0", "holds no file"], False),
        (b"x" * 100, ["has a broken header at byte 0", "holds no file"], False),
    ],
)
def test_what_is_no_tar_or_holds_nothing(data: bytes, faults: list[str], is_tar: bool) -> None:
    found = TarScan(_Bytes(data).read, len(data))
    assert list(found) == []
    assert found.faults == faults
    assert found.is_tar == is_tar


def _header(kind: bytes, size: int) -> bytes:
    info = tarfile.TarInfo("././@x")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    "evil",
    [
        _header(tarfile.XHDTYPE, 1 << 40),
        _header(tarfile.GNUTYPE_LONGNAME, 1 << 33),
        _header(tarfile.XHDTYPE, 512) + b"0 x=y\n".ljust(512, b"\0"),
        _header(tarfile.XHDTYPE, 512) + b"99 GNU.sparse.map=1,x\n".ljust(512, b"\0"),
        _header(tarfile.GNUTYPE_LONGNAME, 8192) + b"n" * 8192,
        _header(tarfile.GNUTYPE_LONGNAME, 0) * 3000,
    ],
)
def test_a_header_that_promises_anything_is_broken_and_nothing_is_read_for_it(evil: bytes, plain: bytes) -> None:
    whole, _ = _scan(plain)
    source = _Bytes(evil + plain)
    found = TarScan(source.read, len(source.data))
    got = list(found)
    assert [m.name for m in got][-len(whole) + 1 :] == [m.name for m in whole][1:]
    assert found.faults[0].startswith("has a")
    assert max(size for _, size in source.reads) <= 2 << 20


def test_a_search_ends_somewhere(plain: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "LOOK", 1 << 20)
    whole, _ = _scan(plain)
    at = whole[2].offset
    source = _Bytes(plain[:at] + os.urandom(5 << 20) + plain[at:])
    found = TarScan(source.read, len(source.data))
    assert list(found) == whole[:2]
    begin = whole[1].data
    assert found.faults == [
        f"has a broken header at byte {at}",
        f"has no header in the {1 << 20} bytes after byte {begin}; what follows was not looked at",
    ]
    assert source.bytes_read < 3 << 20


def test_a_header_that_is_another_is_told(plain: bytes) -> None:
    whole, _ = _scan(plain)
    first = plain[: whole[0].data]
    assert read_header(first) == ("0.json", 40)
    for wrong in (b"", bytes(BLOCK), first + first, first[:-1], b"\xff" + first[1:], _link("x").tobuf()):
        with pytest.raises(BrokenHeaderError):
            read_header(wrong)
