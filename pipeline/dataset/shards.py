"""Shards are compared byte by byte with the rows of their clips; a deep check also decodes the clips."""

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
from reelmae.pipeline.dataset.faults import Fault, FaultList, Mend, first_line
from reelmae.pipeline.dataset.tables import Row
from reelmae.pipeline.errors import ChildCrashedError, ChildError, DatasetError, StorageError, StorageFullError
from reelmae.pipeline.ingest.clips.probe import Prober
from reelmae.pipeline.ingest.sandbox import Sandbox, try_again
from reelmae.pipeline.ingest.shards.pack import dali_index
from reelmae.pipeline.storage.checked import read_checked
from reelmae.pipeline.storage.store import Store

BLOCK = tarfile.BLOCKSIZE


class ShardCheck:
    """Compares tars with the rows of their clips, and DALI indexes with their tars; counts what it has read."""

    def __init__(self, store: Store, folder: Path, format: int, decoders: Decoders | None, faults: FaultList) -> None:
        self._store, self._format, self._decoders, self._faults = store, format, decoders, faults
        self._tar = folder / "shard.tar"
        self._decoded: set[str] = set()  # keys of the shard under way that were given to the decoders
        self.undecodable = FaultList()
        """Faults that only decoding found, in the order of the clips. They come later than the others: see `drain`."""
        self.count = self.clips = self.bytes = 0

    def check(self, task: int, name: str, rows: list[Row], size: int | None) -> None:
        """Check one shard: `rows` are its clips in order, `size` its bytes by the commit (None: there is no commit)."""
        try:
            self._check_shard(task, name, rows, size)
        except StorageFullError:
            raise
        except StorageError as e:
            add_unreadable(self._faults, self._store, name, e)

    def _check_shard(self, task: int, name: str, rows: list[Row], size: int | None) -> None:
        def download() -> Path:
            self._store.download(name, self._tar)
            return self._tar

        self._decoded.clear()
        try:
            read_checked(
                self._store, download, lambda tar: self._check_tar(tar, task, name, rows, size), (_WrongError,)
            )
        except FileNotFoundError:
            self._faults.add(name, "is missing", Mend.TASK, task)
            return
        except _WrongError as e:
            for words in e.faults:
                self._faults.add(name, words, Mend.TASK, task)
        else:
            self._check_idx(name)
        found = self._tar.stat().st_size
        self.count += 1
        self.bytes += found
        self.clips += len(rows) if size in (None, found) else 0

    def _check_idx(self, name: str) -> None:
        idx = name.removesuffix(".tar") + ".idx"
        wanted = dali_index(self._tar).encode("ascii")

        def check(data: bytes) -> None:
            if data != wanted:
                raise _WrongError([f"is not the index of {name}"])

        try:
            read_checked(self._store, lambda: self._store.read_bytes(idx), check, (_WrongError,))
        except FileNotFoundError:
            self._faults.add(idx, "is missing", Mend.IDX)
        except _WrongError as e:
            self._faults.add(idx, e.faults[0], Mend.IDX)

    def _check_tar(self, tar: Path, task: int, name: str, rows: list[Row], size: int | None) -> None:
        """_WrongError where a byte is not as the rows have it."""
        tar_bytes = tar.stat().st_size
        if size is not None and tar_bytes != size:
            raise _WrongError([f"is {tar_bytes} bytes long, its commit has {size}"])
        found: list[str] = []
        end = 0
        with tar.open("rb") as file:
            for row in rows:
                try:
                    data = _read_clip(file, end, row, self._format)
                    self._decode(task, name, row, data)
                except (DatasetError, tarfile.TarError, ValueError) as e:
                    found.append(f"clip {row['key']}: {first_line(e)}")
                end = _pad(max(0, row["offset"]) + max(0, row["size"]))
            file.seek(end)
            tail = file.read()
        if len(tail) < 2 * BLOCK or tail.strip(b"\0"):
            found.append(f"from byte {end} on it does not end as a tar does")
        if found:
            raise _WrongError(found)

    def _decode(self, task: int, name: str, row: Row, data: bytes) -> None:
        """Have a clip decoded, once, however often its shard is read."""
        if self._decoders is not None and row["key"] not in self._decoded:
            self._decoded.add(row["key"])
            self.undecodable.extend(self._decoders.add(task, name, row, data))

    def drain(self) -> None:
        """Wait for the clips that are still being decoded."""
        if self._decoders is not None:
            self.undecodable.extend(self._decoders.wait())


def add_unreadable(faults: FaultList, store: Store, name: str, error: StorageError) -> None:
    """Add the fault that a file cannot be read; StorageError where its store does not answer at all."""
    store.exists(schema.DATASET_JSON)
    faults.add(name, f"cannot be read: {first_line(error)}", Mend.NONE)


class _WrongError(DatasetError):
    """A file is not what it should be; `faults` say why, each in words."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("; ".join(faults))
        self.faults = faults


def _read_clip(file: IO[bytes], start: int, row: Row, format: int) -> bytes:
    """The video of the clip whose members begin at `start`; DatasetError where a byte differs from the row."""
    text = _read_member(file, start, f"{row['key']}.json")
    video = _pad(start + BLOCK + len(text))
    if row["offset"] != video + BLOCK:
        raise DatasetError(f"its video is at byte {video + BLOCK}, its row has {row['offset']}")
    data = _read_member(file, video, f"{row['key']}.mp4")
    if len(data) != row["size"] or hashlib.sha256(data).hexdigest() != row["sha256"]:
        raise DatasetError("its bytes are not those of its row (sha256)")
    if format > 1 and row["blocks"] != schema.clip_blocks(data):
        raise DatasetError("the blocks of its row are not those of its bytes")
    found, wanted = json.loads(text), _clip_json(row, format)
    if not isinstance(found, dict):
        raise DatasetError("its .json is not a JSON object")
    own = found.pop("manifest", {})
    found |= {"manifest": {k: v for k, v in own.items() if v is not None}} if isinstance(own, dict) else {}
    for key in sorted(found.keys() | wanted.keys()):
        if key not in found or key not in wanted or found[key] != wanted[key]:
            raise DatasetError(f"its .json has {key} {found.get(key)!r}, its row {wanted.get(key)!r}")
    return data


def _clip_json(row: Row, format: int) -> Row:
    """What the clip's .json must hold, by its row (Packer.add writes it)."""
    ours = schema.clip_columns(format).names
    own = {k: v for k, v in row.items() if k not in ours and v is not None}
    same = ("codec", "fps", "frames", "height", "label", "label_id", "source", "width")
    return {k: row[k] for k in same} | {"span_s": [row["span_start_s"], row["span_end_s"]], "manifest": own}


def _read_member(file: IO[bytes], start: int, name: str) -> bytes:
    """The bytes of the member `name`, whose header must be at `start` and whose padding must be zero."""
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
    """Decodes clips in full, one child process for each core (None: all cores). Few clips wait. A context manager."""

    def __init__(self, folder: Path, cores: int | None = None) -> None:
        self._folder = folder
        self._sandbox = Sandbox()
        self._cores = cores or usable_cores()
        self._pool = ThreadPoolExecutor(self._cores, thread_name_prefix="verify")
        self._mine = threading.local()
        self._probers: list[Prober] = []
        self._waiting: deque[Future[Fault | None]] = deque()
        self._number = 0

    def add(self, task: int, shard: str, row: Row, data: bytes) -> list[Fault]:
        """Decode one more clip. Returns faults of clips that were added before."""
        self._number += 1
        path = self._folder / f"{self._number}.mp4"
        try:
            path.write_bytes(data)
        except OSError as e:
            raise StorageFullError(
                f"{path}: cannot be written ({e}); free some space, or set TMPDIR, and run again"
            ) from e
        self._waiting.append(self._pool.submit(self._decode, path, task, shard, row))
        return self._collect(3 * self._cores)

    def wait(self) -> list[Fault]:
        """Wait for all clips. Returns their faults."""
        return self._collect(0)

    def stop(self) -> None:
        """Kill all children; what is being decoded counts as damaged. Any thread may call it."""
        self._sandbox.kill_all()

    def _collect(self, waiting: int) -> list[Fault]:
        """The faults of the oldest clips, until only `waiting` clips are left."""
        found = []
        while len(self._waiting) > waiting:
            fault = self._waiting.popleft().result()
            found += [] if fault is None else [fault]
        return found

    def _decode(self, path: Path, task: int, shard: str, row: Row) -> Fault | None:
        try:
            words = self._compare(path, row)
        except ChildCrashedError:  # it may be the machine's fault: try once more
            words = self._compare(path, row, again=True)
        finally:
            path.unlink()
        return Fault(shard, f"{shard}: clip {row['key']}: {words}", Mend.TASK, task) if words else None

    def _compare(self, path: Path, row: Row, again: bool = False) -> str:
        """What differs between the decoded clip and its row; "" where nothing does.

        A child that somebody else kills says nothing about its clip: another one is asked.
        """
        try:
            clip = try_again(lambda: self._prober.verify([path], wall_s=120 + row["frames"])[0])
        except ChildCrashedError as e:
            if not again:
                raise
            return f"decoding {e}"
        except ChildError as e:
            return f"decoding {e}"
        return clip.fault(
            frames=row["frames"],
            fps=Fraction(row["fps"]).limit_denominator(1001),
            width=row["width"],
            height=row["height"],
            codec=row["codec"],
            untagged=row["encoder"] == "copy",
        )

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
            self.stop()
        self._pool.shutdown(cancel_futures=True)
        for prober in self._probers:
            prober.close()


def by_shard(clips: pa.Table | None) -> Iterator[tuple[str, list[Row]]]:
    """Each shard's name and its rows, in the order of the table."""
    names = [] if clips is None else clips.column("shard").to_pylist()
    start = 0
    for name, same in itertools.groupby(names):
        end = start + sum(1 for _ in same)
        assert clips is not None
        yield name, clips.slice(start, end - start).to_pylist()
        start = end


def _pad(end: int) -> int:
    """`end` rounded up to whole blocks of a tar."""
    return -(-end // BLOCK) * BLOCK
