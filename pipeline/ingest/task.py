"""One task from start to end: fetch → probe → screen → cut → transcode → verify → pack → publish → commit.

A task is idempotent: the same sources, config and tools give the same bytes. Its shards are published first,
its commit record last, so a crash leaves either nothing that counts or all of it. Each source ends in exactly
one place: its clips, or one reject row. Where one clip of a source is not what was asked, all of the source is
rejected. What is not the video's fault (a full disk, a failing storage) stops the task without a commit.
"""

from __future__ import annotations

import errno
import functools
import json
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from reelmae.pipeline.errors import (
    ChildCrashedError,
    ChildTimeoutError,
    ReelmaeError,
    StorageError,
    StorageFullError,
)
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.cut import cut
from reelmae.pipeline.ingest.pack import ClipRow, Packer, Shard
from reelmae.pipeline.ingest.probe import Prober, VerifiedClip
from reelmae.pipeline.ingest.sandbox import Sandbox
from reelmae.pipeline.ingest.screen import Kept, Rejected, screen
from reelmae.pipeline.ingest.sources import fetch
from reelmae.pipeline.ingest.transcode import ENOUGH, Tool, transcode
from reelmae.pipeline.schema import CLIP, COMMITS, PLAN_SOURCES, REJECT, Reason, clip_key, commit_name
from reelmae.pipeline.storage import Store

PROBE_S = 120.0  # wall clock of a probe
FAILURES = 5  # fetches failing in a row are the storage's fault, not the sources'


class StoppedError(ReelmaeError):
    """The job is being stopped; this task leaves no commit."""


@dataclass(frozen=True)
class Job:
    """What every worker of a job knows. `root`: the local bucket's real path, out of which no link may lead."""

    dst: str
    root: Path | None
    config: ShardConfig
    labels: dict[str, int]
    tool: Tool


@dataclass
class Tally:
    """What the workers have done so far, for the progress display. Counts only; guarded by its lock."""

    sources: int = 0
    clips: int = 0
    bytes: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, rows: Sequence[ClipRow], bytes_: int, rejected: Rejected | None) -> None:
        """Count one finished source."""
        with self.lock:
            self.sources += 1
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
        self._folder = Path(tempfile.mkdtemp(prefix="reelmae-")).resolve()
        self._prober = Prober(sandbox, self._folder)

    def __enter__(self) -> TaskWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._prober.close()
        shutil.rmtree(self._folder)

    @functools.cached_property
    def _plan(self) -> pq.ParquetFile:
        path = self._folder / "sources.parquet"
        self._store.download(PLAN_SOURCES, path)
        return pq.ParquetFile(path)

    def run(self, task: int) -> int:
        """Run one task to its commit; the number of its sources."""
        folder = self._folder / "task"
        folder.mkdir()
        try:
            sources = self._plan.read_row_group(task).to_pylist()
            rejects: list[dict[str, Any]] = []
            with Packer(folder, task, self._job.config.shard_bytes) as packer:
                failures = 0
                for source in sources:
                    failures = self._one(source, folder, packer, rejects, failures)
            self._publish(task, packer.shards, packer.rows, rejects)
            return len(sources)
        except OSError as e:
            raise _as_ours(e, folder) from e
        finally:
            shutil.rmtree(folder)

    def _one(
        self,
        source: dict[str, Any],
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
            given = self._fetched(source, work) or self._clips(source, work)
        finally:
            # children killed by a stop look like crashes of the video: such a source must never be recorded
            if self._stopping.is_set():
                shutil.rmtree(work)
                raise StoppedError("stopped")
        if isinstance(given, Rejected):
            rejects.append({"source": source["url"], "reason": given.reason.value, "detail": given.detail})
            self._tally.add((), 0, given)
        else:
            clips, rows, dropped = given
            for clip, row in zip(clips, rows, strict=True):
                packer.add(clip, row)
            rejects += dropped
            self._tally.add(rows, sum(clip.stat().st_size for clip in clips), None)
        shutil.rmtree(work)
        if (
            not isinstance(given, Rejected)
            or given.reason != Reason.FETCH_FAILED
            or given.detail.startswith("gone")
        ):
            return 0
        if failures + 1 >= FAILURES:
            raise StorageError(
                f"{source['url']}: {FAILURES} sources in a row could not be read ({given.detail})"
            )
        return failures + 1

    def _fetched(self, source: dict[str, Any], work: Path) -> Rejected | None:
        config = self._job.config
        if source["size"] > config.max_source_bytes:
            return Rejected(
                Reason.TOO_LARGE, f"{source['size']} bytes, over max_source_bytes={config.max_source_bytes}"
            )
        try:
            size = fetch(source["url"], work / "in.bin", root=self._job.root)
        except StorageFullError:
            raise
        except FileNotFoundError:
            return Rejected(Reason.FETCH_FAILED, "gone: no such file")
        except StorageError as e:
            return Rejected(Reason.FETCH_FAILED, str(e))
        if size == 0:
            return Rejected(Reason.EMPTY_FILE, "0 bytes")
        if size > config.max_source_bytes:
            return Rejected(
                Reason.TOO_LARGE, f"{size} bytes, over max_source_bytes={config.max_source_bytes}"
            )
        return None

    def _clips(
        self, source: dict[str, Any], work: Path
    ) -> Rejected | tuple[list[Path], list[ClipRow], list[dict[str, Any]]]:
        """Clips of a fetched source with their rows, and reject rows of spans too short to keep."""
        config, path, out = self._job.config, work / "in.bin", work / "clips"
        try:
            probe = self._prober.probe(path, max_pixels=config.max_pixels, wall_s=PROBE_S)
            if isinstance(probe, tuple):
                return Rejected(*probe)
            kept = screen(probe, config)
            if isinstance(kept, Rejected):
                return kept
            spans = cut(kept.frames, kept.fps, config.clip_seconds)
            out.mkdir()
            clips = transcode(self._sandbox, self._job.tool, path, out, probe, kept, spans, config)
            if isinstance(clips, Rejected):
                return clips
            verified = self._prober.verify(clips, wall_s=PROBE_S + 5 * probe.duration_s)
        except ChildTimeoutError as e:
            return Rejected(Reason.TIMEOUT, f"decoding {e}")
        except ChildCrashedError as e:
            return Rejected(Reason.CRASHED, f"decoding {e}")
        fault = _fault(verified, spans, kept, config)
        if fault is not None:
            return fault
        return self._rows(source, clips, verified, kept)

    def _rows(
        self, source: dict[str, Any], clips: list[Path], verified: list[VerifiedClip], kept: Kept
    ) -> tuple[list[Path], list[ClipRow], list[dict[str, Any]]]:
        rows: list[ClipRow] = []
        dropped: list[dict[str, Any]] = []
        start = 0
        for ordinal, clip in enumerate(verified):
            span = {
                "span_start_s": _seconds(start, kept.fps),
                "span_end_s": _seconds(start + clip.frames, kept.fps),
            }
            start += clip.frames
            if (
                clip.frames < self._job.config.min_frames
            ):  # only the last: the decoder gave less than promised
                detail = f"{clip.frames} frames, under min_frames={self._job.config.min_frames}"
                reason = Reason.TOO_FEW_FRAMES.value
                dropped.append({"source": source["url"], **span, "reason": reason, "detail": detail})
                continue
            label = source["label"]
            rows.append(
                ClipRow(
                    key=clip_key(source["url"], ordinal), shard="", offset=0, size=0, sha256="", source=source["url"],
                    **span, frames=clip.frames, fps=float(kept.fps), width=kept.width, height=kept.height,
                    codec=clip.codec, label=label, label_id=-1 if label is None else self._job.labels[label],
                )
            )  # fmt: skip
        return clips[: len(rows)], rows, dropped

    def _publish(
        self, task: int, shards: Sequence[Shard], rows: Sequence[ClipRow], rejects: Sequence[dict[str, Any]]
    ) -> None:
        for shard in shards:
            self._store.publish(shard.tar, shard.name)
            self._store.publish(shard.idx, shard.name.removesuffix(".tar") + ".idx")
        sizes = json.dumps({s.name: s.tar.stat().st_size for s in shards}, sort_keys=True)
        records = [{"kind": CLIP, **asdict(row)} for row in rows] + [
            {"kind": REJECT, **row} for row in rejects
        ]
        table = pa.Table.from_pylist(records, COMMITS).replace_schema_metadata({"shards": sizes})
        commit = self._folder / "commit.parquet"
        pq.write_table(table, commit)
        if self._stopping.is_set():
            raise StoppedError("stopped")
        self._store.publish(commit, commit_name(task))


def _seconds(frames: int, fps: Fraction) -> float:
    return round(float(frames / fps), 6)


def _fault(
    verified: Sequence[VerifiedClip], spans: Sequence[tuple[int, int]], kept: Kept, config: ShardConfig
) -> Rejected | None:
    """Why the clips of a source are not what was asked. Only the last may be shorter, and clips after it missing."""
    total = sum(clip.frames for clip in verified)
    for ordinal, clip in enumerate(verified):
        length = spans[ordinal][1] - spans[ordinal][0] if ordinal < len(spans) else 0
        if ordinal == len(verified) - 1:
            length = min(length, clip.frames)
        fault = clip.fault(
            frames=length, fps=kept.fps, width=kept.width, height=kept.height, codec=config.codec
        )
        if fault:
            return Rejected(Reason.VERIFY_FAILED, f"clip {ordinal}: {fault}")
    if total == 0:
        return Rejected(Reason.NO_FRAMES, "the decoder gave no picture")
    if total < ENOUGH * kept.frames:
        return Rejected(Reason.TRUNCATED, f"{total} of {kept.frames} frames could be decoded")
    if total < config.min_frames:
        return Rejected(Reason.TOO_FEW_FRAMES, f"{total} frames, under min_frames={config.min_frames}")
    return None


def _as_ours(error: OSError, folder: Path) -> ReelmaeError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFullError(
            f"{folder}: no space left for temporary files; free some, or set TMPDIR, and run again"
        )
    return StorageError(f"{folder}: {error}")
