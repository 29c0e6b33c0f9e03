"""Whole shards of remote datasets on a local disk: bounded, shared by all processes of a node, kept over restarts.

    FOLDER/
      lock                              held for moments, while room is made
      <16 hex of the dataset>_<shard>.shard
      .….shard.part                     a download; its writer holds a lock on it

Properties that hold:
- a file under its final name is complete: it is downloaded as `.part` and then renamed. Readers check each clip in it
  against the index (clip.py), so nothing needs to be synced to disk;
- the files in the folder never have more than `max_bytes` together, with any number of processes, whenever they are
  killed. Before the first byte is downloaded, room is made, and reserved by giving the `.part` its full size;
- shards whose last use is over (`done`) are evicted first, then those not read for the longest time. A process that
  reads a file while it is evicted still gets its bytes;
- one process downloads a shard; others that want it wait;
- nothing but a regular file is opened: a link under a name of ours is refused, since writing would follow it;
- there is no daemon and nothing to clean up. Locks (flock) end with the process that holds them. A `.part` that nobody
  has locked was left by a killed writer: the next process that makes room or wants that shard removes it.

The folder must be on a local disk, and all processes must be of one user.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from reelmae.pipeline.errors import ConfigError, ShortFileError, StorageError, StorageFullError
from reelmae.pipeline.loading.fetch.pieces import Damage, Piece, read_pieces
from reelmae.pipeline.loading.fetch.readers import Readers
from reelmae.pipeline.storage.store import Store

CHUNK = 8 << 20  # bytes of one request: 52 MB/s through 20 ms and 60 MB/s for each connection
PIECES = 4  # requests of one shard at a time, so that a single shard comes with 200 MB/s; 32 MiB of memory
LOOK_S = 0.5  # between two looks whether a shard is still wanted, while its bytes do not come
POLL_S = 0.05  # between two looks at another process' download
DONE_AGE_S = 10 * 365 * 86400.0  # finished shards are back-dated by this, so that they are evicted first
_OURS = re.compile(r"^\.?[0-9a-f]{16}_.*\.shard(\.part)?$")  # nothing else in the folder is counted or removed


@dataclass(frozen=True)
class CacheSettings:
    """The folder of the shards, and how many bytes it may hold, for all processes of the node together."""

    folder: str
    max_bytes: int


@dataclass(frozen=True)
class _File:
    path: Path
    size: int
    used_ns: int

    @property
    def is_part(self) -> bool:
        return self.path.suffix == ".part"


def _always() -> bool:
    return True


def _read(store: Store, shard: str, offset: int, size: int) -> bytes:
    """A piece of a shard; of its bytes only the number is checked. ShortFileError where there are not so many."""
    [data] = read_pieces(store, shard, [Piece(offset, size)])
    if isinstance(data, Damage):
        raise ShortFileError(data.reason)
    return data


class ShardCache:
    """The shards in one folder. Any number of these, in any threads and processes, may share it.

    Raises StorageError where the folder cannot be written, StorageFullError where its disk is full.
    """

    def __init__(self, settings: CacheSettings) -> None:
        self.folder = Path(settings.folder).absolute()
        self.max_bytes = settings.max_bytes
        with self._explain_errors():
            try:
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            except FileNotFoundError as e:  # in /proc, for example
                raise self._storage_error(e) from e
            with self._lock():
                self._remove_abandoned(self._files())

    def read(self, store: Store, shard: str, offset: int, size: int) -> bytes | None:
        """`size` bytes from `offset`, or as many as the file has; None where the shard is not here."""
        with self._explain_errors():
            try:
                fd = os.open(self._path(store, shard), os.O_RDONLY | os.O_NOFOLLOW)
            except FileNotFoundError:
                return None
            try:
                os.utime(fd)
                return os.pread(fd, size, offset)
            finally:
                os.close(fd)

    def bring(self, store: Store, shard: str, wanted: Callable[[], bool] = _always) -> bool:
        """Have the shard here: download it, or wait for the process that does. True once it is.

        `wanted` is called again and again meanwhile; False as soon as it returns False. Raises FileNotFoundError where
        the store has no such shard, ConfigError where it is larger than the cache, StorageError where reading fails.
        """
        path = self._path(store, shard)
        part = path.with_name(f".{path.name}.part")
        while not self._touch(path):
            if not wanted():
                return False
            fd = self._own(part, create=True)
            if fd is None:
                time.sleep(POLL_S)
                continue
            try:
                if self._touch(path) or not self._fill(fd, store, shard, wanted):
                    part.unlink()
                else:
                    with self._explain_errors(), self._lock():  # who makes room must not count it twice
                        part.rename(path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            finally:
                os.close(fd)
        return True

    def done(self, store: Store, shard: str) -> None:
        """Its last use is over for now: it is evicted before all shards that are still needed."""
        then = time.time() - DONE_AGE_S
        with self._explain_errors(), contextlib.suppress(FileNotFoundError):
            os.utime(self._path(store, shard), (then, then))

    def drop(self, store: Store, shard: str) -> None:
        """Remove a shard that turned out to be damaged."""
        with self._explain_errors():
            self._path(store, shard).unlink(missing_ok=True)

    def _path(self, store: Store, shard: str) -> Path:
        dataset = hashlib.sha256(store.url().encode()).hexdigest()[:16]
        return self.folder / f"{dataset}_{quote(shard, safe='')}.shard"

    def _touch(self, path: Path) -> bool:
        """Whether the file is there; marks it as just used."""
        try:
            with self._explain_errors():
                os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def _own(self, part: Path, *, create: bool) -> int | None:
        """Open and lock the file; None where another has it, or it is gone. Only its owner renames or removes it."""
        with self._explain_errors():
            try:
                fd = os.open(part, os.O_RDWR | os.O_NOFOLLOW | (os.O_CREAT if create else 0), 0o600)
            except FileNotFoundError:
                return None
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(fd).st_ino == part.stat().st_ino:  # else it was renamed or removed in between
                    return fd
            except (BlockingIOError, FileNotFoundError):
                pass
            os.close(fd)
            return None

    def _fill(self, fd: int, store: Store, shard: str, wanted: Callable[[], bool]) -> bool:
        """Download into the locked part; False once it is not wanted any more."""
        size = store.size(shard)
        if size > self.max_bytes:
            raise ConfigError(
                f"{store.url(shard)} has {size} bytes, more than the cache in {self.folder} may hold "
                f"({self.max_bytes}); let it hold several such shards, or play without a cache"
            )
        while not self._reserve(fd, size):
            if not wanted():
                return False
            time.sleep(POLL_S)
        readers = Readers(min(PIECES, -(-size // CHUNK)), "reelmae-piece")
        coming: deque[tuple[int, Future[bytes]]] = deque()
        offsets = iter(range(0, size, CHUNK))
        try:
            while True:
                for offset in itertools.islice(offsets, PIECES - len(coming)):
                    coming.append((offset, readers.submit(_read, store, shard, offset, min(CHUNK, size - offset))))
                if not coming:
                    return True
                offset, piece = coming.popleft()
                while not wait([piece], timeout=LOOK_S).done and wanted():
                    pass
                if not wanted():
                    return False
                self._write(fd, piece.result(), offset)
        finally:
            readers.close(wait=False)

    def _write(self, fd: int, data: bytes, offset: int) -> None:
        left = memoryview(data)
        with self._explain_errors():
            while left:
                written = os.pwrite(fd, left, offset)
                left, offset = left[written:], offset + written

    def _reserve(self, fd: int, size: int) -> bool:
        """Reserve `size` bytes for this part, evicting others; False while other downloads take too much room."""
        with self._explain_errors(), self._lock():
            os.ftruncate(fd, 0)  # a killed writer may have left bytes in it
            files = self._remove_abandoned(self._files())
            if sum(f.size for f in files if f.is_part) + size > self.max_bytes:
                return False
            there = sum(f.size for f in files)
            for file in sorted((f for f in files if not f.is_part), key=lambda f: f.used_ns):
                if there + size <= self.max_bytes:
                    break
                file.path.unlink(missing_ok=True)
                there -= file.size
            os.ftruncate(fd, size)
            return True

    def _files(self) -> list[_File]:
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if _OURS.match(entry.name):
                    with contextlib.suppress(FileNotFoundError):
                        stat = entry.stat()
                        found.append(_File(Path(entry.path), stat.st_size, stat.st_mtime_ns))
        return found

    def _remove_abandoned(self, files: list[_File]) -> list[_File]:
        """Remove the parts of writers that have ended; returns the other files."""
        left = []
        for file in files:
            fd = self._own(file.path, create=False) if file.is_part else None
            if fd is None:
                left.append(file)
                continue
            file.path.unlink()
            os.close(fd)
        return left

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Only one process and thread at a time may be inside; never held during a download."""
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_NOFOLLOW | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    @contextlib.contextmanager
    def _explain_errors(self) -> Iterator[None]:
        """Turn errors of the local disk into StorageError with the folder and the remedy; FileNotFoundError passes."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise StorageFullError(
                    f"{self.folder}: no space left for the shard cache, which may hold {self.max_bytes} bytes; "
                    "free some, let it hold less, or choose another folder"
                ) from e
            raise self._storage_error(e) from e

    def _storage_error(self, e: OSError) -> StorageError:
        if e.errno == errno.ELOOP:  # of O_NOFOLLOW
            return StorageError(
                f"{self.folder}: cannot be used as shard cache, since {e.filename} is a link, and writing would follow "
                "it; remove it, or choose another folder"
            )
        return StorageError(
            f"{self.folder}: cannot be used as shard cache ({e}); check the rights, or choose another folder"
        )
