"""`reelmae verify`: is a dataset what its plan, its commits and its index say?

Always: the ledger, task by task; index.parquet and rejects.parquet row by row against the commits; dataset.json
against their sums; labels.json against the plan and the clips; every tar byte by byte (headers, KEY.json against
its row, the clip's sha256, padding, length) and against its DALI index; no shard missing or extra.
Deep: every clip also decoded whole in the sandbox, on all cores, and compared with its row.

Reads with no trust in the files; every fault is named, none stops the search. Where index and commits differ, the
commits count: what is joined from them can be joined again. Where an append or a retry has not finished, the
index is held against the parts that it was joined from. Memory does not grow with the number of clips: tasks, shards and
rows pass through one after the other; what is held grows with the shards and the clips that others repeat.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from reelmae.pipeline import schema
from reelmae.pipeline.dataset.faults import SHARD_FILE, Fault, Faults, Mend, Row, line_of, task_of
from reelmae.pipeline.dataset.shards import Decoders, Shards, by_shard
from reelmae.pipeline.dataset.tables import BROKEN, ByTask, RejectRows, check_repeats, difference
from reelmae.pipeline.errors import (
    DatasetError,
    InputError,
    StorageError,
    StorageFullError,
)
from reelmae.pipeline.ingest.plan import parts
from reelmae.pipeline.ingest.shards import ledger
from reelmae.pipeline.ingest.shards.commits import read_commit
from reelmae.pipeline.storage.store import Store

OF_THE_JOIN = ("reelmae", "tools")  # what dataset.json says of the last join, not of the clips


@dataclass(frozen=True)
class VerifyReport:
    """What was looked at and what was wrong: each fault names its file. `ok` is True where there is none.

    `damaged_tasks` must be run again; `found` says for each fault what mends it. `ms_per_clip` is wall-clock time.
    """

    dst: str
    ok: bool
    deep: bool
    shards: int
    clips: int
    bytes: int
    faults: tuple[str, ...]
    damaged_tasks: tuple[int, ...]
    found: tuple[Fault, ...]
    seconds: float
    ms_per_clip: float

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "found"}
        return values | {"faults": list(self.faults), "damaged_tasks": list(self.damaged_tasks)}


def verify(dst: str, deep: bool = False) -> VerifyReport:
    """Check the dataset at `dst`; with `deep`, decode every clip. InputError where there is no finished dataset."""
    begin = time.monotonic()
    store = Store(dst)
    if not store.exists(schema.DATASET_JSON):
        there = (
            "an unfinished job; run `reelmae shard` again to finish it"
            if store.exists(schema.PLAN_JSON)
            else "no dataset"
        )
        raise InputError(f"{dst}: no {schema.DATASET_JSON} there: {there}")
    with tempfile.TemporaryDirectory(prefix="reelmae-") as name, ExitStack() as stack:
        folder = Path(name).resolve()
        decoders = stack.enter_context(Decoders(folder)) if deep else None
        check = _Check(store, folder, decoders, stack)
        check.run()
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
    )


@dataclass(frozen=True)
class _Commit:
    """A commit that holds together: its rows, those of its clips, its shards with their bytes."""

    table: pa.Table
    clips: pa.Table
    shards: dict[str, int]


class _Check:
    """The dataset as a whole."""

    def __init__(self, store: Store, folder: Path, decoders: Decoders | None, stack: ExitStack) -> None:
        self._store, self._folder, self._stack = store, folder, stack
        self.faults = Faults()
        self.shards = Shards(store, folder, decoders, self.faults)
        self._committed = {e.path for e in store.list("commits") if e.path.endswith(".parquet")}
        self._sums = ledger.Sums()
        self._labels: dict[str | None, int] = {}  # as the clips have them
        self._named: set[str] = set()  # shards of good commits
        self._open: set[int] = set()  # tasks without one

    def run(self) -> None:
        plan, facts = self._read_plan(), self._read_facts()
        joined = None if plan is None else self._joined(plan, facts)
        index = self._table(schema.INDEX, plan and schema.with_columns(schema.CLIPS, plan.columns))
        rows = ByTask(index, None if plan is None else plan.tasks, self.faults)
        if plan is None:
            for task, table in rows.runs:  # the shards against the index alone
                for name, clips in by_shard(table):
                    self.shards.check(task, name, clips, None)
        else:
            whole = self._tasks(plan, joined, rows)
            self._extras(plan)
            if whole and facts is not None and joined is not None and not rows.broken:
                assert index is not None
                self._sums.duplicates = check_repeats(index, self.faults)
                self._check_facts(facts, ledger.dataset_facts(joined, self._sums))
        self.shards.drain()

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
            facts = json.loads(self._store.read_bytes(schema.DATASET_JSON))
            if isinstance(facts, dict):
                return facts
            self.faults.add(schema.DATASET_JSON, "is no JSON object", Mend.JOIN)
        except ValueError as e:
            self.faults.add(schema.DATASET_JSON, f"is no JSON: {line_of(e)}", Mend.JOIN)
        return None

    def _check_facts(self, facts: Row, wanted: Row) -> None:
        for key in sorted(wanted.keys() - {*OF_THE_JOIN, "plan"}):
            if facts.get(key) != wanted[key]:
                words = f"{key} is {facts.get(key)!r}, found {wanted[key]!r}"
                self.faults.add(schema.DATASET_JSON, words, Mend.JOIN)

    def _joined(self, plan: parts.Plan, facts: Row | None) -> parts.Plan | None:
        """The plan that the index was joined from: its first parts where others came since; None: cannot be told."""
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
        if any(schema.commit_name(t) not in self._committed for t in range(found.tasks, plan.tasks)):
            self.faults.add(schema.DATASET_JSON, words, Mend.NONE)
            return found
        self.faults.add(schema.DATASET_JSON, words, Mend.JOIN)
        return None  # stopped while it joined: the index may be the old one or the new one

    def _table(self, name: str, columns: pa.Schema | None) -> pq.ParquetFile | None:
        """A table of the dataset, copied here; None and a fault where it cannot be read or has other columns."""
        path = self._folder / name.replace("/", "-")
        mend = Mend.PLAN if name.startswith("plan/") else Mend.JOIN
        try:
            self._store.download(name, path)
            file = self._stack.enter_context(pq.ParquetFile(path))
            if columns is None or file.schema_arrow.equals(columns):
                return file
            self.faults.add(name, "its columns are not those of the format and the plan", mend)
        except FileNotFoundError:
            self.faults.add(name, "is missing", mend)
        except StorageFullError:
            raise
        except StorageError as e:
            self.faults.add(name, f"cannot be read: {line_of(e)}", Mend.NONE)
        except BROKEN as e:
            self.faults.add(name, f"cannot be read: {line_of(e)}", mend)
        return None

    def _part(self, part: parts.Part) -> pq.ParquetFile | None:
        """A part's sources, read through once."""
        file = self._table(part.file, None)
        if file is None:
            return None
        try:
            if (file.num_row_groups, file.metadata.num_rows) != (part.tasks, part.sources):
                raise ValueError(f"{file.metadata.num_rows} sources in {file.num_row_groups} tasks")
            for group in range(part.tasks):
                file.read_row_group(group)
            return file
        except BROKEN as e:
            self.faults.add(part.file, f"cannot be read: {line_of(e)}", Mend.PLAN)
            return None

    def _tasks(self, plan: parts.Plan, joined: parts.Plan | None, rows: ByTask) -> bool:
        """Every task's commit and shards, and its rows in the index and the rejects; whether all is accounted for."""
        files = [self._part(part) for part in plan.parts]
        rejects = RejectRows(self._table(schema.REJECTS_FILE, schema.REJECTS), self.faults)
        retried = ledger.retried_urls(self._store, joined) if joined is not None and all(files) else None
        for number, (part, file) in enumerate(zip(plan.parts, files, strict=True)):
            inside = joined is not None and number < len(joined.parts)
            for task in range(part.first_task, part.first_task + part.tasks):
                mine = rows.take(task) if inside else None
                if joined is not None and not inside and schema.commit_name(task) not in self._committed:
                    self._open.add(task)
                    continue
                urls = None if file is None else file.read_row_group(task - part.first_task, ["url"])
                commit = self._commit(task, plan, urls)
                if commit is not None:
                    self._check_shards(task, commit)
                    if inside and retried is not None:
                        self._compare(task, commit.table, retried[number], mine, rejects)
                    continue
                self._open.add(task)
                rejects.stop()
                for name, clips in by_shard(mine):
                    self.shards.check(task, name, clips, None)
        if joined is not None:
            rows.end()
            rejects.end(told=retried is not None)
        if all(files):
            self._check_labels(parts.labels_of(self._store, plan))
        return retried is not None and not rejects.stopped

    def _commit(self, task: int, plan: parts.Plan, sources: pa.Table | None) -> _Commit | None:
        name = schema.commit_name(task)
        try:
            table = read_commit(self._store, task)
            commit = _own_commit(task, table, plan)
            if sources is not None:
                ledger.check_commit(sources, table)
            return commit
        except FileNotFoundError:
            self.faults.add(name, "is missing", Mend.TASK, task)
        except DatasetError as e:
            self.faults.add(name, str(e), Mend.TASK, task)
        except StorageError as e:
            self.faults.add(name, f"cannot be read: {line_of(e)}", Mend.NONE)
        except BROKEN as e:
            self.faults.add(name, f"cannot be read: {line_of(e)}", Mend.TASK, task)
        return None

    def _check_shards(self, task: int, commit: _Commit) -> None:
        before = len(self.faults)
        for name, clips in by_shard(commit.clips):
            self.shards.check(task, name, clips, commit.shards[name])
        self._named |= commit.shards.keys()
        if len(self.faults) == before:
            pairs = commit.clips.select(["label", "label_id"]).group_by(["label", "label_id"]).aggregate([])
            self._labels |= {row["label"]: row["label_id"] for row in pairs.to_pylist()}

    def _compare(
        self, task: int, commit: pa.Table, later: pa.Array | None, mine: pa.Table | None, rejects: RejectRows
    ) -> None:
        """A task's rows in the index and in the rejects are those of its commit that no later part tries again."""
        if later is not None:
            commit = commit.filter(pc.invert(pc.is_in(commit.column("source"), value_set=later)))
        good, bad = ledger.judged(commit, self._sums)
        rejects.compare(task, bad)
        if mine is None:
            return
        names = [n for n in mine.column_names if n != "duplicate_of"]
        words = difference(good.select(names), mine.select(names), "key")
        if words:
            self.faults.add(schema.INDEX, f"{words} ({schema.commit_name(task)})", Mend.JOIN)

    def _check_labels(self, planned: dict[str, int]) -> None:
        """Every planned label has the number that its clips have, or, where it has none, that of the plan.

        Labels that no plan knows are left from an append that was killed before its plan was written.
        """
        name, clips = schema.LABELS, {k: v for k, v in self._labels.items() if k is not None}
        # numbers left behind by such an append may make the plan's others than the clips': only a person can tell
        mend = Mend.LABELS if planned.items() >= clips.items() else Mend.NONE
        try:
            ids = json.loads(self._store.read_bytes(name))
            if not isinstance(ids, dict) or sorted(ids.values()) != list(range(len(ids))):
                raise ValueError("is no object of labels and their numbers from 0")
        except FileNotFoundError:
            if planned:
                self.faults.add(name, "is missing", mend)
            return
        except (ValueError, TypeError) as e:
            self.faults.add(name, f"is damaged: {line_of(e)}", mend)
            return
        for label, number in sorted((planned | clips).items()):
            if ids.get(label) != number:
                whose = "its clips have" if label in clips else "by the plan it is"
                self.faults.add(name, f"label {label!r} is {ids.get(label)}, {whose} {number}", mend)

    def _extras(self, plan: parts.Plan) -> None:
        """Files that no commit names. What a commit beyond the plan might name is left to a person."""
        beyond = {int(Path(p).stem) for p in self._committed if Path(p).stem.isdecimal()} - set(range(plan.tasks))
        for task in sorted(beyond):
            words = f"is of no task of {schema.PLAN_JSON}; put back the plan that it is of, or remove it and its shards"
            self.faults.add(schema.commit_name(task), words, Mend.NONE)
        for entry in self._store.list("shards"):
            match = SHARD_FILE.fullmatch(entry.path)
            name = re.sub(r"idx$", "tar", entry.path)
            if not entry.path.endswith((".tar", ".idx")) or name in self._named:
                continue
            if match is None or int(match.group(1)) not in self._open | beyond:
                self.faults.add(entry.path, "no commit names it", Mend.EXTRA)


def _own_commit(task: int, table: pa.Table, plan: parts.Plan) -> _Commit:
    """The commit, which must be this task's, with the columns of the format; DatasetError or ValueError else."""
    if not table.schema.equals(schema.with_columns(schema.COMMITS, plan.columns)):
        raise DatasetError("its columns are not those of the format and the plan")
    clips = table.filter(pc.equal(table.column("kind"), schema.CLIP))
    columns = schema.with_columns(schema.CLIPS, plan.columns)
    clips = clips.select(columns.names).replace_schema_metadata(None).cast(columns)
    shards = json.loads((table.schema.metadata or {})[b"shards"])
    foreign = [name for name in shards if task_of(name) != task]
    if foreign:
        raise DatasetError(f"names {foreign[0]}: it is another task's")
    if set(pc.unique(clips.column("shard")).to_pylist()) != set(shards):
        raise DatasetError("its clips are not in the shards that it names")
    return _Commit(table, clips, shards)
