"""One task from start to end: fetch → probe → screen → cut → transcode → verify → pack → publish → commit.

A task is idempotent: the same sources, config and tools give the same bytes. Its shards are published first,
its commit record last, so a crash leaves either nothing that counts or all of it. Each source ends in exactly
one place: its clips (clips.py), or one reject row. What is not the video's fault (a full disk, a failing storage) stops the task without a commit.
"""

from __future__ import annotations

import errno
import functools
import json
import shutil
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from reelmae.pipeline.errors import ReelmaeError, StorageError, StorageFullError
from reelmae.pipeline.ingest.clips.make import ClipMaker, Source
from reelmae.pipeline.ingest.clips.outcome import Rejected
from reelmae.pipeline.ingest.clips.probe import Prober
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.ffmpeg import Tool
from reelmae.pipeline.ingest.plan.parts import Part, Plan
from reelmae.pipeline.ingest.plan.sources import fetch, is_manifest
from reelmae.pipeline.ingest.run.scratch import Scratch
from reelmae.pipeline.ingest.sandbox import Sandbox
from reelmae.pipeline.ingest.shards.commits import old_rejects
from reelmae.pipeline.ingest.shards.pack import ClipRow, Packer, Shard
from reelmae.pipeline.schema import CLIP, COMMITS, REJECT, Reason, commit_name, with_columns
from reelmae.pipeline.storage.store import Store

FAILURES = 5  # fetches failing in a row are the storage's fault, not the sources'


class StoppedError(ReelmaeError):
    """The job is being stopped; this task leaves no commit."""


@dataclass(frozen=True)
class Job:
    """What every worker of a job knows.

    `repairs`: the tasks were done before. Rejects of a commit that can be read are taken over (a source that was
    gone stays so, and one that has been mended since belongs to the part that tried it again); a source that gave
    clips and is gone now stops the task.
    """

    dst: str
    plan: Plan
    labels: dict[str, int]
    tool: Tool
    repairs: bool = False

    @property
    def config(self) -> ShardConfig:
        """What is made of the sources."""
        return self.plan.config


def bucket_root(src: str) -> Path | None:
    """A local bucket's real path, out of which no link may lead; None elsewhere."""
    store = Store(src)
    return Path(store.root).resolve() if store.is_local and not is_manifest(src) else None


@dataclass
class Tally:
    """What the workers have done so far, for the progress display. Counts only; guarded by its lock."""

    sources: int = 0
    source_bytes: int = 0
    clips: int = 0
    bytes: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, source_bytes: int, rows: Sequence[ClipRow], bytes_: int, rejected: Rejected | None) -> None:
        """Count one finished source."""
        with self.lock:
            self.sources += 1
            self.source_bytes += source_bytes
            self.clips += len(rows)
            self.bytes += bytes_
            if rejected is not None:
                self.rejected[rejected.reason.value] += 1


class TaskWorker:
    """Runs tasks one after another with one warm probing child. Use as a context, in one thread."""

    def __init__(self, job: Job, sandbox: Sandbox, stopping: threading.Event, tally: Tally) -> None:
        self._job = job
        self._sandbox = sandbox
        self._stopping = stopping
        self._tally = tally
        self._store = Store(job.dst)
        self._scratch = Scratch()
        self._folder = self._scratch.path
        self._prober = Prober(sandbox, self._folder)

    def __enter__(self) -> TaskWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._prober.close()
        self._scratch.close()

    @functools.cached_property
    def _maker(self) -> ClipMaker:
        job = self._job
        return ClipMaker(job.config, job.tool, job.plan.encoder, job.labels, self._sandbox, self._prober)

    def _sources(self, task: int, part: Part) -> list[dict[str, Any]]:
        path = self._folder / Path(part.file).name
        if not path.exists():
            self._store.download(part.file, path)
        with pq.ParquetFile(path) as file:
            return file.read_row_group(task - part.first_task).to_pylist()

    def run(self, task: int) -> int:
        """Run one task to its commit; the number of its sources."""
        folder = self._folder / "task"
        folder.mkdir()
        try:
            part = self._job.plan.part_of(task)
            sources, root = self._sources(task, part), bucket_root(part.src)
            old = old_rejects(self._store, task) if self._job.repairs else {}
            rejects: list[dict[str, Any]] = []
            with Packer(folder, task, self._job.config.shard_bytes) as packer:
                failures = 0
                for source in sources:
                    if source["url"] in old:
                        rejects.append(old[source["url"]])
                        continue
                    failures = self._one(source, root, folder, packer, rejects, failures)
            self._publish(task, packer.shards, packer.rows, rejects)
            return len(sources)
        except OSError as e:
            raise _as_ours(e, folder) from e
        finally:
            shutil.rmtree(folder)

    def _one(
        self,
        source: dict[str, Any],
        root: Path | None,
        folder: Path,
        packer: Packer,
        rejects: list[dict[str, Any]],
        failures: int,
    ) -> int:
        """One source into the packer or the rejects; the number of fetches that failed in a row."""
        if self._stopping.is_set():
            raise StoppedError("stopped")
        work = folder / "source"
        work.mkdir()
        try:
            fetched = self._fetched(source, root, work)
            given = fetched if isinstance(fetched, Rejected) else self._maker.make(fetched, work)
        finally:
            # children killed by a stop look like crashes of the video: such a source must never be recorded
            if self._stopping.is_set():
                shutil.rmtree(work)
                raise StoppedError("stopped")
        size = 0 if isinstance(fetched, Rejected) else fetched.bytes
        if isinstance(given, Rejected):
            rejects.append({"source": source["url"], "reason": given.reason.value, "detail": given.detail})
            self._tally.add(size, (), 0, given)
        else:
            for clip, row in zip(given.clips, given.rows, strict=True):
                packer.add(clip, row)
            rejects += given.dropped
            self._tally.add(size, given.rows, sum(clip.stat().st_size for clip in given.clips), None)
        shutil.rmtree(work)
        if not isinstance(given, Rejected) or given.reason != Reason.FETCH_FAILED:
            return 0
        if self._job.repairs:
            raise StorageError(f"{source['url']}: {given.detail}; its shard cannot be made again without it")
        if given.detail.startswith("gone"):
            return 0
        if failures + 1 >= FAILURES:
            raise StorageError(f"{source['url']}: {FAILURES} sources in a row could not be read ({given.detail})")
        return failures + 1

    def _fetched(self, source: dict[str, Any], root: Path | None, work: Path) -> Source | Rejected:
        config = self._job.config
        over = f"over max_source_bytes={config.max_source_bytes}"
        if source["size"] > config.max_source_bytes:
            return Rejected(Reason.TOO_LARGE, f"{source['size']} bytes, {over}")
        path = work / "in.bin"
        try:
            size = fetch(source["url"], path, root=root)
        except StorageFullError:
            raise
        except FileNotFoundError:
            return Rejected(Reason.FETCH_FAILED, "gone: no such file")
        except StorageError as e:
            return Rejected(Reason.FETCH_FAILED, str(e))
        if size == 0:
            return Rejected(Reason.EMPTY_FILE, "0 bytes")
        if size > config.max_source_bytes:
            return Rejected(Reason.TOO_LARGE, f"{size} bytes, {over}")
        return Source(source["url"], source["label"], source["rows"] or (), path, size)

    def _publish(
        self, task: int, shards: Sequence[Shard], rows: Sequence[ClipRow], rejects: Sequence[dict[str, Any]]
    ) -> None:
        for shard in shards:
            self._store.publish(shard.tar, shard.name)
            self._store.publish(shard.idx, shard.name.removesuffix(".tar") + ".idx")
        sizes = json.dumps({s.name: s.tar.stat().st_size for s in shards}, sort_keys=True)
        records = [{"kind": CLIP, **row.record()} for row in rows] + [{"kind": REJECT, **row} for row in rejects]
        columns = with_columns(COMMITS, self._job.plan.columns)
        table = pa.Table.from_pylist(records, columns).replace_schema_metadata({"shards": sizes})
        commit = self._folder / "commit.parquet"
        pq.write_table(table, commit)
        if self._stopping.is_set():
            raise StoppedError("stopped")
        self._store.publish(commit, commit_name(task))


def _as_ours(error: OSError, folder: Path) -> ReelmaeError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFullError(f"{folder}: no space left for temporary files; free some, or set TMPDIR, and run again")
    return StorageError(f"{folder}: {error}")
