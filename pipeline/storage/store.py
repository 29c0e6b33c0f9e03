"""A folder of files anywhere fsspec reaches: list, read, ranged read, atomic publish, retry.

Properties that hold:
- `publish` leaves the whole file under its final name, or nothing: locally through `whole_file` (temporary name,
  fsync, rename); on object stores through one `put`, which is atomic there. The file is always complete on local
  disk first, because an exception inside `fs.open(..., "wb")` of s3fs would commit the part that was written.
- A missing file raises InputError or FileNotFoundError at once. Any other failure is tried again (`RETRIES` times,
  with doubling pauses), then it raises StorageError with the URL.
- Ranges of S3 objects are read by obstore, at the endpoint and with the credentials that s3fs found. Everything
  else, and every range that obstore refuses, is read by fsspec; errors are always those of fsspec.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from reelmae.pipeline.errors import InputError, ShortFileError, StorageError, StorageFullError
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.s3_ranges import S3Ranges

RETRIES = 3
FIRST_PAUSE_S = 0.5
S3_PAGE = 1000  # keys in one answer, the most that a server gives
_PROTOCOL = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]*)://")
_FINAL = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
T = TypeVar("T")


@contextmanager
def whole_file(final: Path, *, writer: str = "") -> Iterator[Path]:
    """A temporary path beside `final` to write to, so that a file under its final name is always complete.

    When the block ends, the file takes the final name; when the block raises, it is removed. A missing folder is
    made. The next writer overwrites what a killed writer left. Where several may write the same file at once, each
    needs its own `writer` name.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}{writer}.part")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(final)
    except OSError as e:
        e.filename = e.filename or str(final)  # the error of a failing write has no file name
        raise
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class Entry:
    """One listed file. `path` is relative to the store's root, with forward slashes."""

    path: str
    url: str
    size: int
    etag: str


class Store:
    """The files under one root: a local folder, or any fsspec URL (`s3://bucket/prefix`, `memory://x`, …)."""

    def __init__(self, url: str, access: Access | None = None) -> None:
        self.access = access or Access()
        match = _PROTOCOL.match(url)
        self.is_local = match is None or match.group(1) == "file"
        if self.is_local:
            path = Path(url.removeprefix("file://"))
            # sources are named by their path, so a place must have one path; `..` must follow links as the system does
            self.root = str(path.resolve() if ".." in path.parts else path.absolute())
            self.prefix = ""
            self.fs = fsspec.filesystem("file")
        else:
            assert match is not None
            self.prefix = match.group(0)
            try:
                self.fs = fsspec.filesystem(match.group(1), **self.access.options)
            except (ImportError, ValueError) as e:
                raise InputError(
                    f"{url}: no filesystem for '{match.group(1)}://' ({e}); install its fsspec package"
                ) from e
            self.root = self.fs._strip_protocol(url).rstrip("/")
            if _PROTOCOL.match(self.root):  # http keeps its protocol in paths
                self.prefix = ""
            if not self.root:
                raise InputError(f"{url}: names no bucket; write {match.group(0)}BUCKET/PREFIX")

    def __reduce__(self) -> tuple[type[Store], tuple[str, Access]]:
        """Pickle by what it was made from."""
        return type(self), (self.url(), self.access)

    def __repr__(self) -> str:
        return f"Store({self.url()!r})"

    def url(self, path: str = "") -> str:
        """Full URL of a file here; a plain absolute path where the store is local."""
        return f"{self.prefix}{self._full_path(path)}"

    def local_path(self, path: str = "") -> Path:
        """The file's own path; only for local stores."""
        assert self.is_local, f"{self.url()} is not local"
        return Path(self.root, path)

    def _full_path(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root

    def list(self, path: str = "") -> Iterator[Entry]:
        """Every file below `path`, one by one, so that memory stays flat; nothing where there is no such folder.

        Sorted within each folder; on S3 sorted by the whole key, as the server does it. An empty S3 object whose key
        ends in "/" marks a folder and is not a file.
        """
        if self.is_local:
            return self._list_local(path)
        return self._list_s3(path) if hasattr(self.fs, "call_s3") else self._list_folders(path)

    def _list_s3(self, path: str) -> Iterator[Entry]:
        """Page by page; s3fs' own `find` would hold a dict of all keys."""
        bucket, prefix, _ = self.fs.split_path(self._full_path(path))
        prefix = f"{prefix}/" if prefix else ""  # the slash keeps `raw2` out of a listing of `raw`
        wanted = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": S3_PAGE}
        skip = len(self.root) - len(bucket)
        while True:
            page = self._s3_page(wanted, path)
            for found in page.get("Contents", ()):
                key, size = found["Key"], int(found.get("Size") or 0)
                if key.endswith("/") and not size:
                    continue
                relative = key[skip:]
                etag = found.get("ETag") or found.get("LastModified") or ""
                yield Entry(relative, self.url(relative), size, str(etag).strip('"'))
            if not page.get("IsTruncated"):
                return
            wanted["ContinuationToken"] = page["NextContinuationToken"]

    def _s3_page(self, wanted: dict[str, Any], path: str) -> dict[str, Any]:
        try:
            return self._retry(lambda: self.fs.call_s3("list_objects_v2", **wanted), path)
        except FileNotFoundError:
            if "ContinuationToken" in wanted:  # it vanished during the listing: not the same as an empty folder
                raise
            return {}

    def _list_folders(self, path: str) -> Iterator[Entry]:
        """Folder by folder. A listed name that is not below its folder is left out."""
        waiting = [self._full_path(path)]
        while waiting:
            folder = waiting.pop()
            try:
                found = self._retry(partial(self.fs.ls, folder, detail=True, refresh=True), path)
            except (FileNotFoundError, NotADirectoryError):
                continue
            self.fs.invalidate_cache()  # else a filesystem that caches listings keeps them all
            below = sorted(
                ((info["name"].rstrip("/"), info) for info in found if info["name"].startswith(f"{folder}/")),
                key=lambda named: named[0],
            )
            folders = [full for full, info in below if info.get("type") == "directory" and full != folder]
            waiting += reversed(folders)
            for full, info in below:
                if info.get("type") == "directory":
                    continue
                relative = full[len(self.root) + 1 :]
                etag = info.get("ETag") or info.get("etag") or info.get("LastModified") or info.get("mtime") or ""
                yield Entry(relative, self.url(relative), int(info.get("size") or 0), str(etag).strip('"'))

    def _list_local(self, path: str) -> Iterator[Entry]:
        def raise_unreadable(error: OSError) -> None:
            raise StorageError(f"{error.filename}: {error.strerror}; check the rights") from error

        skip = len(self.root.rstrip("/")) + 1
        for folder, folders, names in os.walk(
            self._full_path(path), onerror=raise_unreadable if Path(self._full_path(path)).exists() else None
        ):
            folders.sort()
            # links to folders are listed but not followed, so that they end among the rejects
            for name in sorted([*names, *(f for f in folders if Path(folder, f).is_symlink())]):
                full = f"{folder.rstrip('/')}/{name}"
                try:
                    stat = os.stat(full)  # noqa: PTH116 - a Path for each of a million files takes most of the time
                except OSError:  # a dangling or circular link: listed, so that it ends among the rejects
                    yield Entry(full[skip:], full, 0, "")
                    continue
                yield Entry(full[skip:], full, stat.st_size, str(stat.st_mtime_ns))

    def exists(self, path: str = "") -> bool:
        """Whether there is such a file or folder; never from a cached listing."""
        if self.is_local:
            return Path(self._full_path(path)).exists()
        self.fs.invalidate_cache()
        return bool(self._retry(lambda: self.fs.exists(self._full_path(path)), path))

    def size(self, path: str) -> int:
        """Bytes of one file, never from a cached listing; FileNotFoundError where there is none."""
        if self.is_local:
            return self._retry(lambda: Path(self._full_path(path)).stat().st_size, path)
        self.fs.invalidate_cache()
        found = self._retry(lambda: self.fs.size(self._full_path(path)), path)
        if found is None:
            raise StorageError(f"{self.url(path)}: its server does not report its size; read it without a cache")
        return int(found)

    def read_bytes(self, path: str) -> bytes:
        """The whole file."""
        if self.is_local:
            return self._retry(lambda: Path(self._full_path(path)).read_bytes(), path)
        return self._retry(lambda: self.fs.cat_file(self._full_path(path)), path)

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; ShortFileError where the file is shorter."""

        def read() -> bytes:
            if self.is_local:
                with Path(self._full_path(path)).open("rb") as f:
                    return os.pread(f.fileno(), size, offset)
            try:
                if self._s3_ranges is not None:
                    return self._s3_ranges.read(self._full_path(path), offset, size)
                return bytes(self.fs.cat_file(self._full_path(path), start=offset, end=offset + size))
            except FileNotFoundError:
                raise
            except OSError:  # object stores refuse a range that begins at or beyond the end
                self.fs.invalidate_cache()
                there = self.fs.size(self._full_path(path))
                if there is None or there > offset:
                    raise
                return b""

        data = self._retry(read, path)
        if len(data) != size:
            raise ShortFileError(
                f"{self.url(path)}: wanted {size} bytes at {offset}, got {len(data)}; the file is damaged"
            )
        return data

    @cached_property
    def _s3_ranges(self) -> S3Ranges | None:
        return S3Ranges(self.fs, self.root) if hasattr(self.fs, "call_s3") else None

    def download(self, path: str, to: Path) -> None:
        """Copy the file to a local path."""
        self._retry(lambda: self.fs.get_file(self._full_path(path), str(to)), path)

    @cached_property
    def creates_exclusively(self) -> bool:
        """Whether `create` refuses a name that is taken, found out once by trying; else it only looks before."""
        return self.is_local

    def create(self, data: bytes, path: str) -> bool:
        """Write these bytes to a file that is not there yet; False, and nothing written, where there is one."""
        if self.exists(path):
            return False
        self.publish_bytes(data, path)
        return True

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each (offset, size) of one file; near ones are read by one request, several at a time."""
        return [self.read_range(path, offset, size) for offset, size in ranges]

    def publish(self, local: Path, path: str) -> None:
        """Copy a complete local file to its final name, atomically."""
        if not self.is_local:
            self._retry(lambda: self.fs.put_file(str(local), self._full_path(path)), path)
            return
        self._retry(lambda: _copy(local, Path(self._full_path(path))), path)

    def publish_bytes(self, data: bytes, path: str) -> None:
        """Write these bytes to a file, atomically."""
        with tempfile.TemporaryDirectory(prefix="reelmae-") as folder:
            local = Path(folder, "data")
            local.write_bytes(data)
            self.publish(local, path)

    def remove(self, path: str) -> None:
        """Remove one file; FileNotFoundError where there is none."""
        if self.is_local:
            self._retry(lambda: Path(self._full_path(path)).unlink(), path)
            return
        if not self.exists(path):  # object stores raise nothing for a missing file
            raise FileNotFoundError(self.url(path))
        self._retry(lambda: self.fs.rm_file(self._full_path(path)), path)

    def sweep(self, *folders: str) -> None:
        """Remove the temporary files of killed writers from these folders of a local store; others have none."""
        if self.is_local:
            for folder in folders:
                for left in Path(self._full_path(folder)).glob(".*.part"):
                    left.unlink(missing_ok=True)

    def _retry(self, call: Callable[[], T], path: str) -> T:
        for attempt in range(RETRIES):
            try:
                return call()
            except _FINAL as e:
                if isinstance(e, PermissionError):
                    raise StorageError(
                        f"{self.url(path)}: permission denied; check the rights or the credentials"
                    ) from e
                raise
            except OSError as e:
                if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    remedy = "free some, or choose another place, and run again (it resumes)"
                    raise StorageFullError(f"{self.url(path)}: no space left; {remedy}") from e
                if attempt == RETRIES - 1:
                    raise StorageError(f"{self.url(path)}: {e} (tried {RETRIES} times)") from e
                time.sleep(FIRST_PAUSE_S * 2**attempt)
            except Exception as e:
                # botocore and others raise their own kinds when credentials or endpoints are wrong
                if type(e).__module__.startswith(("botocore", "aiobotocore", "aiohttp", "urllib3", "gcsfs", "google")):
                    raise StorageError(
                        f"{self.url(path)}: {e}; check the URL, the credentials and AWS_ENDPOINT_URL"
                    ) from e
                raise
        raise AssertionError("unreachable")


def _copy(local: Path, final: Path) -> None:
    with whole_file(final, writer=f".{os.getpid()}.{time.monotonic_ns()}") as temporary:
        shutil.copyfile(local, temporary)


def require_folder(url: str, access: Access | None = None) -> Store:
    """The store at `url`; InputError where nothing is there."""
    store = Store(url, access)
    if not store.exists():
        raise InputError(f"{url}: no such folder or bucket; check the path")
    if store.is_local and not Path(store.root).is_dir():
        raise InputError(f"{url}: is a file; give the folder that holds the videos")
    return store
