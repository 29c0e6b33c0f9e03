"""What `bench storage` compares: readers and writers of whole files. The loader's fetching is in fetching.py.

A contender has made one request when it is made, so that imports, clients and the first connection are not timed (see
run_contender.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import fsspec.asyn
import obstore
from obstore.store import S3Store

from reelmae.pipeline.errors import ReelmaeError
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.store import Store

PIECE = 16 << 20  # bytes of one ranged read


@dataclass(frozen=True)
class Target:
    """A bucket as each client takes it."""

    bucket: str
    endpoint: str
    region: str
    key: str = field(repr=False)
    secret: str = field(repr=False)
    token: str | None = field(repr=False)


@dataclass(frozen=True)
class File:
    """A file of `bench storage`: here, and below the job's URL."""

    local: Path
    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Job:
    """One run of one contender. `url` is a dataset whose shards are `files`; what is written goes below `written`."""

    name: str
    url: str
    target: Target
    access: Access
    files: tuple[File, ...]
    written: str
    """Path below `url`."""
    folder: Path
    """Empty, for what is downloaded."""
    threads: int
    fetch_threads: int | None

    def key(self, path: str) -> str:
        """The object's key within the bucket."""
        return f"{self.url.removeprefix('s3://').partition('/')[2]}/{path}"


class Contender(ABC):
    """Makes its client, and one request, when it is made."""

    def __init__(self, job: Job) -> None:
        self.job = job

    @abstractmethod
    def run(self) -> int:
        """What is timed; returns the number of bytes moved."""

    @abstractmethod
    def check(self) -> None:
        """Hold what was moved against its sha256; ReelmaeError where it differs."""


def s3_options(target: Target) -> dict[str, Any]:
    """Keyword arguments of s3fs."""
    return {
        "key": target.key,
        "secret": target.secret,
        "token": target.token,
        "endpoint_url": target.endpoint,
        "client_kwargs": {"region_name": target.region},
    }


def obstore_of(target: Target) -> S3Store:
    """The bucket as obstore's store."""
    return S3Store(
        target.bucket,
        endpoint=target.endpoint,
        region=target.region,
        access_key_id=target.key,
        secret_access_key=target.secret,
        client_options={"allow_http": target.endpoint.startswith("http://")},
        **({"session_token": target.token} if target.token else {}),
    )


def _pieces(size: int) -> list[tuple[int, int]]:
    """(offset, size) of each ranged read of a file."""
    return [(offset, min(PIECE, size - offset)) for offset in range(0, size, PIECE)]


def check_bytes(file: File, pieces: Iterator[Any], whose: str) -> None:
    """Hold a file's bytes, piece by piece, against its sha256."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    if digest.hexdigest() != file.sha256:
        raise ReelmaeError(f"{whose} gave other bytes of {file.path} than were written: sha256 {digest.hexdigest()}")


class _PieceReader(Contender):
    """Ranged reads of PIECE bytes, `threads` at a time. Bytes are dropped once they are here; `check` reads again."""

    @abstractmethod
    def read(self, file: File, offset: int, size: int) -> Any:
        """The bytes of one range."""

    def run(self) -> int:
        todo = [(file, *piece) for file in self.job.files for piece in _pieces(file.size)]
        with ThreadPoolExecutor(self.job.threads) as pool:
            return sum(pool.map(lambda piece: len(self.read(*piece)), todo))

    def check(self) -> None:
        with ThreadPoolExecutor(self.job.threads) as pool:
            for file in self.job.files:
                check_bytes(file, pool.map(lambda p, f=file: self.read(f, *p), _pieces(file.size)), self.job.name)


class ObstoreRanges(_PieceReader):
    """obstore's get_range. The baseline of reading."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._store = obstore_of(job.target)
        obstore.head(self._store, job.key(job.files[0].path))

    def read(self, file: File, offset: int, size: int) -> Any:
        return obstore.get_range(self._store, self.job.key(file.path), start=offset, length=size)


class OurRange(_PieceReader):
    """Store.read_range."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._store = Store(job.url, job.access)
        self._store.size(job.files[0].path)

    def read(self, file: File, offset: int, size: int) -> bytes:
        return self._store.read_range(file.path, offset, size)


class OurRanges(Contender):
    """Store.read_ranges: as many pieces in one call as obstore reads side by side."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._store = Store(job.url, job.access)
        self._store.size(job.files[0].path)

    def _read(self, file: File) -> Iterator[bytes]:
        pieces, n = _pieces(file.size), self.job.threads
        for first in range(0, len(pieces), n):
            yield from self._store.read_ranges(file.path, pieces[first : first + n])

    def run(self) -> int:
        return sum(len(data) for file in self.job.files for data in self._read(file))

    def check(self) -> None:
        for file in self.job.files:
            check_bytes(file, self._read(file), self.job.name)


class _Files(Contender):
    """Files that end on the local disk."""

    @abstractmethod
    def bring(self, file: File, to: Path) -> None:
        """Have the file's bytes in `to`."""

    def _local(self, number: int) -> Path:
        return self.job.folder / str(number)

    def run(self) -> int:
        for number, file in enumerate(self.job.files):
            self.bring(file, self._local(number))
        return sum(self._local(number).stat().st_size for number in range(len(self.job.files)))

    def check(self) -> None:
        for number, file in enumerate(self.job.files):
            with self._local(number).open("rb") as data:
                check_bytes(file, iter(partial(data.read, PIECE), b""), self.job.name)


class ObstoreFile(_Files):
    """obstore's get_range, each thread writing its pieces to their place in a file. The baseline of downloads."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._store = obstore_of(job.target)
        obstore.head(self._store, job.key(job.files[0].path))

    def bring(self, file: File, to: Path) -> None:
        key = self.job.key(file.path)
        with to.open("wb") as out, ThreadPoolExecutor(self.job.threads) as pool:

            def copy(piece: tuple[int, int]) -> None:
                offset, size = piece
                os.pwrite(out.fileno(), obstore.get_range(self._store, key, start=offset, length=size), offset)

            list(pool.map(copy, _pieces(file.size)))


class OurDownload(_Files):
    """Store.download, to a file."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._store = Store(job.url, job.access)
        self._store.size(job.files[0].path)

    def bring(self, file: File, to: Path) -> None:
        self._store.download(file.path, to)


class S3fsWhole(Contender):
    """s3fs' cat_file: a whole file in one request."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._fs = fsspec.filesystem("s3", **s3_options(job.target))
        self._fs.info(self._name(job.files[0]))

    def _name(self, file: File) -> str:
        return f"{self.job.target.bucket}/{self.job.key(file.path)}"

    def run(self) -> int:
        return sum(len(self._fs.cat_file(self._name(file))) for file in self.job.files)

    def check(self) -> None:
        for file in self.job.files:
            check_bytes(file, iter([self._fs.cat_file(self._name(file))]), self.job.name)


class _Writer(Contender):
    """Uploads of local files, one after the other; `check` reads them with obstore, and removes them."""

    @abstractmethod
    def write(self, local: Path, path: str) -> None:
        """Have the local file under this path below the job's URL."""

    def _path(self, number: int) -> str:
        return f"{self.job.written}/{number}"

    def run(self) -> int:
        for number, file in enumerate(self.job.files):
            self.write(file.local, self._path(number))
        return sum(file.size for file in self.job.files)

    def check(self) -> None:
        store = obstore_of(self.job.target)
        for number, file in enumerate(self.job.files):
            key = self.job.key(self._path(number))
            check_bytes(file, iter(obstore.get(store, key)), self.job.name)
            obstore.delete(store, key)


class Boto3Upload(_Writer):
    """boto3's upload_file with its default TransferConfig. The baseline of writing."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._client = importlib.import_module("boto3").client(
            "s3",
            endpoint_url=job.target.endpoint,
            region_name=job.target.region,
            aws_access_key_id=job.target.key,
            aws_secret_access_key=job.target.secret,
            aws_session_token=job.target.token,
        )
        self._client.head_object(Bucket=job.target.bucket, Key=job.key(job.files[0].path))

    def write(self, local: Path, path: str) -> None:
        self._client.upload_file(str(local), self.job.target.bucket, self.job.key(path))


class OurPublish(_Writer):
    """Store.publish."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._store = Store(job.url, job.access)
        self._store.size(job.files[0].path)

    def write(self, local: Path, path: str) -> None:
        self._store.publish(local, path)


class ObstorePut(_Writer):
    """obstore's put of a path."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._store = obstore_of(job.target)
        obstore.head(self._store, job.key(job.files[0].path))

    def write(self, local: Path, path: str) -> None:
        obstore.put(self._store, self.job.key(path), local)


# the first of each group is what the others are compared with, but for these
BASELINES = {"reelmae download": "obstore to a file"}
READ = {
    "obstore get_range": ObstoreRanges,
    "reelmae read_range": OurRange,
    "reelmae read_ranges": OurRanges,
    "obstore to a file": ObstoreFile,
    "reelmae download": OurDownload,
    "s3fs cat_file": S3fsWhole,
}
WRITE = {"boto3 upload_file": Boto3Upload, "reelmae publish": OurPublish, "obstore put": ObstorePut}


def missing() -> dict[str, str]:
    """Contender → why it cannot run here, and the remedy."""
    if importlib.util.find_spec("boto3") is None:
        return {"boto3 upload_file": "boto3 is not installed; install reelmae[bench]"}
    return {}


def versions() -> dict[str, str]:
    """Versions of the clients, as far as they are installed."""
    found = {}
    for name in ("obstore", "s3fs", "boto3", "s3transfer", "botocore", "awscrt"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
