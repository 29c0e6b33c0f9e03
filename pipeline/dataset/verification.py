"""`reelmae verify`: does a dataset hold what its plan, its commits and its index say?

Always checked: the ledger, task by task; index.parquet and rejects.parquet row by row against the commits;
dataset.json against their sums; labels.json against the plan and the clips; every tar byte by byte (headers, KEY.json
against its row, the clip's sha256, padding, length) and against its DALI index; that no shard is missing or extra.
A deep check also decodes every clip in full in the sandbox, on all cores, and compares it with its row. A runner, such
as of a Ray cluster, takes the shards and their clips to its workers (task_check.py); all else stays on this machine.

No file is trusted. Every fault is named, and no fault stops the search. Where the index and the commits differ, the
commits are right: the index can be joined from them again. While an append or a retry has not finished, the index is
compared with the parts of the plan that it was joined from. Memory does not grow with the number of clips: tasks,
shards and rows pass through one after the other. What is held grows with the number of shards, and of clips that
others repeat.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from reelmae.pipeline import schema
from reelmae.pipeline.dataset.faults import Fault, FaultList, Mend, first_line, task_of
from reelmae.pipeline.dataset.shards import Decoders, ShardCheck, add_unreadable, by_shard
from reelmae.pipeline.dataset.tables import BROKEN, IndexRows, RejectRows, Row, check_repeats, difference
from reelmae.pipeline.dataset.task_check import CheckSpec, Commit, TaskCheck, check_tasks, commit_of_task, read_each
from reelmae.pipeline.errors import DatasetError, InputError, StorageError, StorageFullError
from reelmae.pipeline.ingest.plan import parts
from reelmae.pipeline.ingest.plan.source_files import download_sources
from reelmae.pipeline.ingest.shards import ledger
from reelmae.pipeline.ingest.shards.commits import FOREIGN, READ_AHEAD, committed_tasks
from reelmae.pipeline.runners.runner import Runner
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.checked import download_agreed, read_agreed
from reelmae.pipeline.storage.scratch import scratch_folder
from reelmae.pipeline.storage.store import Store

JOIN_KEYS = ("reelmae", "tools")  # keys of dataset.json that describe the last join, not the clips


@dataclass(frozen=True)
class VerifyReport:
    """What was checked and what was wrong."""

    dst: str
    ok: bool
    """Whether there is no fault."""
    deep: bool
    shards: int
    clips: int
    bytes: int
    faults: tuple[str, ...]
    """Each fault in words; it names its file."""
    damaged_tasks: tuple[int, ...]
    """Tasks that must be run again."""
    found: tuple[Fault, ...]
    """The same faults, each with what mends it."""
    seconds: float
    """Wall-clock seconds."""
    ms_per_clip: float
    """Wall-clock milliseconds for each clip."""
    retries: dict[str, int]
    """Cause → how often the store was asked again for it."""

    def as_dict(self) -> dict[str, Any]:
        """The report without `found`, as JSON takes it."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "found"}
        return values | {"faults": list(self.faults), "damaged_tasks": list(self.damaged_tasks)}


def verify(dst: str, deep: bool = False, *, access: Access | None = None, runner: Runner | None = None) -> VerifyReport:
    """Check the dataset at `dst`; with `deep`, decode every clip.

    `runner`: where the shards are read and decoded, task by task, instead of on all cores of this machine. The report
    is the same. What has no good commit to be compared with is checked here.

    InputError where there is no finished dataset, or one of a format that this version does not know; StorageError where
    the store does not answer for longer than its patience; ClusterError where a node cannot take part.
    """
    begin = time.monotonic()
    store = Store(dst, access)
    before = Counter(store.access.retries.counts())
    require_dataset(store)
    with scratch_folder() as name, ExitStack() as stack:
        folder = Path(name).resolve()
        decoders = stack.enter_context(Decoders(folder)) if deep else None
        check = _Check(store, folder, decoders, stack)
        check.run(runner)
    seconds = time.monotonic() - begin
    return VerifyReport(
        dst=store.url(),
        ok=not check.faults,
        deep=deep,
        shards=check.shards.count,
        clips=check.shards.clips,
        bytes=check.shards.bytes,
        faults=tuple(f.text for f in check.faults),
        damaged_tasks=tuple(sorted({f.task for f in check.faults if f.task is not None})),
        found=tuple(check.faults),
        seconds=seconds,
        ms_per_clip=1000 * seconds / max(1, check.shards.clips),
        retries=dict(Counter(store.access.retries.counts()) - before),
    )


def require_dataset(store: Store) -> None:
    """InputError where there is no finished dataset."""
    if not store.exists(schema.DATASET_JSON):
        unfinished = store.exists(schema.PLAN_JSON)
        state = "an unfinished job; run `reelmae shard` again to finish it" if unfinished else "no dataset"
        raise InputError(f"{store.url()}: no {schema.DATASET_JSON} there: {state}")


class _Check:
    """Checks one dataset: `run` fills `faults`."""

    def __init__(self, store: Store, folder: Path, decoders: Decoders | None, stack: ExitStack) -> None:
        self._store, self._folder, self._stack, self._deep = store, folder, stack, decoders is not None
        self.faults = FaultList()
        self._plan, self._facts = self._read_plan(), self._read_facts()
        self._format = self._find_format()
        self.shards = ShardCheck(store, folder, self._format, decoders, self.faults)
        self._committed = committed_tasks(store, self._format, lambda p: self.faults.add(p, FOREIGN, Mend.NONE))
        self._sums = ledger.Sums()
        self._labels: dict[str | None, int] = {}  # label → number, by the rows of the clips
        self._named: set[str] = set()  # shards of the good commits
        self._open: set[int] = set()  # tasks without a good commit
        self._checked: dict[int, TaskCheck] = {}  # what the workers of a runner have found

    def run(self, runner: Runner | None = None) -> None:
        plan, facts = self._plan, self._facts
        if runner is not None and plan is not None:
            about = hashlib.sha256(self._store.read_bytes(schema.DATASET_JSON)).hexdigest()
            spec = CheckSpec(self._store.url(), plan.format, plan.columns, self._deep, self._store.access, about)
            self._checked = check_tasks(runner, spec, sorted(self._committed & set(range(plan.tasks))))
        joined = None if plan is None else self._index_plan(plan, facts)
        index = self._open_table(schema.INDEX, plan and schema.clip_columns(plan.format, plan.columns))
        rows = IndexRows(index, None if plan is None else plan.tasks, self._format, self.faults)
        if plan is None:
            for task, table in rows.runs:  # without a plan, compare the shards with the index alone
                for name, clips in by_shard(table):
                    self.shards.check(task, name, clips, None)
        else:
            whole = self._check_tasks(plan, joined, rows)
            self._check_extras(plan)
            if whole and facts is not None and joined is not None and not rows.broken:
                assert index is not None
                self._sums.duplicates = check_repeats(index, self.faults)
                self._check_facts(facts, ledger.dataset_facts(joined, self._sums))
        self.shards.drain()
        self.faults.extend(sorted(self.shards.undecodable, key=lambda fault: fault.task or 0))

    def _read_plan(self) -> parts.Plan | None:
        try:
            plan = parts.read_plan(self._store)
        except DatasetError as e:
            self.faults.append(Fault(schema.PLAN_JSON, str(e), Mend.PLAN))
            return None
        if plan is None:
            self.faults.add(schema.PLAN_JSON, "is missing", Mend.PLAN)
        return plan

    def _read_facts(self) -> Row | None:
        try:
            facts = json.loads(read_agreed(self._store, schema.DATASET_JSON))
            if isinstance(facts, dict):
                return facts
            self.faults.add(schema.DATASET_JSON, "is not a JSON object", Mend.JOIN)
        except ValueError as e:
            self.faults.add(schema.DATASET_JSON, f"is not JSON: {first_line(e)}", Mend.JOIN)
        return None

    def _find_format(self) -> int:
        """The format of the dataset, by its plan, else by dataset.json; InputError where this version knows it not."""
        if self._plan is not None:
            return self._plan.format
        found = schema.FORMAT if self._facts is None else self._facts.get("format")
        if words := schema.format_fault(found):
            raise InputError(f"{self._store.url(schema.DATASET_JSON)}: {words}")
        assert isinstance(found, int)
        return found

    def _check_facts(self, facts: Row, wanted: Row) -> None:
        for key in sorted(wanted.keys() - {*JOIN_KEYS, "plan"}):
            if facts.get(key) != wanted[key]:
                words = f"{key} is {facts.get(key)!r}, found {wanted[key]!r}"
                self.faults.add(schema.DATASET_JSON, words, Mend.JOIN)

    def _index_plan(self, plan: parts.Plan, facts: Row | None) -> parts.Plan | None:
        """The plan that the index was joined from: all parts, or the first ones only. None: it may be either."""
        if facts is None or facts.get("plan") == plan.digest():
            return plan
        older = (plan.model_copy(update={"parts": plan.parts[:n]}) for n in range(1, len(plan.parts)))
        found = next((p for p in older if p.digest() == facts.get("plan")), None)
        if found is None:
            words = f"is of plan {facts.get('plan')!r}, {schema.PLAN_JSON} is {plan.digest()!r}"
            self.faults.add(schema.DATASET_JSON, words, Mend.JOIN)
            return plan
        kind = "an append" if plan.parts[-1].retry is None else "a retry"
        words = f"{kind} has not finished; run `reelmae shard` again"
        if any(t not in self._committed for t in range(found.tasks, plan.tasks)):
            self.faults.add(schema.DATASET_JSON, words, Mend.NONE)
            return found
        self.faults.add(schema.DATASET_JSON, words, Mend.JOIN)
        return None  # the job stopped during the join: the index may be the old one or the new one

    def _open_table(
        self, name: str, columns: pa.Schema | None, part: parts.PlanPart | None = None
    ) -> pq.ParquetFile | None:
        """Download a table (of a `part` of the plan: its sources) and open it; None and a fault where it cannot be
        read, or has other columns.
        """
        path = self._folder / name.replace("/", "-")
        mend = Mend.JOIN if part is None else Mend.PLAN
        try:
            if part is None:
                download_agreed(self._store, name, path)
            else:
                download_sources(self._store, part.file, path)
            file = self._stack.enter_context(pq.ParquetFile(path, pre_buffer=False))
            if columns is None or file.schema_arrow.equals(columns):
                return file
            self.faults.add(name, "its columns are not those of the format and the plan", mend)
        except FileNotFoundError:
            self.faults.add(name, "is missing", mend)
        except StorageFullError:
            raise
        except StorageError as e:
            add_unreadable(self.faults, self._store, name, e)
        except DatasetError:
            self.faults.add(name, "its bytes are not those of its name (sha256)", mend)
        except BROKEN as e:
            self.faults.add(name, f"cannot be read: {first_line(e)}", mend)
        return None

    def _open_part(self, part: parts.PlanPart) -> pq.ParquetFile | None:
        """Open the sources of a part of the plan and read them once to the end; None and a fault if that fails."""
        file = self._open_table(part.file, None, part)
        if file is None:
            return None
        try:
            if (file.num_row_groups, file.metadata.num_rows) != (part.tasks, part.sources):
                raise ValueError(f"{file.metadata.num_rows} sources in {file.num_row_groups} tasks")
            for group in range(part.tasks):
                file.read_row_group(group)
            return file
        except BROKEN as e:
            self.faults.add(part.file, f"cannot be read: {first_line(e)}", Mend.PLAN)
            return None

    def _check_tasks(self, plan: parts.Plan, joined: parts.Plan | None, rows: IndexRows) -> bool:
        """Check each task's commit and shards, and its rows in the index and the rejects.

        Returns whether every task of `joined` was compared, so that the sums are complete.
        """
        files = [self._open_part(part) for part in plan.parts]
        rejects = RejectRows(self._open_table(schema.REJECTS_FILE, schema.REJECTS), self._format, self.faults)
        retried = ledger.retry_urls(self._store, joined) if joined is not None and all(files) else None
        ahead = READ_AHEAD if self._checked and not self._store.is_local else 0  # else the shards take longer anyway
        for number, (part, file) in enumerate(zip(plan.parts, files, strict=True)):
            inside = joined is not None and number < len(joined.parts)
            all_tasks = range(part.first_task, part.first_task + part.tasks)
            tasks = [task for task in all_tasks if joined is None or inside or task in self._committed]
            self._open |= set(all_tasks).difference(tasks)
            with closing(read_each(self._store, tasks, self._format, ahead=ahead)) as commits:
                for task, read in zip(tasks, commits, strict=True):
                    mine = rows.take(task) if inside else None
                    urls = None if file is None else file.read_row_group(task - part.first_task, ["url"])
                    commit = self._read_commit(task, read, plan, urls)
                    if commit is not None:
                        self._check_shards(task, commit)
                        if inside and retried is not None:
                            self._compare_rows(task, commit.table, retried[number], mine, rejects)
                        continue
                    self._open.add(task)
                    rejects.stop()
                    for name, clips in by_shard(mine):
                        self.shards.check(task, name, clips, None)
        if joined is not None:
            rows.end()
            rejects.end(complete=retried is not None)
        if all(files):
            self._check_labels(parts.labels_of(self._store, plan))
        return retried is not None and not rejects.stopped

    def _read_commit(
        self, task: int, read: Callable[[], pa.Table], plan: parts.Plan, sources: pa.Table | None
    ) -> Commit | None:
        name = schema.commit_name(task, self._format)
        try:
            table = read()
            commit = commit_of_task(task, table, plan.format, plan.columns)
            if sources is not None:
                ledger.check_commit(sources, table)
            return commit
        except FileNotFoundError:
            self.faults.add(name, "is missing", Mend.TASK, task)
        except DatasetError as e:
            self.faults.add(name, str(e), Mend.TASK, task)
        except StorageError as e:
            add_unreadable(self.faults, self._store, name, e)
        except BROKEN as e:
            self.faults.add(name, f"cannot be read: {first_line(e)}", Mend.TASK, task)
        return None

    def _check_shards(self, task: int, commit: Commit) -> None:
        before, checked = len(self.faults), self._checked.pop(task, None)
        if checked is not None and checked.is_checked:
            self.faults.extend(checked.faults)
            self.shards.undecodable.extend(checked.undecodable)
            self.shards.count += checked.shards
            self.shards.clips += checked.clips
            self.shards.bytes += checked.bytes
        else:
            for name, clips in by_shard(commit.clips):
                self.shards.check(task, name, clips, commit.shards[name])
        self._named |= commit.shards.keys()
        if len(self.faults) == before:
            pairs = commit.clips.select(["label", "label_id"]).group_by(["label", "label_id"]).aggregate([])
            self._labels |= {row["label"]: row["label_id"] for row in pairs.to_pylist()}

    def _compare_rows(
        self, task: int, commit: pa.Table, later: pa.Array | None, mine: pa.Table | None, rejects: RejectRows
    ) -> None:
        """Compare a task's rows in the index and in the rejects with its commit.

        `later`: sources that a later part of the plan tries again; their rows are not in the index.
        """
        if later is not None:
            commit = commit.filter(pc.invert(pc.is_in(commit.column("source"), value_set=later)))
        good, bad = self._sums.add(commit)
        rejects.compare(task, bad)
        if mine is None:
            return
        names = [n for n in mine.column_names if n != "duplicate_of"]
        words = difference(good.select(names), mine.select(names), "key")
        if words:
            self.faults.add(schema.INDEX, f"{words} ({schema.commit_name(task, self._format)})", Mend.JOIN)

    def _check_labels(self, planned: dict[str, int]) -> None:
        """Check that each label has the number that its clips have, or that of the plan where no clip has it.

        More labels than the plan has are no fault: an append leaves them if it is killed before it writes its plan.
        """
        name, clips = schema.LABELS, {k: v for k, v in self._labels.items() if k is not None}
        # such an append may also have taken numbers, so that the plan's differ from the clips': a person must decide
        mend = Mend.LABELS if planned.items() >= clips.items() else Mend.NONE
        try:
            ids = json.loads(read_agreed(self._store, name))
            if not isinstance(ids, dict) or sorted(ids.values()) != list(range(len(ids))):
                raise ValueError("is not an object of labels and numbers that count from 0")
        except FileNotFoundError:
            if planned:
                self.faults.add(name, "is missing", mend)
            return
        except (ValueError, TypeError) as e:
            self.faults.add(name, f"is damaged: {first_line(e)}", mend)
            return
        for label, number in sorted((planned | clips).items()):
            if ids.get(label) != number:
                whose = "its clips have" if label in clips else "the plan has"
                self.faults.add(name, f"label {label!r} is {ids.get(label)}, {whose} {number}", mend)

    def _check_extras(self, plan: parts.Plan) -> None:
        """Find files that no commit names. Shards of a commit beyond the plan are left to a person."""
        beyond = self._committed - set(range(plan.tasks))
        for task in sorted(beyond):
            words = f"belongs to no task of {schema.PLAN_JSON}; put back its own plan, or remove it and its shards"
            self.faults.add(schema.commit_name(task, self._format), words, Mend.NONE)
        for entry in self._store.list("shards"):
            name = re.sub(r"\.idx$", ".tar", entry.path)
            if not name.endswith(".tar") or name in self._named:
                continue
            task = task_of(name, self._format)
            if task not in self._open and task not in beyond:
                self.faults.add(entry.path, "no commit names it", Mend.EXTRA)
