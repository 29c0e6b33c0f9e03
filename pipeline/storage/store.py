"""A folder of files anywhere fsspec reaches: list, read, ranged read, whole download, atomic publish.

Properties that hold:
- `publish` leaves the whole file under its final name, or nothing, and has held what is there against what was sent;
- `download` and `read_bytes` are held against the size that the store tells, and against its checksum or MD5 where it
  has one. Ranges of a file have no checksum: who reads them must know what they should be;
- whatever may pass is tried again until the patience ends (retry.py), each retry is counted in `access.retries`, and a
  request never takes longer than its deadline;
- a missing file raises FileNotFoundError at once, a missing bucket InputError, wrong keys, missing rights and the end of
  patience StorageError, each with the URL and its own words (causes.py).

What differs between local disks, S3 and the file systems of fsspec is in local.py, s3.py and remote.py, behind
files.Files.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from reelmae.pipeline.errors import InputError, ShortFileError, StorageError
from reelmae.pipeline.storage.access import Access, interruptible
from reelmae.pipeline.storage.causes import WrongBytesError, find_cause
from reelmae.pipeline.storage.checks import Content, ContentCheck
from reelmae.pipeline.storage.files import Entry, Files
from reelmae.pipeline.storage.local import LocalFiles, whole_file
from reelmae.pipeline.storage.remote import FsspecFiles, web_options
from reelmae.pipeline.storage.retry import Outage, retry
from reelmae.pipeline.storage.s3 import S3Files
from reelmae.pipeline.storage.s3_client import CONFIG
from reelmae.pipeline.storage.scratch import scratch_folder

__all__ = ["Entry", "Store", "require_folder", "whole_file"]

PIECE = 16 << 20  # bytes of one ranged read
STREAMS = 8  # ranged reads of one call at a time
MAX_GAP = 256 << 10  # bytes that are read for nothing to save a request
_PROTOCOL = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]*)://")
T = TypeVar("T")


class Store:
    """The files under one root: a local folder, or any fsspec URL (`s3://bucket/prefix`, `memory://x`, …)."""

    def __init__(self, url: str, access: Access | None = None) -> None:
        self.access = access or Access()
        match = _PROTOCOL.match(url)
        self.is_local = match is None or match.group(1) == "file"
        if match is None or self.is_local:
            path = Path(url.removeprefix("file://"))
            # sources are named by their path, so a place must have one path; `..` must follow links as the system does
            self.root = str(path.resolve() if ".." in path.parts else path.absolute())
            self.prefix = ""
            self._files: Files = LocalFiles()
            self._outage = Outage()
            return
        self.prefix, protocol = match.group(0), match.group(1)
        fs = _file_system(url, protocol, self.access)
        self.root = fs._strip_protocol(url).rstrip("/")
        if _PROTOCOL.match(self.root):  # http keeps its protocol in paths
            self.prefix = ""
        if not self.root:
            raise InputError(f"{url}: names no bucket; write {match.group(0)}BUCKET/PREFIX")
        self._files = S3Files(fs, self.root) if hasattr(fs, "get_s3") else FsspecFiles(fs)
        self._outage = self.access.outage(f"{protocol}://{self.root.split('/')[0]}")

    def __reduce__(self) -> tuple[type[Store], tuple[str, Access]]:
        """Pickle by what it was made from."""
        return type(self), (self.url(), self.access)

    def __repr__(self) -> str:
        return f"Store({self.url()!r})"

    def url(self, path: str = "") -> str:
        """Full URL of a file here; a plain absolute path where the store is local."""
        return f"{self.prefix}{self.full_path(path)}"

    def local_path(self, path: str = "") -> Path:
        """The file's own path; only for local stores."""
        assert self.is_local, f"{self.url()} is not local"
        return Path(self.root, path)

    def full_path(self, path: str = "") -> str:
        """The path of a file as its file system knows it."""
        return f"{self.root}/{path}" if path else self.root

    def list(self, path: str = "") -> Iterator[Entry]:
        """Every file below `path`, one by one, so that memory stays flat; nothing where there is no such folder.

        Sorted within each folder; on S3 sorted by the whole key, as the server does it.
        """
        skip = len(self.root.rstrip("/")) + 1
        for found in self._files.list(self.full_path(path), partial(self._attempt, path)):
            relative = found.full[skip:]
            yield Entry(relative, self.url(relative), found.size, found.etag)

    def exists(self, path: str = "") -> bool:
        """Whether there is such a file or folder; never from a cached listing."""
        return self._retry(path, lambda n: self._files.exists(self.full_path(path), n))

    def size(self, path: str) -> int:
        """Bytes of one file, never from a cached listing; FileNotFoundError where there is none."""
        size = self.look(path).size
        if size < 0:
            raise StorageError(f"{self.url(path)}: its server does not report its size; read it without a cache")
        return size

    def look(self, path: str) -> Content:
        """What the store says of a file now: size, ETag, checksum. FileNotFoundError where there is none."""
        return self._retry(path, lambda n: self._files.look(self.full_path(path), n))

    def read_bytes(self, path: str) -> bytes:
        """The whole file, held against what the store says of it."""
        if self.is_local:
            return self._retry(path, lambda n: Path(self.full_path(path)).read_bytes())

        def read(number: int) -> bytes:
            if not self._files.reads_ranges:
                return self._read_by_copy(path, number)
            start, content = self._files.read_start(self.full_path(path), PIECE, number)
            if content.size < 0:
                return self._read_by_copy(path, number)
            data = b"".join([start, *self._pieces_of(path, content, len(start))])
            check = ContentCheck(content)
            check.update(data)
            _refuse(check.fault())
            return data

        return self._retry(path, read)

    def _pieces_of(self, path: str, content: Content, begin: int = 0) -> Iterator[bytes | memoryview]:
        """The bytes of a file from `begin` on."""
        pieces = [(at, min(PIECE, content.size - at)) for at in range(begin, content.size, PIECE)]
        try:
            yield from self._read_pieces(path, pieces)
        except ShortFileError as e:  # it has become shorter, or the answer was cut
            raise WrongBytesError(str(e)) from e

    def _read_by_copy(self, path: str, number: int) -> bytes:
        with scratch_folder() as folder:
            local = Path(folder, "data")
            self._files.copy_out(self.full_path(path), local, number)
            return local.read_bytes()

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; ShortFileError where the file is shorter."""
        data = self._read_piece(path, offset, size)
        return data if isinstance(data, bytes) else bytes(data)

    def _read_piece(self, path: str, offset: int, size: int) -> bytes | memoryview:
        data = self._retry(path, lambda n: self._files.read(self.full_path(path), offset, size, n))
        if len(data) != size:
            raise ShortFileError(
                f"{self.url(path)}: wanted {size} bytes at {offset}, got {len(data)}; the file is damaged"
            )
        return data

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes]:
        """The bytes of each (offset, size) of one file, as `read_range`.

        Near ones are read by one request, long ones by several, STREAMS at a time.
        """
        order = sorted(range(len(ranges)), key=lambda i: ranges[i])
        merged: list[list[int]] = []  # begin, end
        for i in order:
            begin, end = ranges[i][0], sum(ranges[i])
            near = merged and begin <= merged[-1][1] + MAX_GAP and end - merged[-1][0] <= PIECE
            if near or (merged and begin < merged[-1][1]):  # overlapping ones are always joined
                merged[-1][1] = max(end, merged[-1][1])
            else:
                merged.append([begin, end])
        pieces = [
            (at, min(PIECE, end - at)) for begin, end in merged for at in range(begin, max(end, begin + 1), PIECE)
        ]
        data = list(self._read_pieces(path, pieces))
        begins = [begin for begin, _ in pieces]
        return [_cut(begins, data, offset, size) for offset, size in ranges]

    def copy_range(self, path: str, offset: int, size: int, to: Path) -> None:
        """Copy `size` bytes from `offset` to a local path, several pieces at a time; ShortFileError as `read_range`."""
        pieces = [(at, min(PIECE, offset + size - at)) for at in range(offset, offset + size, PIECE)]
        with to.open("wb") as file:
            for data in self._read_pieces(path, pieces):
                file.write(data)

    def _read_pieces(self, path: str, pieces: Sequence[tuple[int, int]]) -> Iterator[bytes | memoryview]:
        """The bytes of each piece, in order, read by several threads, not much further than the consumer is."""
        if self.is_local or len(pieces) < 2:
            yield from (self._read_piece(path, offset, size) for offset, size in pieces)
            return
        with ThreadPoolExecutor(min(STREAMS, len(pieces)), thread_name_prefix="reelmae-read") as pool:
            waiting = [pool.submit(self._read_piece, path, *piece) for piece in pieces[:STREAMS]]
            try:
                for piece in [*pieces[STREAMS:], *[None] * len(waiting)]:
                    with interruptible(pool):
                        data = waiting.pop(0).result()
                    if piece is not None:
                        waiting.append(pool.submit(self._read_piece, path, *piece))
                    yield data
            finally:
                for future in waiting:
                    future.cancel()

    def download(self, path: str, to: Path) -> Content:
        """Copy the file to a local path, held against what the store says of it, which is returned."""

        def fetch(number: int) -> Content:
            full = self.full_path(path)
            if self.is_local:
                self._files.copy_out(full, to, number)
                return Content(to.stat().st_size)
            content = self._files.look(full, number)
            check = ContentCheck(content)
            with to.open("wb") as file:
                if content.size >= 0 and self._files.reads_ranges:
                    for data in self._pieces_of(path, content):
                        file.write(data)
                        check.update(data)
                    _refuse(check.fault())
                    return content
            self._files.copy_out(full, to, number)
            size = to.stat().st_size
            _refuse(f"{size} bytes came, {content.size} are there" if content.size not in (-1, size) else "")
            return Content(size, content.etag)

        return self._retry(path, fetch)

    @cached_property
    def creates_exclusively(self) -> bool:
        """Whether `create` surely refuses a name that is taken, found out once by trying; else it looks before."""
        return self._files.creates_exclusively(self.full_path(), partial(self._attempt, ""))

    def create(self, data: bytes, path: str) -> bool:
        """Write these bytes to a file that is not there yet; False, and nothing written, where there is one."""
        with scratch_folder() as folder:
            local = Path(folder, "data")
            local.write_bytes(data)
            return self.publish(local, path, create=True)

    def publish(self, local: Path, path: str, *, create: bool = False) -> bool:
        """Copy a complete local file to its final name, atomically.

        With `create`, False and nothing written where there is such a file already.
        """
        full = self.full_path(path)
        if create and not self.is_local and self.exists(path):
            return False  # servers that ignore the condition
        return self._files.write(local, full, partial(self._attempt, path), create=create)

    def publish_bytes(self, data: bytes, path: str) -> None:
        """Write these bytes to a file, atomically."""
        with scratch_folder() as folder:
            local = Path(folder, "data")
            local.write_bytes(data)
            self.publish(local, path)

    def remove(self, path: str) -> None:
        """Remove one file; FileNotFoundError where there is none."""
        if not self.exists(path):  # object stores raise nothing for a missing file
            raise FileNotFoundError(self.url(path))
        self._retry(path, lambda n: self._files.remove(self.full_path(path), n))

    def sweep(self, *folders: str) -> int:
        """Remove what killed writers left in these folders: temporary files, uploads in parts; how many there were."""
        return sum(self._files.sweep(self.full_path(folder), partial(self._attempt, folder)) for folder in folders)

    def describe(self) -> dict[str, Any]:
        """Facts for people about where this is: kind, and for S3 endpoint and region. Never a secret."""
        return self._attempt("", lambda _: self._files.describe())

    def _retry(self, path: str, call: Callable[[int], T]) -> T:
        """Of a call that reads one file: where that is missing, it is looked for a second time."""
        gone = None if self.is_local else partial(self._is_gone, path)
        return retry(call, url=self.url(path), access=self.access, outage=self._outage, is_gone=gone)

    def _attempt(self, path: str, call: Callable[[int], T]) -> T:
        return retry(call, url=self.url(path), access=self.access, outage=self._outage)

    def _is_gone(self, path: str) -> bool:
        try:
            self._files.look(self.full_path(path), 0)
        except FileNotFoundError:
            return True
        except Exception as e:
            if find_cause(e) is None:
                raise
        return False


def _file_system(url: str, protocol: str, access: Access) -> Any:
    """The fsspec file system. Of S3 and the web, its client tries once and gives up in time: retries are ours."""
    options = dict(access.options)
    try:
        if protocol in ("s3", "s3a"):
            options["config_kwargs"] = CONFIG | dict(options.get("config_kwargs") or {})
        elif protocol in ("http", "https"):
            options = web_options(options)
        return fsspec.filesystem(protocol, **options)
    except (ImportError, ValueError, OSError) as e:
        if access.options:  # the text may hold them
            raise InputError(
                f"{url}: no filesystem for '{protocol}://' with these options ({type(e).__name__})"
            ) from None
        raise InputError(f"{url}: no filesystem for '{protocol}://' ({e}); install its fsspec package") from e
    except TypeError as e:
        raise InputError(f"{url}: its storage options {sorted(access.options)} do not fit '{protocol}://'") from e


def _refuse(fault: str) -> None:
    if fault:
        raise WrongBytesError(fault)


def _cut(begins: Sequence[int], data: Sequence[bytes | memoryview], offset: int, size: int) -> bytes:
    """The bytes of a range out of sorted pieces that cover it: where each begins, and what it holds."""
    at, end = max(0, bisect_right(begins, offset) - 1), offset + size
    if begins[at] == offset and len(data[at]) == size:
        return bytes(data[at])
    found = []
    while offset < end and at < len(begins):
        part = memoryview(data[at])[offset - begins[at] : end - begins[at]]
        found.append(part)
        offset += len(part)
        at += 1
    return b"".join(found)


def require_folder(url: str, access: Access | None = None) -> Store:
    """The store at `url`; InputError where nothing is there."""
    store = Store(url, access)
    if not store.exists():
        raise InputError(f"{url}: no such folder or bucket; check the path")
    if store.is_local and not Path(store.root).is_dir():
        raise InputError(f"{url}: is a file; give the folder that holds the videos")
    return store
