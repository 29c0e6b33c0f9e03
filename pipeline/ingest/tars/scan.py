"""Finds the members of a tar by its headers: the standard library parses them, out of ranged reads of a few KiB.

The bytes of videos are not read. Members are found in the order of the tar, one at a time, so memory is flat:

- Long names (PAX, GNU) count as parts of their member's header. Global PAX headers change nothing.
- Where there is a broken header, the next whole one is searched, through at most LOOK bytes (LOOK_FIRST at the
  beginning), also among the bytes of the member before it, whose size may be a lie. So it is in a member that would be
  longer than the rest of the tar, and behind the end mark, where another tar may follow.
- A header may promise anything: one of more than HEADER bytes is broken, and nothing of a size it states is read.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

BLOCK = tarfile.BLOCKSIZE
HEADER = 1 << 20  # bytes of one member's header, long names included
READS = 32  # of one member's header, in which there may be headers of long names
FIRST = 16 << 10  # bytes of a window that follows a jump; it doubles while it is read through
WINDOW = 128 << 10  # bytes of the longest window
LONGEST_NAME = 4096  # characters
LOOK = 1 << 30  # bytes that are searched for the next header
LOOK_FIRST = 64 << 20  # bytes that are searched for the first one
LOOK_BEHIND = 1 << 20  # bytes that are searched behind the end mark
_STEP = 1 << 20  # bytes searched at once
_MAGIC, _MAGIC_AT = b"ustar", 257
_SHOWN = 3  # faults of one tar that are told
_NOT_READ = {
    tarfile.SYMTYPE: "a link in a tar; not followed",
    tarfile.LNKTYPE: "a link in a tar; not followed",
    tarfile.CHRTYPE: "a device, no plain file",
    tarfile.BLKTYPE: "a device, no plain file",
    tarfile.FIFOTYPE: "a pipe, no plain file",
}
ENDS_BEFORE = "its tar ends before it does"

Read = Callable[[int, int], bytes]
"""(offset, size) → exactly these bytes of the tar."""


@dataclass(frozen=True)
class Member:
    """One member of a tar that is no folder."""

    name: str
    """As tarfile gives it: bytes that are not UTF-8 are surrogates."""
    offset: int
    """Byte of its first header block."""
    data: int
    """Byte at which its own bytes begin."""
    size: int
    fault: str = ""
    """Why it cannot be read, in words; "" where it can."""

    @property
    def end(self) -> int:
        """Byte behind its last one."""
        return self.data + self.size


class BrokenHeaderError(Exception):
    """There is no header here, or none that can be used."""


class TarScan:
    """The members of one tar; `faults` is complete once they were all asked for."""

    def __init__(self, read: Read, size: int) -> None:
        self._windows = _Windows(read, size)
        self._size = size
        self._tar = _empty_tar(self._windows)
        self.faults: list[str] = []
        """What is wrong with the tar as a whole, in words: the first few."""
        self.is_tar = False
        """Whether there was anything of a tar: a header, or an end mark at the beginning."""

    def content(self, member: Member) -> bytes:
        """The bytes of a member that lies in the tar."""
        self._windows.seek(member.data)
        return self._windows.read(member.size)

    def __iter__(self) -> Iterator[Member]:
        at, found, ended = 0, False, False
        inside = 0  # the byte from which on a broken header's place is searched: the last member's size may be a lie
        while at < self._size:
            try:
                member, after = self._read_header(at)
            except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the end mark is a block of zeros
                self.is_tar = ended = True
                at = self._find_header(at + BLOCK, LOOK_BEHIND)
                continue
            except BrokenHeaderError as e:
                self._note(f"has {e} at byte {at}")
                look = LOOK if self.is_tar else LOOK_FIRST
                there = self._find_header(inside, look) if inside else at
                at = there if there != at else self._find_header(at + BLOCK, look)
                inside, ended = 0, at >= self._size
                continue
            self.is_tar, ended = True, False
            if member is not None:
                found, inside = True, member.data
                yield member
                if member.fault == ENDS_BEFORE:
                    missing = member.end - self._size
                    self._note(f"ends {missing} bytes before its member {show_name(member.name)!r} does")
                    after, ended = self._find_header(member.data, LOOK), True
            at = after
        if not found:
            self._note("holds no file" if self._size else "is empty")
        elif not ended:
            self._note("ends without an end mark: it may be cut short")

    def _note(self, words: str) -> None:
        if len(self.faults) < _SHOWN:
            self.faults.append(words)

    def _read_header(self, at: int) -> tuple[Member | None, int]:
        """The member whose first header block is here, None for a folder; and where the next one's is."""
        found = parse_header(self._tar, self._windows, at)
        after = self._tar.offset
        data = found.offset_data
        if found.size < 0 or after < data:
            raise BrokenHeaderError("a header with a negative size")
        if found.isdir():
            return None, after
        name, size = found.name, found.size
        if len(name) > LONGEST_NAME:
            raise BrokenHeaderError(f"a name of {len(name)} characters")
        fault = "" if found.isreg() else _NOT_READ.get(found.type, "no plain file")
        if found.issparse():
            fault = "stored as a sparse file; pack it as a plain one"
        if fault:
            return Member(name, found.offset, data, 0, fault), max(after, at + BLOCK)
        fault = ENDS_BEFORE if data + size > self._size else ""
        return Member(name, found.offset, data, size, fault), after

    def _find_header(self, start: int, look: int) -> int:
        """Where the next whole header is, from here on; the tar's size where none is, or not within `look` bytes."""
        start = -(-start // BLOCK) * BLOCK
        end = min(self._size, start + look)
        for at in range(start, end, _STEP):
            self._windows.seek(at)
            data = self._windows.read(min(_STEP + BLOCK, self._size - at), keep=False)
            place = data.find(_MAGIC)
            while place >= 0:
                block = place - _MAGIC_AT
                if block >= 0 and block % BLOCK == 0 and block < _STEP and self._is_header(data[block : block + BLOCK]):
                    return at + block
                place = data.find(_MAGIC, place + 1)
        if end < self._size and look == LOOK:
            self._note(f"has no header in the {look} bytes after byte {start}; what follows was not looked at")
        return self._size

    def _is_header(self, block: bytes) -> bool:
        try:
            tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError):
            return False
        return True


def read_header(block: bytes) -> tuple[str, int]:
    """Name and size of the member whose whole header, long names included, these bytes are.

    BrokenHeaderError where they are none, or hold more or less.
    """
    windows = _Windows(lambda offset, size: block[offset : offset + size], len(block))
    try:
        found = parse_header(_empty_tar(windows), windows, 0)
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
        raise BrokenHeaderError("zeros") from None
    if found.offset_data != len(block) or not found.isreg() or found.issparse():
        raise BrokenHeaderError("another header")
    return found.name, found.size


def parse_header(tar: tarfile.TarFile, windows: _Windows, at: int) -> tarfile.TarInfo:
    """The header here, by tarfile. EOFHeaderError at zeros, BrokenHeaderError where there is none."""
    windows.begin_header(at)
    tar.pax_headers = {}
    try:
        return tarfile.TarInfo.fromtarfile(tar)
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
        raise
    except (tarfile.HeaderError, ValueError, RecursionError, IndexError) as e:  # whatever its fields made tarfile do
        raise BrokenHeaderError("a broken header") from e


def show_name(name: str) -> str:
    """A member's name as tables can hold it: bytes that are not UTF-8 as \\xE9."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _empty_tar(windows: _Windows) -> tarfile.TarFile:
    """A TarFile without members, whose headers are read from `windows` then."""
    tar = tarfile.TarFile(fileobj=io.BytesIO(bytes(2 * BLOCK)), encoding="utf-8", errors="surrogateescape")
    tar.fileobj = windows  # type: ignore[assignment]
    return tar


class _Windows:
    """A tar as a file that reads ahead: a little after a jump, more and more while it is read through."""

    def __init__(self, read: Read, size: int) -> None:
        self._read, self._size = read, size
        self._at = 0
        self._start, self._data = 0, b""
        self._next = FIRST
        self._header, self._reads = 0, 0

    def begin_header(self, at: int) -> None:
        """Go to a byte where a header begins; it may have HEADER bytes."""
        self._at = self._header = at
        self._reads = 0

    def seek(self, at: int) -> None:
        """Go to a byte, which is not a header's."""
        self._at, self._header = at, -1

    def tell(self) -> int:
        """The byte at which the next read begins."""
        return self._at

    def read(self, size: int, *, keep: bool = True) -> bytes:
        """`size` bytes, fewer where the tar ends. Without `keep` the window stays as it is."""
        self._reads += 1
        if self._header >= 0 and (self._reads > READS or not 0 <= self._at + size - self._header <= HEADER):
            raise BrokenHeaderError("a header without end")
        size = max(0, min(size, self._size - self._at))
        if not keep:
            return self._read(self._at, size)
        begin = self._at - self._start
        if not 0 <= begin <= begin + size <= len(self._data):
            here = 0 <= begin <= len(self._data)
            self._next = min(2 * self._next, WINDOW) if here else FIRST
            self._start = self._at
            self._data = self._read(self._at, min(max(size, self._next), self._size - self._at))
            begin = 0
        self._at += size
        return self._data[begin : begin + size]
