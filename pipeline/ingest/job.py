"""The sharding job: plan once, run the tasks that have no commit yet, join their records, check the ledger.

Running it again over the same DST resumes: the frozen plan is taken as it is (files that came since are not in
it), committed tasks are not touched, and the end is byte for byte what an undisturbed run would have left.
Another source, config or ffmpeg is refused with the difference. Stopped by Ctrl-C or an error it kills its
children and leaves a DST that resumes. dataset.json is written last.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import reelmae.pipeline.schema as schema
from reelmae.pipeline.cores import usable_cores
from reelmae.pipeline.errors import ConfigError, DatasetError, InputError, JobMismatchError, NothingKeptError
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.plan import label_ids, plan, sources_per_task
from reelmae.pipeline.ingest.runners import LocalRunner
from reelmae.pipeline.ingest.sandbox import Sandbox
from reelmae.pipeline.ingest.sources import is_manifest, list_sources
from reelmae.pipeline.ingest.task import Job, Tally, TaskWorker
from reelmae.pipeline.ingest.transcode import find_ffmpeg
from reelmae.pipeline.storage import Store

_ROWS = 50_000  # of index.parquet written at once


@dataclass(frozen=True)
class Progress:
    """Where a job stands. Sources of tasks done in earlier runs count as done; clips, bytes and rejects are this run's."""

    sources_done: int
    sources: int
    clips: int
    bytes: int
    rejected: int
    seconds: float


@dataclass(frozen=True)
class ShardSummary:
    """What a finished dataset holds. `bytes` of its tars; `seconds` of this run; reason → sources rejected."""

    sources: int
    sources_kept: int
    clips: int
    shards: int
    bytes: int
    rejected: dict[str, int]
    seconds: float
    already_done_tasks: int


def shard(
    src: str,
    dst: str,
    config: ShardConfig | None = None,
    *,
    workers: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> ShardSummary:
    """Make a shard dataset at `dst` of the videos at `src` (folder, fsspec URL or manifest), or go on making it.

    workers: videos at a time, default one per core. on_progress is called in this thread a few times a second.
    Raises InputError, JobMismatchError, StorageError, StorageFullError, NothingKeptError.
    """
    begin = time.monotonic()
    config = config or ShardConfig()
    workers = usable_cores() if workers is None else workers
    if workers < 1:
        raise ConfigError(f"workers={workers}: must be at least 1")
    source, store = Store(src), Store(dst)
    _refuse_overlap(source, store, is_manifest(src))
    frozen = _frozen_plan(src, source, store, config)
    done = {int(Path(e.path).stem) for e in store.list("commits") if e.path.endswith(".parquet")}
    if not store.exists(schema.DATASET_JSON):
        labels = json.loads(store.read_bytes(schema.LABELS)) if frozen["labels"] else {}
        root = Path(source.root).resolve() if source.is_local and not is_manifest(src) else None
        job = Job(store.url(), root, config, labels, find_ffmpeg())
        _run(job, store, frozen, done, workers, begin, on_progress)
        _finish(store, frozen)
    facts = json.loads(store.read_bytes(schema.DATASET_JSON))
    if facts["sources_kept"] == 0:
        top = ", ".join(f"{n} x {reason}" for reason, n in Counter(facts["rejected"]).most_common(5))
        raise NothingKeptError(
            f"{src}: all {facts['sources']} sources were rejected ({top}); see {store.url(schema.REJECTS_FILE)}"
        )
    return ShardSummary(
        **{k: facts[k] for k in ("sources", "sources_kept", "clips", "shards", "bytes", "rejected")},
        seconds=time.monotonic() - begin,
        already_done_tasks=len(done),
    )


def _refuse_overlap(source: Store, store: Store, manifest: bool) -> None:
    src, dst = source.url().rstrip("/"), store.url().rstrip("/")
    if source.is_local and store.is_local:
        src, dst = str(Path(src).resolve()), str(Path(dst).resolve())
    if store.is_local and Path(dst).exists() and not Path(dst).is_dir():
        raise InputError(f"{store.url()}: is a file; give a folder to write to")
    if dst == src or (not manifest and f"{dst}/".startswith(f"{src.rstrip('/')}/")):
        raise InputError(f"{store.url()}: lies within the source {source.url()}; give a DST outside of it")


def _frozen_plan(src: str, source: Store, store: Store, config: ShardConfig) -> dict[str, Any]:
    """The plan at DST, made now where there is none. plan.json is written last, so a plan is whole or not there."""
    wanted: dict[str, Any] = {
        "format": schema.FORMAT,
        "src": source.url(),
        "config": config.model_dump(mode="json"),
        "config_digest": config.digest(),
        "ffmpeg": find_ffmpeg().version,
    }
    if store.exists(schema.PLAN_JSON):
        frozen = json.loads(store.read_bytes(schema.PLAN_JSON))
        _refuse_mismatch(store, frozen, wanted)
        return frozen
    for name in (schema.DATASET_JSON, schema.INDEX, "commits", "shards"):
        if store.exists(name):
            raise JobMismatchError(f"{store.url(name)}: exists, but no {schema.PLAN_JSON}; give an empty DST")
    listed = list_sources(src, config.labels)
    per_task = sources_per_task(listed.num_rows, config.sources_per_task)
    planned = plan(listed, seed=config.seed, per_task=per_task)
    labels = label_ids(set(pc.unique(planned.column("label")).drop_null().to_pylist()))
    with tempfile.TemporaryDirectory(prefix="reelmae-") as folder:
        path = Path(folder, "sources.parquet")
        with pq.ParquetWriter(path, schema.SOURCES) as writer:
            for start in range(0, planned.num_rows, per_task):  # row group i holds the sources of task i
                writer.write_table(planned.slice(start, per_task), row_group_size=per_task)
        store.publish(path, schema.PLAN_SOURCES)
    if labels:
        store.publish_bytes(_json(labels), schema.LABELS)
    frozen = {
        **wanted,
        "sources": planned.num_rows,
        "tasks": -(-planned.num_rows // per_task),
        "labels": len(labels),
    }
    store.publish_bytes(_json(frozen), schema.PLAN_JSON)
    return frozen


def _refuse_mismatch(store: Store, frozen: dict[str, Any], wanted: dict[str, Any]) -> None:
    differences = [
        f"{key}: {frozen.get(key)!r} there, {wanted[key]!r} here"
        for key in ("format", "src")
        if frozen.get(key) != wanted[key]
    ]
    there, here = frozen.get("config", {}), wanted["config"]
    differences += [
        f"{key}: {there.get(key)!r} there, {here.get(key)!r} here"
        for key in sorted({*there, *here})
        if there.get(key) != here.get(key)
    ]
    if not differences and frozen.get("ffmpeg") != wanted["ffmpeg"] and not store.exists(schema.DATASET_JSON):
        differences.append(
            f"ffmpeg: {frozen.get('ffmpeg')!r} there, {wanted['ffmpeg']!r} here (see REELMAE_FFMPEG)"
        )
    if differences:
        raise JobMismatchError(
            f"{store.url()}: holds another job; {'; '.join(differences)}. Give the same values or another DST"
        )


def _run(
    job: Job,
    store: Store,
    frozen: dict[str, Any],
    done: set[int],
    workers: int,
    begin: float,
    on_progress: Callable[[Progress], None] | None,
) -> None:
    """Run every task without a commit."""
    waiting = [task for task in range(frozen["tasks"]) if task not in done]
    sandbox, stopping, tally = Sandbox(), threading.Event(), Tally()
    per_task = sources_per_task(frozen["sources"], job.config.sources_per_task)
    before = frozen["sources"] - sum(min(per_task, frozen["sources"] - t * per_task) for t in waiting)

    def tick() -> None:
        if on_progress is None:
            return
        with tally.lock:
            done_now, clips, bytes_, rejected = (
                tally.sources,
                tally.clips,
                tally.bytes,
                tally.rejected.total(),
            )
        on_progress(
            Progress(before + done_now, frozen["sources"], clips, bytes_, rejected, time.monotonic() - begin)
        )

    def stop() -> None:
        stopping.set()
        sandbox.kill_all()

    def make_worker() -> TaskWorker:
        return TaskWorker(job, sandbox, stopping, tally)

    runner = LocalRunner(max(1, min(workers, len(waiting))))
    with closing(runner.run(waiting, make_worker, stop, tick)) as reports:
        for _ in reports:
            continue
    tick()


def _commits(store: Store, frozen: dict[str, Any]) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Task by task: its sources, its commit."""
    with tempfile.TemporaryDirectory(prefix="reelmae-") as folder:
        path = Path(folder, "sources.parquet")
        store.download(schema.PLAN_SOURCES, path)
        with pq.ParquetFile(path) as sources:
            for task in range(frozen["tasks"]):
                commit = pq.read_table(pa.BufferReader(store.read_bytes(schema.commit_name(task))))
                yield sources.read_row_group(task), commit


def _finish(store: Store, frozen: dict[str, Any]) -> None:
    """Join the commits into index.parquet and rejects.parquet, check the ledger, write dataset.json."""
    shards: dict[str, int] = {}
    rejected: Counter[str] = Counter()
    clips = kept = 0
    with tempfile.TemporaryDirectory(prefix="reelmae-") as folder:
        index, rejects = Path(folder, "index.parquet"), Path(folder, "rejects.parquet")
        with _Rows(index, schema.CLIPS) as index_rows, _Rows(rejects, schema.REJECTS) as reject_rows:
            for sources, commit in _commits(store, frozen):
                is_clip = pc.equal(commit.column("kind"), schema.CLIP)
                good, bad = commit.filter(is_clip), commit.filter(pc.invert(is_clip))
                whole = bad.filter(pc.is_null(bad.column("span_start_s")))
                with_clips = set(good.column("source").to_pylist())
                check_ledger(
                    sources.column("url").to_pylist(), with_clips, whole.column("source").to_pylist()
                )
                rejected.update(whole.column("reason").to_pylist())
                shards |= json.loads((commit.schema.metadata or {})[b"shards"])
                clips, kept = clips + good.num_rows, kept + len(with_clips)
                index_rows.add(good)
                reject_rows.add(bad)
        store.publish(index, schema.INDEX)
        store.publish(rejects, schema.REJECTS_FILE)
    if kept + rejected.total() != frozen["sources"]:
        raise DatasetError(
            f"{store.url()}: {kept} kept + {rejected.total()} rejected != {frozen['sources']} planned sources"
        )
    store.sweep("shards", "commits", "plan")
    facts = {
        "format": schema.FORMAT,
        "reelmae": version("reelmae"),
        "src": frozen["src"],
        "sources": frozen["sources"],
        "sources_kept": kept,
        "clips": clips,
        "shards": len(shards),
        "bytes": sum(shards.values()),
        "rejected": dict(sorted(rejected.items())),
        "config": frozen["config"],
        "config_digest": frozen["config_digest"],
        "tools": {"ffmpeg": frozen["ffmpeg"], **{p: version(p) for p in ("av", "pyarrow", "webdataset")}},
    }
    store.publish_bytes(_json(facts), schema.DATASET_JSON)


def check_ledger(planned: list[str], with_clips: set[str], rejected: list[str]) -> None:
    """Every planned source has clips or one reject row, never both, and there are no others; else DatasetError."""
    both = with_clips & set(rejected)
    lost = set(planned) - with_clips - set(rejected)
    extra = (with_clips | set(rejected)) - set(planned)
    doubled = [url for url, n in Counter(rejected).items() if n > 1]
    for words, urls in (
        ("has clips and a reject", both),
        ("is lost", lost),
        ("was never planned", extra),
        ("is rejected twice", doubled),
    ):
        if urls:
            raise DatasetError(
                f"ledger: {sorted(urls)[0]!r} {words} ({len(urls)} such sources); the commits are damaged"
            )


class _Rows:
    """A parquet file written in pieces of at least _ROWS rows, so that memory stays flat."""

    def __init__(self, path: Path, columns: pa.Schema) -> None:
        self._columns = columns
        self._writer = pq.ParquetWriter(path, columns)
        self._tables: list[pa.Table] = []

    def add(self, table: pa.Table) -> None:
        """Append the rows' columns of this file's schema."""
        self._tables.append(
            table.select(self._columns.names).replace_schema_metadata(None).cast(self._columns)
        )
        if sum(t.num_rows for t in self._tables) >= _ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._tables:
            self._writer.write_table(pa.concat_tables(self._tables))
        self._tables = []

    def __enter__(self) -> _Rows:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._writer.close()


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
