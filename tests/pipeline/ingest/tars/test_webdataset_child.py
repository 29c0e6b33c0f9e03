"""webdataset in its child: whole members out of anybody's tars, written to the files that were named and nowhere else."""

from __future__ import annotations

import io
import os
import signal
import struct
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from reelmae.pipeline.errors import StorageError, StorageFullError
from reelmae.pipeline.ingest.sandbox import Sandbox
from reelmae.pipeline.ingest.tars import webdataset_child
from reelmae.pipeline.ingest.tars.webdataset_child import KILLED_TRIES, TarChild

Member = tuple[str, bytes]


class _TarChild(TarChild):
    """Sends its own child a signal, a moment after it was asked, for the first `kills` questions."""

    kills = 0
    sends: signal.Signals = signal.SIGKILL

    def start(self) -> None:
        super().start()
        if self.kills:
            self.kills -= 1
            os.kill(self.pid, signal.SIGSTOP)  # it has not answered yet when it is killed
            threading.Timer(0.05, _send, (self.pid, self.sends)).start()

    @property
    def pid(self) -> int:
        assert self._child is not None
        return self._child.pid


def _send(pid: int, what: signal.Signals) -> None:
    os.kill(pid, what)
    if what != signal.SIGKILL:
        os.kill(pid, signal.SIGCONT)  # a stopped process sees no other one


@pytest.fixture
def child(tmp_path: Path) -> Iterator[_TarChild]:
    (tmp_path / "child").mkdir()
    child = _TarChild(Sandbox(), tmp_path / "child")
    yield child
    child.close()


def _tar(path: Path, members: list[Member], format: int = tarfile.PAX_FORMAT) -> list[tuple[int, int, int]]:
    """Write a tar; of each member the bytes at which its first header, its data and its padding's end lie."""
    places = []
    with tarfile.open(path, "w", format=format) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            start = file.offset
            file.addfile(info, io.BytesIO(data))
            places.append((start, file.offset - -(-len(data) // 512) * 512, file.offset))
    return places


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


MEMBERS = [(f"{i:02d}.mp4", bytes([i + 1]) * (20_000 + 511 * i)) for i in range(8)]


def test_wanted_members_of_a_stretch_are_written(child: TarChild, tmp_path: Path) -> None:
    places = _tar(tmp_path / "a.tar", MEMBERS)
    wanted = {("02.mp4", 0): tmp_path / "x", ("04.mp4", 0): tmp_path / "y", ("07.mp4", 0): tmp_path / "z"}
    found = child.read(tmp_path / "a.tar", places[2][0], places[5][2], wanted, wall_s=60)
    assert found == [("02.mp4", 0), ("04.mp4", 0)]
    assert (tmp_path / "x").read_bytes() == MEMBERS[2][1]
    assert (tmp_path / "y").read_bytes() == MEMBERS[4][1]
    assert not (tmp_path / "z").exists()


def test_members_of_one_name_are_told_apart_by_their_number(child: TarChild, tmp_path: Path) -> None:
    members = [("a.mp4", b"first"), ("b.mp4", b"other"), ("a.mp4", b"second"), ("a.mp4", b"third")]
    _tar(tmp_path / "a.tar", members)
    wanted = {("a.mp4", 1): tmp_path / "x", ("a.mp4", 2): tmp_path / "y"}
    assert child.read(tmp_path / "a.tar", 0, 1 << 20, wanted, wall_s=60) == [("a.mp4", 1), ("a.mp4", 2)]
    assert ((tmp_path / "x").read_bytes(), (tmp_path / "y").read_bytes()) == (b"second", b"third")


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_stretch_may_begin_with_extended_headers(child: TarChild, format: int, tmp_path: Path) -> None:
    long = f"{'d' * 90}/{'f' * 90}.mp4"
    places = _tar(tmp_path / "a.tar", [*MEMBERS[:2], (long, b"clip")], format)
    found = child.read(tmp_path / "a.tar", places[2][0], places[2][2], {(long, 0): tmp_path / "x"}, wall_s=60)
    assert found == [(long, 0)]
    assert (tmp_path / "x").read_bytes() == b"clip"


def test_a_stretch_that_breaks_gives_the_whole_members_before(child: TarChild, tmp_path: Path) -> None:
    places = _tar(tmp_path / "a.tar", MEMBERS)
    wanted = {(name, 0): tmp_path / name for name, _ in MEMBERS}
    whole = (tmp_path / "a.tar").read_bytes()
    ends = [places[3][1] + n for n in (-512, -1, 0, 1, 10_240, 20_479, 20_480)]  # within its header and its data
    ends += [n for n in range(places[3][1], places[3][2], 10_240) if not n % 10_240]  # between two reads of tarfile
    for end in ends:
        for tar in (tmp_path / "a.tar", tmp_path / "cut.tar"):
            (tmp_path / "cut.tar").write_bytes(whole[:end])
            found = child.read(tar, 0, end if tar.name == "a.tar" else len(whole), wanted, wall_s=60)
            assert [name for name, _ in found] == [name for name, _ in MEMBERS[:3]], (end, tar)
    for name, data in MEMBERS[:3]:
        assert (tmp_path / name).read_bytes() == data
    assert not (tmp_path / MEMBERS[3][0]).exists()


def test_the_padding_after_the_last_member_may_be_missing(child: TarChild, tmp_path: Path) -> None:
    places = _tar(tmp_path / "a.tar", MEMBERS)
    wanted = {(name, 0): tmp_path / name for name, _ in MEMBERS[:2]}
    end = places[1][1] + len(MEMBERS[1][1])
    assert child.read(tmp_path / "a.tar", 0, end, wanted, wall_s=60) == list(wanted)


def test_a_broken_header_ends_the_reading(child: TarChild, tmp_path: Path) -> None:
    places = _tar(tmp_path / "a.tar", MEMBERS)
    with (tmp_path / "a.tar").open("r+b") as file:
        file.seek(places[2][0] + 150)  # its checksum
        file.write(b"9999")
    wanted = {(name, 0): tmp_path / name for name, _ in MEMBERS}
    found = child.read(tmp_path / "a.tar", 0, places[-1][2], wanted, wall_s=60)
    assert found == list(wanted)[:2]
    assert child.read(tmp_path / "a.tar", places[2][0], places[-1][2], wanted, wall_s=60) == []
    assert child.read(tmp_path / "a.tar", places[3][0], places[-1][2], wanted, wall_s=60) == list(wanted)[3:]


@pytest.mark.parametrize("name", ["BZh91AY&SY.mp4", "\x1f\udc8b\x08.mp4", "__key__"])
def test_what_webdataset_takes_for_something_else_is_left_out(child: TarChild, name: str, tmp_path: Path) -> None:
    """A name like the begin of a compressed tar; a name of its own."""
    _tar(tmp_path / "a.tar", [(name, b"clip")], tarfile.GNU_FORMAT)
    assert child.read(tmp_path / "a.tar", 0, 10_240, {(name, 0): tmp_path / "x"}, wall_s=60) == []
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "name",
    [
        "../x.mp4",
        "/{root}/x.mp4",
        "a/../../x.mp4",
        "a\0b.mp4",
        "n" * 5000,
        "\udcff\udcfe.mp4",
        "a\nb.mp4",
        "-",
        "__x__/y.mp4",
    ],
)
def test_a_members_name_leads_nowhere(child: TarChild, name: str, tmp_path: Path) -> None:
    root, name = tmp_path / "root", name.format(root=tmp_path / "root")
    (root / "deep").mkdir(parents=True)
    tar = tmp_path / "a.tar"
    _tar(tar, [(name, b"hostile")], tarfile.GNU_FORMAT if "\udcff" in name else tarfile.PAX_FORMAT)
    with tarfile.open(tar) as file:
        (stored,) = file.getnames()  # "a\0b" is cut at its NUL by some
    files = _files(tmp_path)
    assert child.read(tar, 0, 1 << 20, {(stored, 0): root / "deep" / "given"}, wall_s=60) == [(stored, 0)]
    assert _files(tmp_path) == files | {"root/deep/given": b"hostile"}


def _sparse(name: str, size: int) -> bytes:
    """GNU's header of a sparse file of this size that holds no data at all."""
    info = tarfile.TarInfo(name)
    info.type = tarfile.GNUTYPE_SPARSE
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[386:482] = bytes(96)
    block[483:495] = b"\x80" + size.to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def test_a_header_that_promises_gigabytes_gets_no_memory(child: _TarChild, tmp_path: Path) -> None:
    tar = tmp_path / "a.tar"
    _tar(tar, MEMBERS)
    tar.write_bytes(_sparse("a.mp4", 7 << 30) + tar.read_bytes())
    wanted = {("a.mp4", 0): tmp_path / "x", ("00.mp4", 0): tmp_path / "y"}
    assert child.read(tar, 0, 1 << 20, wanted, wall_s=60) == []
    pid = child.pid
    assert child.read(tar, 512, 1 << 20, wanted, wall_s=60) == [("00.mp4", 0)]
    assert child.pid == pid
    assert _peak(pid) < 1 << 30


def _peak(pid: int) -> int:
    """The most memory that a process has held, in bytes."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) << 10


def test_what_is_not_wanted_is_not_held_in_memory(child: _TarChild, tmp_path: Path) -> None:
    tar, large = tmp_path / "a.tar", 600 << 20
    _tar(tmp_path / "b.tar", [("b.mp4", b"clip")])
    info = tarfile.TarInfo("a.mp4")
    info.size = large
    with tar.open("wb") as file:
        file.write(info.tobuf(tarfile.USTAR_FORMAT))
        file.seek(512 + large)
        file.write((tmp_path / "b.tar").read_bytes())
    assert child.read(tar, 0, tar.stat().st_size, {("b.mp4", 0): tmp_path / "x"}, wall_s=120) == [("b.mp4", 0)]
    assert _peak(child.pid) < 200 << 20


def test_the_child_knows_no_torch(child: _TarChild, tmp_path: Path) -> None:
    _tar(tmp_path / "a.tar", MEMBERS)
    child.read(tmp_path / "a.tar", 0, 512, {("x", 0): tmp_path / "x"}, wall_s=60)
    maps = Path(f"/proc/{child.pid}/maps").read_text()
    assert "numpy" in maps  # of webdataset
    assert "torch" not in maps


def test_a_killed_child_is_asked_again(child: _TarChild, tmp_path: Path) -> None:
    _tar(tmp_path / "a.tar", MEMBERS)
    wanted = {(name, 0): tmp_path / name for name, _ in MEMBERS}
    child.kills = KILLED_TRIES - 1
    assert child.read(tmp_path / "a.tar", 0, 1 << 20, wanted, wall_s=60) == list(wanted)
    assert child.kills == 0
    assert [(tmp_path / name).read_bytes() for name, _ in MEMBERS] == [data for _, data in MEMBERS]
    clips = [(name[:2], b"{}", tmp_path / name) for name, _ in MEMBERS]
    child.kills, child.sends = KILLED_TRIES - 1, signal.SIGTERM
    child.write(tmp_path / "b.tar", clips)
    assert child.kills == 0
    with tarfile.open(tmp_path / "b.tar") as file:
        assert len(file.getnames()) == 2 * len(clips)


def test_one_that_is_killed_every_time_reads_and_writes_nothing(child: _TarChild, tmp_path: Path) -> None:
    _tar(tmp_path / "a.tar", MEMBERS)
    child.kills = KILLED_TRIES
    assert child.read(tmp_path / "a.tar", 0, 1 << 20, {("00.mp4", 0): tmp_path / "x"}, wall_s=60) == []
    child.kills = KILLED_TRIES
    with pytest.raises(StorageError, match=r"b\.tar: the child that writes tars with webdataset failed: .*SIGKILL"):
        child.write(tmp_path / "b.tar", [("k", b"{}", tmp_path / "a.tar")])


def test_a_stretch_over_which_the_child_dies_or_hangs_gives_nothing(child: _TarChild, tmp_path: Path) -> None:
    _tar(tmp_path / "a.tar", MEMBERS)
    wanted = {("00.mp4", 0): tmp_path / "x"}
    child.kills, child.sends = 1, signal.SIGSEGV
    assert child.read(tmp_path / "a.tar", 0, 1 << 20, wanted, wall_s=60) == []
    assert child.kills == 0
    child.start()
    os.kill(child.pid, signal.SIGSTOP)
    assert child.read(tmp_path / "a.tar", 0, 1 << 20, wanted, wall_s=0.01) == []
    assert child.read(tmp_path / "a.tar", 0, 1 << 20, wanted, wall_s=60) == list(wanted)


def test_a_full_disk_is_named(child: TarChild, tmp_path: Path) -> None:
    places = _tar(tmp_path / "a.tar", MEMBERS)
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    with pytest.raises(StorageFullError, match="no space left for temporary files; free some, or set TMPDIR"):
        child.read(tmp_path / "a.tar", 0, places[-1][2], {("00.mp4", 0): full}, wall_s=60)
    with pytest.raises(StorageFullError, match=f"^{tmp_path}: no space left"):
        child.write(full, [("k", b"{}", tmp_path / "a.tar")])


def test_a_file_that_cannot_be_read_or_written_is_named(child: TarChild, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"clip")
    with pytest.raises(StorageError, match=r"away/b\.tar: No such file or directory$"):
        child.write(tmp_path / "away" / "b.tar", [("k", b"{}", clip)])
    with pytest.raises(StorageError, match=r"a\.tar: No such file or directory$"):
        child.read(tmp_path / "a.tar", 0, 512, {("a", 0): tmp_path / "x"}, wall_s=60)
    child.write(tmp_path / "b.tar", [("k", b"{}", clip)])  # the same child


def test_a_child_that_cannot_begin_is_an_error(
    child: TarChild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """webdataset is not there, or a system without memory."""
    monkeypatch.setattr(webdataset_child, "_PROGRAM", tmp_path / "none.py")
    with pytest.raises(StorageError, match=r"b\.tar: the child that writes tars with webdataset failed: .*status 2"):
        child.write(tmp_path / "b.tar", [])


def test_a_stopped_job_writes_nothing(tmp_path: Path, list_processes: Callable[[Path], list[int]]) -> None:
    sandbox = Sandbox()
    child = TarChild(sandbox, tmp_path)
    child.start()
    assert len(list_processes(tmp_path)) == 1
    sandbox.kill_all()
    with pytest.raises(StorageError):
        child.write(tmp_path / "b.tar", [])
    child.close()
    assert list_processes(tmp_path) == []
    assert not (tmp_path / "b.tar").exists()


def test_more_clips_than_a_pipe_holds(child: TarChild, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"clip")
    facts = struct.pack("500s", b"{}").replace(b"\0", b" ")
    child.write(tmp_path / "b.tar", [(f"{i:06d}", facts, clip) for i in range(1000)])
    with tarfile.open(tmp_path / "b.tar") as file:
        assert len(file.getnames()) == 2000
