"""The sharding job: plan once, run the tasks that have no commit yet, join their records, check the ledger.

Running it again over the same DST resumes. The frozen plan does not change (files that are new are not in it),
committed tasks are not touched, and the result is byte for byte that of an undisturbed run. Another source, config
or ffmpeg is refused with the difference. `append` plans the sources that are new, `retry_rejected` those that were
rejected for a reason, each as a part of its own; until such a part is done, the old dataset stays readable. Stopped
by Ctrl-C or an error, the job kills its children and leaves a DST that resumes. dataset.json is written last.

Before anything of DST is read the job takes its claim (storage/claim.py), so that no two jobs work at one DST. A store
that fails is waited for, as long as its Access has patience.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import reelmae.pipeline.schema as schema
from reelmae.pipeline.errors import ConfigError, InputError, JobMismatchError, NothingKeptError
from reelmae.pipeline.ingest.clips import scenes
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.ffmpeg import Tool, find_ffmpeg
from reelmae.pipeline.ingest.plan import parts
from reelmae.pipeline.ingest.plan.sources import is_folder, source_url
from reelmae.pipeline.ingest.run.nodes import refuse_other_tools, worker_of
from reelmae.pipeline.ingest.run.task import JobSpec, TaskReport
from reelmae.pipeline.ingest.shards.commits import committed_tasks
from reelmae.pipeline.ingest.shards.ledger import finish
from reelmae.pipeline.runners.local import LocalRunner
from reelmae.pipeline.runners.runner import Runner
from reelmae.pipeline.storage import scratch
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.claim import Claim
from reelmae.pipeline.storage.store import Store


@dataclass(frozen=True)
class Progress:
    """How far a job is."""

    sources_done: int
    """Sources of the plan that are done, those of earlier runs among them."""
    sources_before: int
    """Sources of the tasks that earlier runs finished."""
    sources: int
    """Sources of the whole plan."""
    source_bytes: int
    """Bytes of the sources that this run has read."""
    clips: int
    """Clips that this run has made."""
    bytes: int
    """Bytes of these clips."""
    rejected: int
    """Sources that this run has rejected."""
    seconds: float
    """Seconds since this run began."""
    retries: int = 0
    """Requests to the stores that this run tried again."""


@dataclass(frozen=True)
class ShardSummary:
    """What a finished dataset holds, and what this run did for it."""

    sources: int
    sources_kept: int
    """Sources that gave clips."""
    clips: int
    clip_seconds: float
    """Seconds of all clips."""
    duplicates: int
    """Clips that are marked as a repeat of another."""
    shards: int
    bytes: int
    """Bytes of all tars."""
    rejected: dict[str, int]
    """reason → sources rejected as a whole."""
    rejected_spans: dict[str, int]
    """reason → spans rejected, of sources that gave other clips."""
    seconds: float
    """Seconds of this run."""
    already_done_tasks: int
    """Tasks that were committed before this run."""
    new_sources: int
    """Sources that this run planned."""
    changed_sources: int
    """With `append`: planned sources that have changed since. They are not taken again."""
    retries: dict[str, int] = field(default_factory=dict)
    """cause → requests to both stores that this run tried again, the most frequent cause first."""


@dataclass
class Counts:
    """What this run has done: the sums of the reports of ended tasks, and the reports so far of running ones."""

    ended: TaskReport = field(default_factory=lambda: TaskReport(task=-1))
    running: dict[int, TaskReport] = field(default_factory=dict)

    def see(self, report: TaskReport) -> None:
        """The report so far of a running task. One that began again, since its worker died, counts once it is further."""
        before = self.running.get(report.task)
        if before is None or report.sources >= before.sources:
            self.running[report.task] = report

    def end(self, report: TaskReport) -> None:
        """The report of a task that has ended."""
        self.running.pop(report.task, None)
        self.ended += report

    def total(self) -> TaskReport:
        """The sum of all."""
        return sum(self.running.values(), self.ended)


class _Retries:
    """What this run tried again: in this thread by both accesses, and in the workers."""

    def __init__(self, *accesses: Access) -> None:
        self._accesses = list({id(access): access for access in accesses}.values())
        self._before = self._here()
        self.of_workers: Mapping[str, int] = {}

    def _here(self) -> Counter[str]:
        return sum((Counter(access.retries.counts()) for access in self._accesses), Counter())

    def counts(self) -> dict[str, int]:
        """cause → number, the largest first."""
        return dict((self._here() - self._before + Counter(self.of_workers)).most_common())


def shard(
    src: str,
    dst: str,
    config: ShardConfig | None = None,
    *,
    workers: int | None = None,
    runner: Runner | None = None,
    append: bool = False,
    retry_rejected: str | None = None,
    limit: int | None = None,
    src_access: Access | None = None,
    dst_access: Access | None = None,
    takeover: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> ShardSummary:
    """Make a shard dataset at `dst` from the videos at `src` (folder, fsspec URL, manifest or tars), or go on making it.

    workers: videos at a time, default one per core.
    runner: where the tasks run, instead of on this machine; it knows its number of workers itself.
    append: plan the sources of `src` that DST does not know.
    retry_rejected: plan the sources again that were rejected for this reason ("all": any).
    limit: plan at most so many sources, a fair draw of all; `append` takes the others later.
    src_access, dst_access: how `src` and `dst` are reached: options of their file systems, patience. What is tried
        again is counted there.
    takeover: take DST over from a job that works there, instead of ClaimedError.
    on_progress: called in this thread a few times a second.

    Raises InputError, JobMismatchError, ConfigError, ClaimedError, StorageError, StorageFullError, DatasetError,
    NothingKeptError, and of a cluster ClusterError.
    """
    begin = time.monotonic()
    runner = runner or LocalRunner(workers)
    config = (config or ShardConfig()).resolve()
    if config.cut == "scenes":
        scenes.require()
    src_access, dst_access = src_access or Access(), dst_access or Access()
    store, tool, retries = Store(dst, dst_access), find_ffmpeg(), _Retries(src_access, dst_access)
    refuse_other_tools(runner, tool)
    _refuse_overlap(Store(src, src_access), store, is_folder(src))
    with Claim(store, takeover=takeover) as claim:
        before = parts.read_plan(store)
        wanted = _Wanted(src, config, tool, append, retry_rejected, limit)
        plan, changed = _freeze_plan(wanted, store, before, src_access, claim)
        done = committed_tasks(store, plan.format)
        if not parts.is_finished(store, plan):
            run = _Run(store, plan, claim, src_access, retries, begin, runner)
            run.run_tasks(set(range(plan.tasks)) - done, on_progress)
            finish(store, plan, claim.confirm)
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
        retries=retries.counts(),
    )


def rerun_tasks(
    dst: str,
    tasks: Iterable[int],
    *,
    workers: int | None = None,
    runner: Runner | None = None,
    src_access: Access | None = None,
    dst_access: Access | None = None,
    claim: Claim | None = None,
) -> None:
    """Run these tasks of a job again, whatever files they have left, and join all commits where none is missing.

    The same sources and tools give the same bytes. `workers`, `runner`: as `shard` has them. `claim`: the one that the caller holds on `dst`; else it is taken
    here. StorageError where a source is gone (nothing of its task is touched then), JobMismatchError where this
    machine has another ffmpeg, InputError where there is no plan, ClaimedError where a job works at `dst`.
    """
    runner = runner or LocalRunner(workers)
    src_access, dst_access = src_access or Access(), dst_access or Access()
    store = Store(dst, dst_access)
    if claim is None:
        with Claim(store) as claim:
            rerun_tasks(dst, tasks, runner=runner, src_access=src_access, dst_access=dst_access, claim=claim)
        return
    plan = parts.read_plan(store)
    if plan is None:
        raise InputError(f"{dst}: has no {schema.PLAN_JSON}; without it nothing can be made again")
    again = set(tasks)
    differences = parts.tool_differences(plan, find_ffmpeg(), again) if again else []
    if differences:
        raise JobMismatchError(f"{store.url()}: {'; '.join(differences)}; the clips would not be the same")
    done = committed_tasks(store, plan.format) | again
    if again:
        refuse_other_tools(runner, find_ffmpeg())
    run = _Run(store, plan, claim, src_access, _Retries(src_access, dst_access), time.monotonic(), runner)
    run.run_tasks(again, None, repairs=True)
    if set(range(plan.tasks)) <= done:  # else an append has not finished: `shard` joins when it has
        finish(store, plan, claim.confirm)


def _refuse_overlap(source: Store, store: Store, folder: bool) -> None:
    src, dst = source.url().rstrip("/"), store.url().rstrip("/")
    if source.is_local and store.is_local:
        src, dst = str(Path(src).resolve()), str(Path(dst).resolve())
    if store.is_local and Path(dst).exists() and not Path(dst).is_dir():
        raise InputError(f"{store.url()}: is a file; give a folder to write to")
    if dst == src or (folder and f"{dst}/".startswith(f"{src.rstrip('/')}/")):
        raise InputError(f"{store.url()}: lies within the source {source.url()}; give a DST outside of it")


@dataclass(frozen=True)
class _Wanted:
    """What the user asks for."""

    src: str
    config: ShardConfig
    tool: Tool
    append: bool
    retry: str | None
    limit: int | None


def _freeze_plan(
    wanted: _Wanted, store: Store, there: parts.Plan | None, access: Access, claim: Claim
) -> tuple[parts.Plan, int]:
    """The frozen plan of this run, and the number of sources that have changed since they were planned.

    `access`: how the sources are reached. All that is wrong with DST is refused before the sources are listed.
    """
    src, config, tool = wanted.src, wanted.config, wanted.tool
    append, retry, limit = wanted.append, wanted.retry, wanted.limit
    if append and retry:
        raise ConfigError("--append and --retry-rejected: one at a time")
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit {limit}: must be at least 1")
    if there is None:
        if retry:
            raise InputError(f"{store.url()}: --retry-rejected needs a job there; run it without first")
        return parts.new_plan(src, store, config, tool, limit, access, claim.confirm), 0
    url = source_url(src, access)
    if append and not any(url == part.src for part in there.parts):
        parts.refuse_mismatch(store, there, there.parts[0].src, config, tool)  # another bucket may be added
    else:
        parts.refuse_mismatch(store, there, url, config, tool)
    if not append and not retry:
        first = there.parts[0]
        if limit is not None and limit != first.limit:
            raise JobMismatchError(
                f"{store.url()}: holds another job; limit: {first.limit} there, {limit} here. "
                "Give the same value, or --append to add sources"
            )
        return there, 0
    if not parts.is_finished(store, there):  # the same command again after a crash: go on
        last = there.parts[-1]
        if retry != last.retry:
            raise JobMismatchError(
                f"{store.url()}: a job there has not finished; run it without --retry-rejected first"
            )
        return there, 0
    if retry:
        return parts.retry_rejects(store, there, tool, retry, access, claim.confirm), 0
    return parts.append_sources(src, store, there, tool, limit, access, claim.confirm)


@dataclass
class _Run:
    """One run of a job, while it holds its claim."""

    store: Store
    plan: parts.Plan
    claim: Claim
    src_access: Access
    retries: _Retries
    begin: float
    """By time.monotonic."""
    runner: Runner

    def run_tasks(
        self,
        tasks: set[int],
        on_progress: Callable[[Progress], None] | None,
        *,
        repairs: bool = False,
    ) -> None:
        """Run these tasks to their commits."""
        spec = JobSpec.of(
            self.store, self.plan, repairs=repairs, src_access=self.src_access, holders=self.claim.holders
        )
        scratch.sweep()
        waiting, counts = sorted(tasks), Counts()
        sources = sum(part.sources for part in self.plan.parts)
        before = sources - parts.sources_in(self.store, self.plan, tasks)

        def tick() -> None:
            self.claim.check()
            total = counts.total()
            self.retries.of_workers = total.retries
            if on_progress is not None:
                on_progress(self._progress(total, before, sources))

        make_worker = worker_of(self.runner, spec, tasks)
        try:
            with closing(self.runner.run(waiting, make_worker, on_report=counts.see, tick=tick)) as reports:
                for report in reports:
                    counts.end(report)
            tick()
        finally:  # the workers had copies of the accesses
            self.retries.of_workers = {}
            for cause, n in counts.total().retries.items():
                self.src_access.retries.add(cause, n)

    def _progress(self, total: TaskReport, before: int, sources: int) -> Progress:
        return Progress(
            sources_done=before + total.sources,
            sources_before=before,
            sources=sources,
            source_bytes=total.source_bytes,
            clips=total.clips,
            bytes=total.bytes,
            rejected=sum(total.rejected.values()),
            seconds=time.monotonic() - self.begin,
            retries=sum(self.retries.counts().values()),
        )
