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

import hashlib
import itertools
import json
import os
import re
import tarfile
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, fields
from enum import StrEnum
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from reelmae.pipeline import schema
from reelmae.pipeline.cores import usable_cores
from reelmae.pipeline.errors import (
    ChildCrashedError,
    ChildError,
    DatasetError,
    InputError,
    StorageError,
    StorageFullError,
)
from reelmae.pipeline.ingest import ledger, parts
from reelmae.pipeline.ingest.pack import dali_index
from reelmae.pipeline.ingest.probe import Prober
from reelmae.pipeline.ingest.sandbox import Sandbox
from reelmae.pipeline.storage import Store

ROWS = 10_000  # of a table at a time
OF_THE_JOIN = ("reelmae", "tools")  # what dataset.json says of the last join, not of the clips
BROKEN = (pa.ArrowException, OSError, ValueError, KeyError, TypeError)  # what a damaged table raises
BLOCK = tarfile.BLOCKSIZE
_SHARD = re.compile(r"shards/(\d{6,})-\d{2,}\.(tar|idx)")
Row = dict[str, Any]


class Mend(StrEnum):
    """What mends a fault."""

    TASK = "task"  # its task is run again
    JOIN = "join"  # the commits are joined again
    IDX = "idx"  # the DALI index is made again from its tar, which is sound
    LABELS = "labels"  # labels.json is made again from the plan
    EXTRA = "extra"  # the file is removed
    PLAN = "plan"  # nothing: the plan itself is damaged
    NONE = "none"  # nothing here: the text says what to do


@dataclass(frozen=True)
class Fault:
    """What is wrong with one file; `task`: the task that must be run again for it, where it is one."""

    file: str
    text: str
    mend: Mend
    task: int | None = None


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
        decoders = stack.enter_context(_Decoders(folder)) if deep else None
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


class _Faults(list[Fault]):
    def add(self, file: str, words: str, mend: Mend, task: int | None = None) -> None:
        self.append(Fault(file, f"{file}: {words}", mend, task))


@dataclass(frozen=True)
class _Commit:
    """A commit that holds together: its rows, those of its clips, its shards with their bytes."""

    table: pa.Table
    clips: pa.Table
    shards: dict[str, int]


class _Check:
    """The dataset as a whole."""

    def __init__(self, store: Store, folder: Path, decoders: _Decoders | None, stack: ExitStack) -> None:
        self._store, self._folder, self._stack = store, folder, stack
        self.faults = _Faults()
        self.shards = _Shards(store, folder, decoders, self.faults)
        self._committed = {e.path for e in store.list("commits") if e.path.endswith(".parquet")}
        self._sums = ledger.Sums()
        self._labels: dict[str | None, int] = {}  # as the clips have them
        self._named: set[str] = set()  # shards of good commits
        self._open: set[int] = set()  # tasks without one

    def run(self) -> None:
        plan, facts = self._read_plan(), self._read_facts()
        joined = None if plan is None else self._joined(plan, facts)
        index = self._table(schema.INDEX, plan and schema.with_columns(schema.CLIPS, plan.columns))
        rows = _ByTask(index, None if plan is None else plan.tasks, self.faults)
        if plan is None:
            for task, table in rows.runs:  # the shards against the index alone
                for name, clips in _by_shard(table):
                    self.shards.check(task, name, clips, None)
        else:
            whole = self._tasks(plan, joined, rows)
            self._extras(plan)
            if whole and facts is not None and joined is not None and not rows.broken:
                assert index is not None
                self._sums.duplicates = _check_repeats(index, self.faults)
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
            self.faults.add(schema.DATASET_JSON, f"is no JSON: {_line(e)}", Mend.JOIN)
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
            self.faults.add(name, f"cannot be read: {_line(e)}", Mend.NONE)
        except BROKEN as e:
            self.faults.add(name, f"cannot be read: {_line(e)}", mend)
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
            self.faults.add(part.file, f"cannot be read: {_line(e)}", Mend.PLAN)
            return None

    def _tasks(self, plan: parts.Plan, joined: parts.Plan | None, rows: _ByTask) -> bool:
        """Every task's commit and shards, and its rows in the index and the rejects; whether all is accounted for."""
        files = [self._part(part) for part in plan.parts]
        rejects = _Rejects(self._table(schema.REJECTS_FILE, schema.REJECTS), self.faults)
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
                for name, clips in _by_shard(mine):
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
            table = ledger.read_commit(self._store, task)
            commit = _own_commit(task, table, plan)
            if sources is not None:
                ledger.check_commit(sources, table)
            return commit
        except FileNotFoundError:
            self.faults.add(name, "is missing", Mend.TASK, task)
        except DatasetError as e:
            self.faults.add(name, str(e), Mend.TASK, task)
        except StorageError as e:
            self.faults.add(name, f"cannot be read: {_line(e)}", Mend.NONE)
        except BROKEN as e:
            self.faults.add(name, f"cannot be read: {_line(e)}", Mend.TASK, task)
        return None

    def _check_shards(self, task: int, commit: _Commit) -> None:
        before = len(self.faults)
        for name, clips in _by_shard(commit.clips):
            self.shards.check(task, name, clips, commit.shards[name])
        self._named |= commit.shards.keys()
        if len(self.faults) == before:
            pairs = commit.clips.select(["label", "label_id"]).group_by(["label", "label_id"]).aggregate([])
            self._labels |= {row["label"]: row["label_id"] for row in pairs.to_pylist()}

    def _compare(
        self, task: int, commit: pa.Table, later: pa.Array | None, mine: pa.Table | None, rejects: _Rejects
    ) -> None:
        """A task's rows in the index and in the rejects are those of its commit that no later part tries again."""
        if later is not None:
            commit = commit.filter(pc.invert(pc.is_in(commit.column("source"), value_set=later)))
        good, bad = ledger.judged(commit, self._sums)
        rejects.compare(task, bad)
        if mine is None:
            return
        names = [n for n in mine.column_names if n != "duplicate_of"]
        words = _difference(good.select(names), mine.select(names), "key")
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
            self.faults.add(name, f"is damaged: {_line(e)}", mend)
            return
        for label, number in sorted((planned | clips).items()):
            if ids.get(label) != number:
                whose = "its clips have" if label in clips else "by the plan it is"
                self.faults.add(name, f"label {label!r} is {ids.get(label)}, {whose} {number}", mend)

    def _extras(self, plan: parts.Plan) -> None:
        """Files that no commit names. What a commit beyond the plan might name is left to a person."""
        beyond = {int(Path(p).stem) for p in self._committed if Path(p).stem.isdecimal()} - set(
            range(plan.tasks)
        )
        for task in sorted(beyond):
            words = f"is of no task of {schema.PLAN_JSON}; put back the plan that it is of, or remove it and its shards"
            self.faults.add(schema.commit_name(task), words, Mend.NONE)
        for entry in self._store.list("shards"):
            match = _SHARD.fullmatch(entry.path)
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
    foreign = [name for name in shards if _task_of(name) != task]
    if foreign:
        raise DatasetError(f"names {foreign[0]}: it is another task's")
    if set(pc.unique(clips.column("shard")).to_pylist()) != set(shards):
        raise DatasetError("its clips are not in the shards that it names")
    return _Commit(table, clips, shards)


def _difference(wanted: pa.Table, found: pa.Table, named: str) -> str:
    """The first difference between the rows of a task's commit and those found; "" where there is none."""
    if wanted.equals(found):
        return ""
    theirs, mine = wanted.column(named).to_pylist(), found.column(named).to_pylist()
    if len(theirs) != len(mine):
        odd = set(theirs) ^ set(mine)
        first = next((k for k in [*theirs, *mine] if k in odd or theirs.count(k) != mine.count(k)), "")
        return f"has {len(mine)} of the {len(theirs)} rows of a commit; {first} is lost or doubled"
    for column in wanted.column_names:
        pairs = zip(wanted.column(column).to_pylist(), found.column(column).to_pylist(), strict=True)
        for name, (a, b) in zip(theirs, pairs, strict=True):
            if a != b and not (a != a and b != b):  # NaN is NaN
                return f"{name}: {column} is {b!r}, the commit has {a!r}"
    return ""


class _ByTask:
    """The index's rows task by task, in one pass. `broken`: it could not be read to its end."""

    def __init__(self, file: pq.ParquetFile | None, tasks: int | None, faults: _Faults) -> None:
        self._file, self._tasks, self._faults = file, tasks, faults
        self.broken = file is None
        self.runs = self._runs()
        self._head = next(self.runs, None) if tasks is not None else None  # without a plan `runs` is all

    def _runs(self) -> Iterator[tuple[int, pa.Table]]:
        """Neighbouring rows of one task."""
        held: list[pa.Table] = []
        last = -1
        for batch in self._batches():
            shards = batch.column("shard").dictionary_encode().combine_chunks()
            of_shard = np.array([_task_of(name) for name in shards.dictionary.to_pylist()])
            task_N = of_shard[shards.indices.to_numpy()]
            starts = [0, *(np.flatnonzero(np.diff(task_N)) + 1).tolist(), len(task_N)]
            for start, end in itertools.pairwise(starts):
                task = int(task_N[start])
                if held and task != last:
                    yield last, pa.concat_tables(held)
                    held = []
                held, last = [*held, batch.slice(start, end - start)], task
        if held:
            yield last, pa.concat_tables(held)

    def _batches(self) -> Iterator[pa.Table]:
        try:
            for batch in self._file.iter_batches(ROWS) if self._file is not None else ():
                if batch.num_rows:
                    yield pa.Table.from_batches([batch])
        except BROKEN as e:
            self.broken = True
            self._faults.add(schema.INDEX, f"cannot be read: {_line(e)}", Mend.JOIN)

    def take(self, task: int) -> pa.Table | None:
        """The rows of this task, asked for in rising order; None where the index cannot be read."""
        while self._head is not None and not task <= self._head[0] < (self._tasks or 0):
            self._stray()
        found = None if self._file is None else self._file.schema_arrow.empty_table()
        if self._head is not None and self._head[0] == task:
            found, self._head = self._head[1], next(self.runs, None)
        return None if self.broken else found

    def _stray(self) -> None:
        assert self._head is not None
        _, rows = self._head
        words = (
            f"{rows.num_rows} rows from {rows.column('key')[0]} ({rows.column('shard')[0]}) are out of place"
        )
        self._faults.add(schema.INDEX, words, Mend.JOIN)
        self._head = next(self.runs, None)

    def end(self) -> None:
        """There must be no more rows."""
        while self._head is not None:
            self._stray()


class _Rejects:
    """The rows of rejects.parquet, in one pass, until they are no longer those of the commits."""

    def __init__(self, file: pq.ParquetFile | None, faults: _Faults) -> None:
        self._faults = faults
        self._batches = iter(()) if file is None else file.iter_batches(ROWS)
        self._held = schema.REJECTS.empty_table()
        self._different = file is None
        self.stopped = False  # a commit is not there to compare with

    def _take(self, n: int) -> pa.Table:
        while self._held.num_rows < n:
            batch = next(self._batches, None)
            if batch is None:
                break
            self._held = pa.concat_tables([self._held, pa.Table.from_batches([batch])])
        found, self._held = self._held.slice(0, n), self._held.slice(n)
        return found

    def compare(self, task: int, wanted: pa.Table) -> None:
        """The next rows are these of a task's commit."""
        if self._different or self.stopped:
            return
        try:
            found = self._take(wanted.num_rows)
            words = _difference(wanted.select(found.column_names), found, "source")
        except BROKEN as e:
            words = f"cannot be read: {_line(e)}"
        if words:
            self._different = True
            self._faults.add(schema.REJECTS_FILE, f"{words} ({schema.commit_name(task)})", Mend.JOIN)

    def stop(self) -> None:
        """A commit is not there: what follows cannot be told."""
        self.stopped = True

    def end(self, told: bool) -> None:
        """There must be no more rows."""
        if told and not self._different and not self.stopped and self._take(1).num_rows:
            self._faults.add(schema.REJECTS_FILE, "has rows of no commit", Mend.JOIN)


def _check_repeats(index: pq.ParquetFile, faults: _Faults) -> int:
    """How many clips repeat another; each must name an earlier one that is itself no repeat."""
    kept = [
        pc.unique(batch.column("duplicate_of")).drop_null()
        for batch in index.iter_batches(ROWS, columns=["duplicate_of"])
    ]
    names = pc.unique(pa.chunked_array(kept, pa.string()))
    at_N = np.full(len(names), np.iinfo(np.int64).max)  # where each named clip is, where it is no repeat
    row = count = 0
    for batch in index.iter_batches(ROWS, columns=["key", "duplicate_of"]):
        of = batch.column("duplicate_of")
        mine = pc.index_in(pc.if_else(pc.is_null(of), batch.column("key"), None), value_set=names)
        mine_N, of_N = (
            pc.fill_null(a, -1).to_numpy(zero_copy_only=False)
            for a in (mine, pc.index_in(of, value_set=names))
        )
        here = np.flatnonzero(mine_N >= 0)
        at_N[mine_N[here]] = row + here
        for i in np.flatnonzero(of_N >= 0):
            count += 1
            if at_N[of_N[i]] >= row + i:
                words = (
                    f"{batch.column('key')[i]} repeats {of[i]}, which is no earlier clip, or itself a repeat"
                )
                faults.add(schema.INDEX, words, Mend.JOIN)
        row += batch.num_rows
    return count


class _Shards:
    """Tars against the rows of their clips, and their DALI index against them; counts what was looked at."""

    def __init__(self, store: Store, folder: Path, decoders: _Decoders | None, faults: _Faults) -> None:
        self._store, self._decoders, self._faults = store, decoders, faults
        self._tar = folder / "shard.tar"
        self.count = self.clips = self.bytes = 0

    def check(self, task: int, name: str, rows: list[Row], size: int | None) -> None:
        """One shard: its clips' rows in order, and its bytes as the commit has them."""
        try:
            self._store.download(name, self._tar)
            before = len(self._faults)
            self._check_tar(task, name, rows, size)
            if len(self._faults) == before:
                self._check_idx(name)
        except FileNotFoundError:
            self._faults.add(name, "is missing", Mend.TASK, task)
        except StorageFullError:
            raise
        except StorageError as e:
            self._faults.add(name, f"cannot be read: {_line(e)}", Mend.NONE)

    def _check_idx(self, name: str) -> None:
        idx = name.removesuffix(".tar") + ".idx"
        try:
            if self._store.read_bytes(idx) != dali_index(self._tar).encode("ascii"):
                self._faults.add(idx, f"is not the index of {name}", Mend.IDX)
        except FileNotFoundError:
            self._faults.add(idx, "is missing", Mend.IDX)

    def _check_tar(self, task: int, name: str, rows: list[Row], size: int | None) -> None:
        there = self._tar.stat().st_size
        self.count += 1
        self.bytes += there
        if size is not None and there != size:
            self._faults.add(name, f"is {there} bytes long, its commit has {size}", Mend.TASK, task)
            return
        end = 0
        with self._tar.open("rb") as file:
            for row in rows:
                self.clips += 1
                try:
                    data = _clip(file, end, row)
                    if self._decoders is not None:
                        self._told(self._decoders.add(task, name, row, data))
                except (DatasetError, tarfile.TarError, ValueError) as e:
                    self._faults.add(name, f"clip {row['key']}: {_line(e)}", Mend.TASK, task)
                end = _padded(max(0, row["offset"]) + max(0, row["size"]))
            file.seek(end)
            tail = file.read()
        if len(tail) < 2 * BLOCK or tail.strip(b"\0"):
            self._faults.add(name, f"its end, from byte {end}, is not that of a tar", Mend.TASK, task)

    def _told(self, decoded: list[Fault]) -> None:
        self._faults.extend(decoded)

    def drain(self) -> None:
        """Wait for the clips that are still being decoded."""
        if self._decoders is not None:
            self._told(self._decoders.rest())


def _clip(file: IO[bytes], start: int, row: Row) -> bytes:
    """The video of the clip whose members begin at `start`; DatasetError where a byte is not as it must be."""
    text = _member(file, start, f"{row['key']}.json")
    video = _padded(start + BLOCK + len(text))
    if row["offset"] != video + BLOCK:
        raise DatasetError(f"its video is at byte {video + BLOCK}, its row has {row['offset']}")
    data = _member(file, video, f"{row['key']}.mp4")
    if len(data) != row["size"] or hashlib.sha256(data).hexdigest() != row["sha256"]:
        raise DatasetError("its bytes are not those of its row (sha256)")
    found, wanted = json.loads(text), _facts(row)
    if not isinstance(found, dict):
        raise DatasetError("its .json is no JSON object")
    own = found.pop("manifest", {})
    found |= {"manifest": {k: v for k, v in own.items() if v is not None}} if isinstance(own, dict) else {}
    for key in sorted(found.keys() | wanted.keys()):
        if key not in found or key not in wanted or found[key] != wanted[key]:
            raise DatasetError(f"its .json has {key} {found.get(key)!r}, its row {wanted.get(key)!r}")
    return data


def _facts(row: Row) -> Row:
    """What a clip's .json says (see Packer.add), of its row."""
    own = {k: v for k, v in row.items() if k not in schema.CLIPS.names and v is not None}
    same = ("codec", "fps", "frames", "height", "label", "label_id", "source", "width")
    return {k: row[k] for k in same} | {"span_s": [row["span_start_s"], row["span_end_s"]], "manifest": own}


def _member(file: IO[bytes], start: int, name: str) -> bytes:
    """The bytes of the member whose header is at `start`, which must be this one's; the padding must be zero."""
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


class _Decoders:
    """Decodes clips whole on all cores, each with a child of its own. A few clips wait at a time. Use as a context."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sandbox = Sandbox()
        self._cores = usable_cores()
        self._pool = ThreadPoolExecutor(self._cores, thread_name_prefix="verify")
        self._mine = threading.local()
        self._probers: list[Prober] = []
        self._waiting: deque[Future[Fault | None]] = deque()
        self._number = 0

    def add(self, task: int, shard: str, row: Row, data: bytes) -> list[Fault]:
        """Hand over one clip; the faults of those before that are done."""
        self._number += 1
        path = self._folder / f"{self._number}.mp4"
        path.write_bytes(data)
        self._waiting.append(self._pool.submit(self._decode, path, task, shard, row))
        return self._done(3 * self._cores)

    def rest(self) -> list[Fault]:
        """The faults of all that wait."""
        return self._done(0)

    def _done(self, waiting: int) -> list[Fault]:
        found = []
        while len(self._waiting) > waiting:
            fault = self._waiting.popleft().result()
            found += [] if fault is None else [fault]
        return found

    def _decode(self, path: Path, task: int, shard: str, row: Row) -> Fault | None:
        try:
            words = self._compared(path, row)
        except ChildCrashedError:  # perhaps killed by somebody else, out of memory: once more
            words = self._compared(path, row, again=True)
        finally:
            path.unlink()
        return Fault(shard, f"{shard}: clip {row['key']}: {words}", Mend.TASK, task) if words else None

    def _compared(self, path: Path, row: Row, again: bool = False) -> str:
        try:
            clip = self._prober.verify([path], wall_s=120 + row["frames"])[0]
        except ChildCrashedError as e:
            if not again:
                raise
            return f"decoding {e}"
        except ChildError as e:
            return f"decoding {e}"
        return clip.fault(
            frames=row["frames"], fps=Fraction(row["fps"]).limit_denominator(1001), width=row["width"],
            height=row["height"], codec=row["codec"], untagged=row["encoder"] == "copy",
        )  # fmt: skip

    @property
    def _prober(self) -> Prober:
        if not hasattr(self._mine, "prober"):
            self._mine.prober = Prober(self._sandbox, self._folder)
            self._probers.append(self._mine.prober)
        return self._mine.prober

    def __enter__(self) -> _Decoders:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._sandbox.kill_all()
        self._pool.shutdown(cancel_futures=True)
        for prober in self._probers:
            prober.close()


def _by_shard(clips: pa.Table | None) -> Iterator[tuple[str, list[Row]]]:
    """The rows of each shard, as they come."""
    names = [] if clips is None else clips.column("shard").to_pylist()
    start = 0
    for name, same in itertools.groupby(names):
        end = start + sum(1 for _ in same)
        assert clips is not None
        yield name, clips.slice(start, end - start).to_pylist()
        start = end


def _task_of(shard: str) -> int:
    """The task that a shard is of, by its name; -1 where it is no name of a shard."""
    match = _SHARD.fullmatch(shard)
    return int(match.group(1)) if match else -1


def _padded(end: int) -> int:
    return -(-end // BLOCK) * BLOCK


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
