"""Shards byte by byte against the rows of their clips, and their clips decoded."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tarfile
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import IO

import pyarrow as pa

from reelmae.pipeline import schema
from reelmae.pipeline.cores import usable_cores
from reelmae.pipeline.dataset.faults import Fault, Faults, Mend, Row, line_of
from reelmae.pipeline.errors import (
    ChildCrashedError,
    ChildError,
    DatasetError,
    StorageError,
    StorageFullError,
)
from reelmae.pipeline.ingest.clips.probe import Prober
from reelmae.pipeline.ingest.sandbox import Sandbox
from reelmae.pipeline.ingest.shards.pack import dali_index
from reelmae.pipeline.storage.store import Store

BLOCK = tarfile.BLOCKSIZE


class Shards:
    """Tars against the rows of their clips, and their DALI index against them; counts what was looked at."""

    def __init__(self, store: Store, folder: Path, decoders: Decoders | None, faults: Faults) -> None:
        self._store, self._decoders, self._faults = store, decoders, faults
        self._tar = folder / "shard.tar"
        self.count = self.clips = self.bytes = 0

    def check(self, task: int, name: str, rows: list[Row], size: int | None) -> None:
        """One shard: its clips' rows in order, and its bytes as the commit has them."""
        try:
            self._store.download(name, self._tar)
            before = len(self._faults)
            self._check_tar(task, name, rows, size)
            if len(self._faults) == before:
                self._check_idx(name)
        except FileNotFoundError:
            self._faults.add(name, "is missing", Mend.TASK, task)
        except StorageFullError:
            raise
        except StorageError as e:
            self._faults.add(name, f"cannot be read: {line_of(e)}", Mend.NONE)

    def _check_idx(self, name: str) -> None:
        idx = name.removesuffix(".tar") + ".idx"
        try:
            if self._store.read_bytes(idx) != dali_index(self._tar).encode("ascii"):
                self._faults.add(idx, f"is not the index of {name}", Mend.IDX)
        except FileNotFoundError:
            self._faults.add(idx, "is missing", Mend.IDX)

    def _check_tar(self, task: int, name: str, rows: list[Row], size: int | None) -> None:
        there = self._tar.stat().st_size
        self.count += 1
        self.bytes += there
        if size is not None and there != size:
            self._faults.add(name, f"is {there} bytes long, its commit has {size}", Mend.TASK, task)
            return
        end = 0
        with self._tar.open("rb") as file:
            for row in rows:
                self.clips += 1
                try:
                    data = _clip(file, end, row)
                    if self._decoders is not None:
                        self._told(self._decoders.add(task, name, row, data))
                except (DatasetError, tarfile.TarError, ValueError) as e:
                    self._faults.add(name, f"clip {row['key']}: {line_of(e)}", Mend.TASK, task)
                end = _padded(max(0, row["offset"]) + max(0, row["size"]))
            file.seek(end)
            tail = file.read()
        if len(tail) < 2 * BLOCK or tail.strip(b"\0"):
            self._faults.add(name, f"its end, from byte {end}, is not that of a tar", Mend.TASK, task)

    def _told(self, decoded: list[Fault]) -> None:
        self._faults.extend(decoded)

    def drain(self) -> None:
        """Wait for the clips that are still being decoded."""
        if self._decoders is not None:
            self._told(self._decoders.rest())


def _clip(file: IO[bytes], start: int, row: Row) -> bytes:
    """The video of the clip whose members begin at `start`; DatasetError where a byte is not as it must be."""
    text = _member(file, start, f"{row['key']}.json")
    video = _padded(start + BLOCK + len(text))
    if row["offset"] != video + BLOCK:
        raise DatasetError(f"its video is at byte {video + BLOCK}, its row has {row['offset']}")
    data = _member(file, video, f"{row['key']}.mp4")
    if len(data) != row["size"] or hashlib.sha256(data).hexdigest() != row["sha256"]:
        raise DatasetError("its bytes are not those of its row (sha256)")
    found, wanted = json.loads(text), _facts(row)
    if not isinstance(found, dict):
        raise DatasetError("its .json is no JSON object")
    own = found.pop("manifest", {})
    found |= {"manifest": {k: v for k, v in own.items() if v is not None}} if isinstance(own, dict) else {}
    for key in sorted(found.keys() | wanted.keys()):
        if key not in found or key not in wanted or found[key] != wanted[key]:
            raise DatasetError(f"its .json has {key} {found.get(key)!r}, its row {wanted.get(key)!r}")
    return data


def _facts(row: Row) -> Row:
    """What a clip's .json says (see Packer.add), of its row."""
    own = {k: v for k, v in row.items() if k not in schema.CLIPS.names and v is not None}
    same = ("codec", "fps", "frames", "height", "label", "label_id", "source", "width")
    return {k: row[k] for k in same} | {"span_s": [row["span_start_s"], row["span_end_s"]], "manifest": own}


def _member(file: IO[bytes], start: int, name: str) -> bytes:
    """The bytes of the member whose header is at `start`, which must be this one's; the padding must be zero."""
    file.seek(start)
    header = file.read(BLOCK)
    info = tarfile.TarInfo.frombuf(header, "ascii", "strict")
    if info.name != name or info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict") != header:
        raise DatasetError(f"the header at byte {start} is not that of {name}")
    left = os.fstat(file.fileno()).st_size - file.tell()
    data, padding = file.read(min(info.size, left)), file.read(-info.size % BLOCK)
    if len(data) != info.size or padding.strip(b"\0"):
        raise DatasetError(f"{name} is cut short, or not followed by zeros")
    return data


class Decoders:
    """Decodes clips whole on all cores, each with a child of its own. A few clips wait at a time. Use as a context."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sandbox = Sandbox()
        self._cores = usable_cores()
        self._pool = ThreadPoolExecutor(self._cores, thread_name_prefix="verify")
        self._mine = threading.local()
        self._probers: list[Prober] = []
        self._waiting: deque[Future[Fault | None]] = deque()
        self._number = 0

    def add(self, task: int, shard: str, row: Row, data: bytes) -> list[Fault]:
        """Hand over one clip; the faults of those before that are done."""
        self._number += 1
        path = self._folder / f"{self._number}.mp4"
        path.write_bytes(data)
        self._waiting.append(self._pool.submit(self._decode, path, task, shard, row))
        return self._done(3 * self._cores)

    def rest(self) -> list[Fault]:
        """The faults of all that wait."""
        return self._done(0)

    def _done(self, waiting: int) -> list[Fault]:
        found = []
        while len(self._waiting) > waiting:
            fault = self._waiting.popleft().result()
            found += [] if fault is None else [fault]
        return found

    def _decode(self, path: Path, task: int, shard: str, row: Row) -> Fault | None:
        try:
            words = self._compared(path, row)
        except ChildCrashedError:  # perhaps killed by somebody else, out of memory: once more
            words = self._compared(path, row, again=True)
        finally:
            path.unlink()
        return Fault(shard, f"{shard}: clip {row['key']}: {words}", Mend.TASK, task) if words else None

    def _compared(self, path: Path, row: Row, again: bool = False) -> str:
        try:
            clip = self._prober.verify([path], wall_s=120 + row["frames"])[0]
        except ChildCrashedError as e:
            if not again:
                raise
            return f"decoding {e}"
        except ChildError as e:
            return f"decoding {e}"
        return clip.fault(
            frames=row["frames"], fps=Fraction(row["fps"]).limit_denominator(1001), width=row["width"],
            height=row["height"], codec=row["codec"], untagged=row["encoder"] == "copy",
        )  # fmt: skip

    @property
    def _prober(self) -> Prober:
        if not hasattr(self._mine, "prober"):
            self._mine.prober = Prober(self._sandbox, self._folder)
            self._probers.append(self._mine.prober)
        return self._mine.prober

    def __enter__(self) -> Decoders:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._sandbox.kill_all()
        self._pool.shutdown(cancel_futures=True)
        for prober in self._probers:
            prober.close()


def by_shard(clips: pa.Table | None) -> Iterator[tuple[str, list[Row]]]:
    """The rows of each shard, as they come."""
    names = [] if clips is None else clips.column("shard").to_pylist()
    start = 0
    for name, same in itertools.groupby(names):
        end = start + sum(1 for _ in same)
        assert clips is not None
        yield name, clips.slice(start, end - start).to_pylist()
        start = end


def _padded(end: int) -> int:
    return -(-end // BLOCK) * BLOCK
