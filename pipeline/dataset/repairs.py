"""`reelmae verify --repair`: restores a damaged dataset to what it was, with no more work than the damage needs.

- a damaged clip, tar or commit: the task is run again, which gives the same bytes;
- a damaged index.parquet, rejects.parquet or dataset.json: the commits are joined again;
- a stale DALI index is made again from its tar, labels.json from the plan;
- a shard that no commit names is removed.

Some damage cannot be mended: a damaged plan, missing sources, another ffmpeg. Then an error says so before anything
is touched. From the first look to the last the dataset is claimed: no job writes to it meanwhile.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from reelmae.pipeline import schema
from reelmae.pipeline.dataset.faults import Fault, Mend
from reelmae.pipeline.dataset.verification import VerifyReport, require_dataset, verify
from reelmae.pipeline.errors import DatasetError, JobMismatchError, StorageError
from reelmae.pipeline.ingest import job
from reelmae.pipeline.ingest.ffmpeg import find_ffmpeg
from reelmae.pipeline.ingest.plan import parts
from reelmae.pipeline.ingest.plan.source_files import read_places
from reelmae.pipeline.ingest.plan.sources import access_of
from reelmae.pipeline.ingest.run.nodes import refuse_other_tools, worker_of
from reelmae.pipeline.ingest.run.task import JobSpec
from reelmae.pipeline.ingest.shards.commits import committed_tasks, read_rejects
from reelmae.pipeline.ingest.shards.pack import dali_index
from reelmae.pipeline.runners.runner import Runner
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.checked import download_agreed
from reelmae.pipeline.storage.claim import Claim
from reelmae.pipeline.storage.scratch import scratch_folder
from reelmae.pipeline.storage.store import Store

SHOWN = 3  # missing sources that a message names


@dataclass(frozen=True)
class RepairReport:
    """What was wrong, and what the repair did."""

    before: VerifyReport
    after: VerifyReport
    mended: tuple[str, ...]
    """Faults that are gone."""
    tasks_run: tuple[int, ...]
    """Tasks that were run again."""
    retries: dict[str, int]
    """Cause → how often a store was asked again for it, from the first look to the last."""

    @property
    def ok(self) -> bool:
        """Whether the dataset has no fault now."""
        return self.after.ok

    def as_dict(self) -> dict[str, Any]:
        """The report after the repair and what was mended, as JSON takes it."""
        done = {"mended": list(self.mended), "tasks_run": list(self.tasks_run), "retries": self.retries}
        return self.after.as_dict() | done


def repair(
    dst: str,
    deep: bool = False,
    *,
    workers: int | None = None,
    runner: Runner | None = None,
    access: Access | None = None,
    src_access: Access | None = None,
) -> RepairReport:
    """Verify the dataset at `dst`, mend what can be mended, and verify it again.

    workers: sources at a time that are made into clips again, default one per core.
    runner: where the shards are checked and tasks run again, instead of on this machine; it knows its number of workers.
    access, src_access: how the dataset and its sources are reached.

    Raises before anything is touched: DatasetError (the plan is damaged), StorageError (sources are gone),
    JobMismatchError (another ffmpeg), InputError (no finished dataset), ClaimedError (a job is at work there),
    ClusterError (a node of the runner's cluster cannot take part).
    """
    store, src_access = Store(dst, access), src_access or Access()
    counts = Counter(store.access.retries.counts()) + Counter(src_access.retries.counts())
    require_dataset(store)
    with Claim(store) as claim:
        before, after, tasks = _repair(store, deep, workers, runner, src_access, claim)
    left = set(after.faults)
    mended = tuple(t for t in before.faults if t not in left)
    retries = Counter(store.access.retries.counts()) + Counter(src_access.retries.counts()) - counts
    return RepairReport(before, after, mended, tasks, dict(retries))


def _repair(
    store: Store, deep: bool, workers: int | None, runner: Runner | None, src_access: Access, claim: Claim
) -> tuple[VerifyReport, VerifyReport, tuple[int, ...]]:
    """The reports before and after the repair, and the tasks that were run again."""

    def look() -> VerifyReport:
        return verify(store.url(), deep, access=store.access, runner=runner)

    before = look()
    if before.ok:
        return before, before, ()
    _refuse_damaged_plan(store, before.found)
    tasks = before.damaged_tasks
    plan = parts.read_plan(store)
    assert plan is not None
    if tasks or any(f.mend == Mend.JOIN for f in before.found):
        committed_tasks(store, plan.format)  # DatasetError at a file that is not a commit: the join would stop there
    _refuse_other_sources(store, plan, set(tasks), src_access)
    if tasks and runner is not None:
        refuse_other_tools(runner, find_ffmpeg())
        spec = JobSpec(store.url(), plan, {}, True, src_access, store.access, claim.holders)
        worker_of(runner, spec, set(tasks))  # asks the nodes, before anything is touched
    job_mends = functools.partial(
        _mend, store, plan, workers=workers, runner=runner, src_access=src_access, claim=claim
    )
    job_mends(before.found, tasks)
    after = look()
    if any(f.mend == Mend.EXTRA for f in after.found):  # shards of a task whose commit was missing before
        job_mends(tuple(f for f in after.found if f.mend == Mend.EXTRA), ())
        after = look()
    return before, after, tasks


def _refuse_damaged_plan(store: Store, found: tuple[Fault, ...]) -> None:
    plan = [fault.text for fault in found if fault.mend == Mend.PLAN]
    if plan:
        raise DatasetError(
            f"{store.url()}: {'; '.join(plan)}. Nothing can be made again without it: put it back from a copy, "
            "or shard the bucket anew to another DST. Nothing was touched"
        )


def _refuse_other_sources(store: Store, plan: parts.Plan, tasks: set[int], access: Access) -> None:
    """Raise where the tasks cannot be run again: the ffmpeg is another, or sources are gone."""
    different = parts.tool_differences(plan, find_ffmpeg(), tasks) if tasks else []
    if different:
        raise JobMismatchError(
            f"{store.url()}: {'; '.join(different)}; the clips would not be the same. Nothing was touched"
        )
    gone = [url for url, src in _sources(store, plan, tasks) if not _exists(url, access_of(url, src, access))]
    if gone:
        more = f" and {len(gone) - SHOWN} more" if len(gone) > SHOWN else ""
        raise StorageError(
            f"{', '.join(gone[:SHOWN])}{more}: gone; without these sources, shards of {store.url()} cannot be made "
            "again. Put back what is gone and run again. Nothing was touched"
        )


def _sources(store: Store, plan: parts.Plan, tasks: set[int]) -> list[tuple[str, str]]:
    """The sources that these tasks read when they run again, a member of a tar as its tar, each with its part's `src`.

    A repair keeps the rejects of readable commits.
    """
    rejected = {url for task in tasks for url in read_rejects(store, task, plan.format)}
    sources: dict[tuple[str, str], None] = {}
    for part in plan.parts:
        here = sorted(t - part.first_task for t in tasks if part.holds(t))
        if here:
            with parts.part_file(store, part) as file:
                places = read_places(file, here)
            sources |= {(place, part.src): None for url, place in places if place is not None and url not in rejected}
    return list(sources)


def _exists(url: str, access: Access) -> bool:
    if url.startswith("file://"):
        return Path(os.fsdecode(unquote_to_bytes(url.removeprefix("file://")))).exists()
    return Path(url).exists() if url.startswith("/") else Store(url, access).exists()


def _mend(
    store: Store,
    plan: parts.Plan,
    found: tuple[Fault, ...],
    tasks: tuple[int, ...],
    *,
    workers: int | None,
    runner: Runner | None,
    src_access: Access,
    claim: Claim,
) -> None:
    """Mend all faults. Labels come first: the tasks take their numbers from them. Extra files are removed last."""
    claim.confirm()
    if any(f.mend == Mend.LABELS for f in found):
        store.publish_bytes(parts.as_json(parts.labels_of(store, plan)), schema.LABELS)
    for fault in found:
        if fault.mend == Mend.IDX:
            _mend_idx(store, fault.file)
    if tasks or any(f.mend == Mend.JOIN for f in found):
        job.rerun_tasks(
            store.url(),
            tasks,
            workers=workers,
            runner=runner,
            dst_access=store.access,
            src_access=src_access,
            claim=claim,
        )
    claim.confirm()
    for fault in found:
        if fault.mend == Mend.EXTRA:
            store.remove(fault.file)


def _mend_idx(store: Store, idx: str) -> None:
    with scratch_folder() as folder:
        tar = Path(folder, "shard.tar")
        download_agreed(store, idx.removesuffix(".idx") + ".tar", tar)
        store.publish_bytes(dali_index(tar).encode("ascii"), idx)
