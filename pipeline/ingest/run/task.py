"""One task from start to end. Each source: fetch → probe → screen → spans → transcode → cut → verify → score → pack.
Then the whole task: publish the shards → publish the commit. Scores are screened too, after encoding (clips/make.py).

A task is idempotent: the same sources, config and tools give the same bytes. Its shards are published first,
its commit record last, so a crash leaves either nothing that counts or all of it. Each source ends in exactly
one place: its clips (clips/make.py), or one reject row. What is not the video's fault (a full disk, a failing
storage) stops the task without a commit: only what is gone, or can never be a source, is rejected as FETCH_FAILED.

A source that looks damaged is fetched again before it is judged, where the store has no checksum to hold its bytes
against: the network may have done it.

Before its shards and before its commit the worker looks whether the job still holds its claim on the dataset, and a
commit is only created, never overwritten: where another job has written it, equal bytes are fine and others an error.

A worker is made from a JobSpec alone, on any machine: it finds that machine's ffmpeg and makes its own temporary
folder. What it reports, a TaskReport, is counts. Both can be pickled.
"""

from __future__ import annotations

import copy
import errno
import functools
import hashlib
import json
import shutil
import socket
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from reelmae.pipeline.errors import ClaimedError, JobMismatchError, ReelmaeError, StorageError, StorageFullError
from reelmae.pipeline.ingest.clips.make import ClipMaker, SourceClips
from reelmae.pipeline.ingest.clips.outcome import Rejected
from reelmae.pipeline.ingest.clips.probe import Prober
from reelmae.pipeline.ingest.clips.source import Source
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.ffmpeg import find_ffmpeg
from reelmae.pipeline.ingest.plan import parts
from reelmae.pipeline.ingest.plan.source_files import download_sources
from reelmae.pipeline.ingest.run.read import SourceReader
from reelmae.pipeline.ingest.sandbox import Sandbox
from reelmae.pipeline.ingest.shards.commits import read_rejects
from reelmae.pipeline.ingest.shards.pack import ClipRow, PackedShard, Packer
from reelmae.pipeline.ingest.tars.webdataset_child import TarChild
from reelmae.pipeline.runners.runner import Watch
from reelmae.pipeline.schema import CLIP, LABELS, REJECT, Reason, commit_columns, commit_name
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.checked import read_agreed
from reelmae.pipeline.storage.claim import refuse_others
from reelmae.pipeline.storage.scratch import Scratch
from reelmae.pipeline.storage.store import Store

READS = 3  # of a source that looks damaged each time
BEGINS = 5  # workers that may die over a source, on a cluster, before it is rejected
WORK = "work-"  # kind of a worker's folder of temporary files
DAMAGE = frozenset(
    {
        Reason.EMPTY_FILE,
        Reason.NOT_A_VIDEO,
        Reason.UNREADABLE,
        Reason.NO_VIDEO_STREAM,
        Reason.ENCRYPTED,
        Reason.UNSUPPORTED_CODEC,
        Reason.UNSUPPORTED_COLOUR,
        Reason.NO_FRAMES,
        Reason.TOO_FEW_FRAMES,
        Reason.TOO_LONG,
        Reason.TOO_SMALL,
        Reason.BAD_TIMESTAMPS,
        Reason.DECODE_ERRORS,
        Reason.TRUNCATED,
        Reason.TIMEOUT,
        Reason.CRASHED,
        Reason.VERIFY_FAILED,
    }
)
"""Reasons that wrong bytes can bring about."""


class StoppedError(ReelmaeError):
    """The job is being stopped; this task leaves no commit."""


@dataclass(frozen=True)
class JobSpec:
    """All that a worker is made from. It is small, can be pickled, and names nothing of the machine it was made on."""

    dst: str
    """URL of the dataset."""
    plan: parts.Plan
    labels: Mapping[str, int]
    """label → id, as in labels.json."""
    repairs: bool = False
    """The tasks were done before. A repair keeps the rejects of a commit that can be read: a source that was gone
    stays rejected, and one that was fixed since belongs to the part that tried it again. A source that gave clips and
    is gone now stops the task."""
    src_access: Access = field(default_factory=Access)
    """How the sources are reached."""
    dst_access: Access = field(default_factory=Access)
    """How the dataset is reached."""
    holders: tuple[str, ...] = ()
    """Ids of this job in the claim on the dataset; empty: the claim is not looked at."""
    reelmae: str = field(default_factory=lambda: version("reelmae"))
    """The version of ours that runs the job; no other one runs a task of it."""

    @classmethod
    def of(
        cls,
        store: Store,
        plan: parts.Plan,
        *,
        repairs: bool = False,
        src_access: Access | None = None,
        holders: tuple[str, ...] = (),
    ) -> JobSpec:
        """The spec of a plan at its dataset, with the labels that are there. The dataset is reached as `store` is."""
        labels = json.loads(read_agreed(store, LABELS)) if store.exists(LABELS) else {}
        return cls(store.url(), plan, labels, repairs, src_access or Access(), store.access, holders)

    @property
    def config(self) -> ShardConfig:
        """The config of the job."""
        return self.plan.config


@dataclass(frozen=True)
class TaskReport:
    """What a task has done: all of it where the task has ended, else as far as it is."""

    task: int
    sources: int = 0
    """Sources that ended among the clips or the rejects."""
    source_bytes: int = 0
    """Bytes of the sources that were read."""
    clips: int = 0
    bytes: int = 0
    """Bytes of the clips."""
    rejected: Mapping[str, int] = field(default_factory=dict)
    """reason → sources that were rejected as a whole."""
    retries: Mapping[str, int] = field(default_factory=dict)
    """cause → requests to the stores that were tried again."""

    def __add__(self, other: TaskReport) -> TaskReport:
        """The sums of both, under the first one's task."""
        return TaskReport(
            self.task,
            self.sources + other.sources,
            self.source_bytes + other.source_bytes,
            self.clips + other.clips,
            self.bytes + other.bytes,
            dict(Counter(self.rejected) + Counter(other.rejected)),
            dict(Counter(self.retries) + Counter(other.retries)),
        )


@dataclass
class _Work:
    """A task under way."""

    reader: SourceReader
    folder: Path
    packer: Packer
    report: TaskReport
    """What is done so far."""
    rejects: list[dict[str, Any]] = field(default_factory=list)

    def reject(self, row: dict[str, Any], source_bytes: int = 0) -> None:
        """End a source as this reject row."""
        self.rejects.append(row)
        self.report += TaskReport(self.report.task, 1, source_bytes, rejected={row["reason"]: 1})

    def keep(self, source_bytes: int, clips: SourceClips) -> None:
        """End a source as these clips."""
        size = sum(clip.stat().st_size for clip in clips.clips)
        for clip, row in zip(clips.clips, clips.rows, strict=True):
            self.packer.add(clip, row)
        self.rejects += clips.dropped
        self.report += TaskReport(self.report.task, 1, source_bytes, len(clips.rows), size)


class TaskWorker:
    """Runs tasks one after another with one warm probing child. Use as a context, in one thread.

    Only `stop` may be called from other threads.
    """

    def __init__(self, spec: JobSpec) -> None:
        self._spec = spec
        self._sandbox = Sandbox()
        self._stopping = threading.Event()
        # copies: this worker's own counts of retries, and only its own waiting is ended by `stop`
        self._src_access, self._dst_access = copy.copy(spec.src_access), copy.copy(spec.dst_access)
        self._store = Store(spec.dst, self._dst_access)
        self._scratch = Scratch(WORK)
        self._folder = self._scratch.path
        self._prober = Prober(self._sandbox, self._folder)
        self._tars = TarChild(self._sandbox, self._folder)

    def __enter__(self) -> TaskWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._prober.close()
        self._tars.close()
        self._scratch.close()

    def stop(self) -> None:
        """Kill the worker's children and end its waiting for stores.

        This `run` and every later one ends soon with an error and no commit.
        """
        self._stopping.set()
        self._src_access.stop()
        self._dst_access.stop()
        self._sandbox.kill_all()

    def run(self, task: int, watch: Watch[TaskReport] | None = None) -> TaskReport:
        """Run one task to its commit. `watch` is told of each source before it and after it, in this thread.

        JobMismatchError, before any work, where this machine's ffmpeg is not the one of the task's plan.
        """
        self._refuse_other_tools(task)
        folder, before = self._folder / "task", self._retries()
        folder.mkdir()

        def report() -> TaskReport:
            return replace(work.report, retries=dict(self._retries() - before))

        try:
            part = self._spec.plan.part_of(task)
            sources = self._read_sources(task, part)
            kept = read_rejects(self._store, task, self._spec.plan.format) if self._spec.repairs else {}
            with Packer(folder, task, self._spec.config.shard_bytes, self._spec.plan.format, self._tars) as packer:
                reader = SourceReader(
                    part.src,
                    [source for source in sources if source["url"] not in kept],
                    self._tars,
                    folder / "members",
                    self._src_access,
                    limit=self._spec.config.max_source_bytes,
                    repairs=self._spec.repairs,
                )
                work = _Work(reader, folder, packer, TaskReport(task))
                for source in sources:
                    begun = 1 if watch is None else watch.begin(source["url"])
                    if source["url"] in kept:
                        work.reject(kept[source["url"]])
                    elif begun > BEGINS:
                        work.reject(_reject_row(source, Rejected(Reason.CRASHED, f"{begun - 1} workers died over it")))
                    else:
                        self._run_source(source, work)
                    if watch is not None:
                        watch.report(report())
            self._publish(task, packer.shards, packer.rows, work.rejects)
            return report()
        except OSError as e:
            raise _storage_error(e, folder) from e
        finally:
            shutil.rmtree(folder)

    def _retries(self) -> Counter[str]:
        return Counter(self._src_access.retries.counts()) + Counter(self._dst_access.retries.counts())

    def _refuse_other_tools(self, task: int) -> None:
        differences = parts.tool_differences(self._spec.plan, find_ffmpeg(), {task})
        if (here := version("reelmae")) != self._spec.reelmae:
            differences.append(f"reelmae: {self._spec.reelmae} at the driver, {here} here")
        if differences:
            raise JobMismatchError(
                f"{self._spec.dst}: task {task} cannot be run on this machine ({socket.gethostname()}), its clips would not be the same; "
                f"{'; '.join(differences)}"
            )

    @functools.cached_property
    def _maker(self) -> ClipMaker:
        spec = self._spec
        return ClipMaker(spec.config, find_ffmpeg(), spec.plan.encoder, dict(spec.labels), self._sandbox, self._prober)

    def _read_sources(self, task: int, part: parts.PlanPart) -> list[dict[str, Any]]:
        path = self._folder / Path(part.file).name
        if not path.exists():
            download_sources(self._store, part.file, path)
        with pq.ParquetFile(path) as file:
            return file.read_row_group(task - part.first_task).to_pylist()

    def _run_source(self, source: dict[str, Any], work: _Work) -> None:
        """One source into the packer or the rejects."""
        if self._stopping.is_set():
            raise StoppedError("stopped")
        folder = work.folder / "source"
        folder.mkdir()
        try:
            size, outcome = self._judge(source, work, folder)
        finally:
            # children killed by a stop look like crashes of the video: such a source must never be recorded
            if self._stopping.is_set():
                shutil.rmtree(folder)
                raise StoppedError("stopped")
        if isinstance(outcome, Rejected):
            work.reject(_reject_row(source, outcome), size)
        else:
            work.keep(size, outcome)
        shutil.rmtree(folder)

    def _judge(self, source: dict[str, Any], work: _Work, folder: Path) -> tuple[int, SourceClips | Rejected]:
        """The source's size in bytes as it was read (0 where it was not), and its clips or why there are none."""
        judged: dict[str, Rejected] = {}  # sha256 of its bytes → what they are
        while True:
            here = folder / f"read{len(judged)}"
            here.mkdir()
            found = work.reader.read(source, here, again=bool(judged))
            if isinstance(found, Rejected):
                return 0, found
            fetched, is_checked = found
            mark = _digest(fetched.path) if judged else ""
            if mark in judged:
                return fetched.bytes, judged[mark]
            if judged:
                self._src_access.retries.add("checksum")
            outcome = _reject_empty(fetched) or self._maker.make(fetched, here)
            if is_checked or not isinstance(outcome, Rejected) or outcome.reason not in DAMAGE:
                return fetched.bytes, outcome
            judged[mark or _digest(fetched.path)] = outcome
            if len(judged) == READS:
                return fetched.bytes, outcome
            shutil.rmtree(here)

    def _publish(
        self, task: int, shards: Sequence[PackedShard], rows: Sequence[ClipRow], rejects: Sequence[dict[str, Any]]
    ) -> None:
        refuse_others(self._store, self._spec.holders)
        for shard in shards:
            self._store.publish(shard.tar, shard.name)
            self._store.publish(shard.idx, shard.name.removesuffix(".tar") + ".idx")
        sizes = json.dumps({s.name: s.tar.stat().st_size for s in shards}, sort_keys=True)
        records = [{"kind": CLIP, **row.record()} for row in rows] + [{"kind": REJECT, **row} for row in rejects]
        columns = commit_columns(self._spec.plan.format, self._spec.plan.columns)
        table = pa.Table.from_pylist(records, columns).replace_schema_metadata({"shards": sizes})
        commit = self._folder / "commit.parquet"
        pq.write_table(table, commit)
        if self._stopping.is_set():
            raise StoppedError("stopped")
        refuse_others(self._store, self._spec.holders)
        self._publish_commit(commit, commit_name(task, self._spec.plan.format))

    def _publish_commit(self, commit: Path, name: str) -> None:
        """A repair replaces the record; else it must be new, or have the same bytes."""
        if self._spec.repairs:
            self._store.publish(commit, name)
        elif not self._store.publish(commit, name, create=True) and self._store.read_bytes(name) != commit.read_bytes():
            raise ClaimedError(
                f"{self._store.url(name)}: another job has written it meanwhile, with other rows; this job stops. "
                "Let one job end, then run reelmae verify"
            )


def _reject_row(source: dict[str, Any], why: Rejected) -> dict[str, Any]:
    return {"source": source["url"], "reason": why.reason.value, "detail": why.detail}


def _reject_empty(source: Source) -> Rejected | None:
    return None if source.bytes else Rejected(Reason.EMPTY_FILE, "0 bytes")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _storage_error(error: OSError, folder: Path) -> ReelmaeError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFullError(f"{folder}: no space left for temporary files; free some, or set TMPDIR, and run again")
    return StorageError(f"{folder}: {error}")
