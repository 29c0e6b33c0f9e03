"""The sharding job: plan once, run the tasks that have no commit yet, join their records, check the ledger.

Running it again over the same DST resumes: the frozen plan is taken as it is (files that came since are not in
it), committed tasks are not touched, and the end is byte for byte what an undisturbed run would have left.
Another source, config or ffmpeg is refused with the difference. `append` plans the sources that are new,
`retry_rejected` those that were rejected for a reason, each as a part of its own; until such a part is done, the
dataset that was there stays readable. Stopped by Ctrl-C or an error the job kills its children and leaves a DST
that resumes. dataset.json is written last.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import reelmae.pipeline.schema as schema
from reelmae.pipeline.cores import usable_cores
from reelmae.pipeline.errors import ConfigError, InputError, JobMismatchError, NothingKeptError
from reelmae.pipeline.ingest.clips import scenes
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.ffmpeg import Tool, find_ffmpeg
from reelmae.pipeline.ingest.plan import parts
from reelmae.pipeline.ingest.plan.sources import is_manifest
from reelmae.pipeline.ingest.run import scratch
from reelmae.pipeline.ingest.run.local import LocalRunner
from reelmae.pipeline.ingest.run.task import Job, Tally, TaskWorker
from reelmae.pipeline.ingest.sandbox import Sandbox
from reelmae.pipeline.ingest.shards.ledger import finish
from reelmae.pipeline.storage.store import Store


@dataclass(frozen=True)
class Progress:
    """Where a job stands. `sources_done` counts those of tasks that earlier runs finished, `sources_before`; all else
    is this run's. `bytes` of clips, `source_bytes` of the sources read for them."""

    sources_done: int
    sources_before: int
    sources: int
    source_bytes: int
    clips: int
    bytes: int
    rejected: int
    seconds: float


@dataclass(frozen=True)
class ShardSummary:
    """What a finished dataset holds. `bytes` of its tars; `clip_seconds` of all clips; reason → sources and spans
    rejected; `duplicates` clips marked. Of this run: its seconds, tasks that were done before, sources that are
    new, and, when appending, sources of the plan that have changed since and were left as they are."""

    sources: int
    sources_kept: int
    clips: int
    clip_seconds: float
    duplicates: int
    shards: int
    bytes: int
    rejected: dict[str, int]
    rejected_spans: dict[str, int]
    seconds: float
    already_done_tasks: int
    new_sources: int
    changed_sources: int


def shard(
    src: str,
    dst: str,
    config: ShardConfig | None = None,
    *,
    workers: int | None = None,
    append: bool = False,
    retry_rejected: str | None = None,
    limit: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> ShardSummary:
    """Make a shard dataset at `dst` of the videos at `src` (folder, fsspec URL or manifest), or go on making it.

    workers: videos at a time, default one per core. append: take the sources of `src` that DST does not know.
    retry_rejected: try those again that were rejected for this reason ("all": any). limit: plan at most so many
    sources, a fair draw of all; `append` takes the others. on_progress is called in this thread a few times a second.
    Raises InputError, JobMismatchError, ConfigError, StorageError, StorageFullError, DatasetError, NothingKeptError.
    """
    begin = time.monotonic()
    config = (config or ShardConfig()).resolved()
    if config.cut == "scenes":
        scenes.require()
    _refuse_overlap(Store(src), Store(dst), is_manifest(src))
    store, tool = Store(dst), find_ffmpeg()
    before = parts.read_plan(store)
    plan, changed = _planned(src, store, config, tool, before, append, retry_rejected, limit)
    done = _done_tasks(store)
    if not parts.finished(store, plan):
        run_tasks(store, plan, tool, set(range(plan.tasks)) - done, workers, on_progress, begin=begin)
        finish(store, plan)
    facts = json.loads(store.read_bytes(schema.DATASET_JSON))
    if facts["sources_kept"] == 0:
        top = ", ".join(f"{n} x {reason}" for reason, n in Counter(facts["rejected"]).most_common(5))
        raise NothingKeptError(
            f"{src}: all {facts['sources']} sources were rejected ({top}); see {store.url(schema.REJECTS_FILE)}"
        )
    same = ("sources", "sources_kept", "clips", "duplicates", "shards", "bytes", "rejected", "rejected_spans")
    return ShardSummary(
        **{k: facts[k] for k in same},
        clip_seconds=facts["seconds"],
        seconds=time.monotonic() - begin,
        already_done_tasks=len(done),
        new_sources=plan.sources - (0 if before is None else before.sources),
        changed_sources=changed,
    )


def repair(dst: str, tasks: Iterable[int], *, workers: int | None = None) -> None:
    """Run these tasks of a job again, whatever they left behind, and join all commits anew (where all are there).

    The same sources and tools give the same bytes. StorageError where a source is gone (nothing of its task is
    touched then), JobMismatchError where ffmpeg is another one, InputError where there is no plan.
    """
    store, tool = Store(dst), find_ffmpeg()
    plan = parts.read_plan(store)
    if plan is None:
        raise InputError(f"{dst}: has no {schema.PLAN_JSON}; without it nothing can be made again")
    again = set(tasks)
    differences = parts.refused_tools(plan, tool, again) if again else []
    if differences:
        raise JobMismatchError(f"{store.url()}: {'; '.join(differences)}; the clips would not be the same")
    run_tasks(store, plan, tool, again, workers, None, repairs=True)
    if set(range(plan.tasks)) <= _done_tasks(store):  # else an append goes on: `shard` joins when it ends
        finish(store, plan)


def _refuse_overlap(source: Store, store: Store, manifest: bool) -> None:
    src, dst = source.url().rstrip("/"), store.url().rstrip("/")
    if source.is_local and store.is_local:
        src, dst = str(Path(src).resolve()), str(Path(dst).resolve())
    if store.is_local and Path(dst).exists() and not Path(dst).is_dir():
        raise InputError(f"{store.url()}: is a file; give a folder to write to")
    if dst == src or (not manifest and f"{dst}/".startswith(f"{src.rstrip('/')}/")):
        raise InputError(f"{store.url()}: lies within the source {source.url()}; give a DST outside of it")


def _planned(
    src: str,
    store: Store,
    config: ShardConfig,
    tool: Tool,
    there: parts.Plan | None,
    append: bool,
    retry: str | None,
    limit: int | None,
) -> tuple[parts.Plan, int]:
    """The plan of this run, frozen, and how many sources have changed since they were planned."""
    if append and retry:
        raise ConfigError("--append and --retry-rejected: one at a time")
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit {limit}: must be at least 1")
    if there is None:
        if retry:
            raise InputError(f"{store.url()}: --retry-rejected needs a job there; run it without first")
        return parts.new_plan(src, store, config, tool, limit), 0
    if append and not any(Store(src).url() == part.src for part in there.parts):
        parts.refuse_mismatch(store, there, there.parts[0].src, config, tool)  # another bucket may be added
    else:
        parts.refuse_mismatch(store, there, src, config, tool)
    if not append and not retry:
        first = there.parts[0]
        if limit is not None and limit != first.limit:
            raise JobMismatchError(
                f"{store.url()}: holds another job; limit: {first.limit} there, {limit} here. "
                "Give the same value, or --append to add sources"
            )
        return there, 0
    if not parts.finished(store, there):  # the same command again after a crash: go on
        last = there.parts[-1]
        if retry != last.retry:
            raise JobMismatchError(
                f"{store.url()}: a job there has not finished; run it without --retry-rejected first"
            )
        return there, 0
    if retry:
        return parts.retried(store, there, tool, retry), 0
    return parts.appended(src, store, there, tool, limit)


def _done_tasks(store: Store) -> set[int]:
    return {int(Path(e.path).stem) for e in store.list("commits") if e.path.endswith(".parquet")}


def run_tasks(
    store: Store,
    plan: parts.Plan,
    tool: Tool,
    tasks: set[int],
    workers: int | None,
    on_progress: Callable[[Progress], None] | None,
    *,
    begin: float | None = None,
    repairs: bool = False,
) -> None:
    """Run these tasks to their commits."""
    workers = usable_cores() if workers is None else workers
    if workers < 1:
        raise ConfigError(f"workers={workers}: must be at least 1")
    since = time.monotonic() if begin is None else begin
    labels = json.loads(store.read_bytes(schema.LABELS)) if store.exists(schema.LABELS) else {}
    job = Job(store.url(), plan, labels, tool, repairs)
    scratch.sweep()
    waiting = sorted(tasks)
    sandbox, stopping, tally = Sandbox(), threading.Event(), Tally()
    total, left = sum(p.sources for p in plan.parts), parts.sources_in(store, plan, tasks)

    def tick() -> None:
        if on_progress is None:
            return
        with tally.lock:
            now = (tally.source_bytes, tally.clips, tally.bytes, tally.rejected.total())
            done = total - left + tally.sources
        on_progress(Progress(done, total - left, total, *now, time.monotonic() - since))

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
