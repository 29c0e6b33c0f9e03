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
OF_THE_MACHINE = ("reelmae", "tools")  # what dataset.json says of the last join, not of the clips
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
    """A commit that holds together: its rows as they were written, its shards and their bytes."""

    table: pa.Table
    shards: dict[str, int]


class _Check:
    """The dataset as a whole. `plan` is the plan there, `joined` that of the index; None where it cannot be told."""

    def __init__(self, store: Store, folder: Path, decoders: _Decoders | None, stack: ExitStack) -> None:
        self._store, self._folder, self._stack = store, folder, stack
        self.faults = _Faults()
        self.shards = _Shards(store, folder, decoders, self.faults)
        self._sums: ledger.Sums | None = ledger.Sums()  # None: cannot be told
        self._labels: dict[str, int] = {}  # as the clips have them
        self._named: set[str] = set()  # shards of good commits
        self._open: set[int] = set()  # tasks without one

    def run(self) -> None:
        plan, facts = self._read_plan(), self._read_facts()
        joined = None if plan is None else self._joined(plan, facts)
        columns = schema.with_columns(schema.CLIPS, plan.columns) if plan is not None else None
        index = self._table(schema.INDEX, columns)
        rows = None if index is None else _ByTask(index, None if plan is None else plan.tasks, self.faults)
        if plan is None:
            self._by_the_index(rows)
        else:
            self._tasks(plan, joined, rows)
            self._check_labels(plan)
            self._extras(plan)
        self.shards.drain()
        if joined is None or rows is None or rows.broken or self._sums is None or facts is None:
            return
        assert index is not None
        self._sums.duplicates = _check_repeats(index, self.faults)
        wanted = ledger.dataset_facts(joined, self._sums)
        for key in sorted(wanted.keys() - {*OF_THE_MACHINE, "plan"}):
            if facts.get(key) != wanted[key]:
                words = f"{key} is {facts.get(key)!r}, found {wanted[key]!r}"
                self.faults.add(schema.DATASET_JSON, words, Mend.JOIN)

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

    def _joined(self, plan: parts.Plan, facts: Row | None) -> parts.Plan | None:
        """The plan that the index was joined from: all parts there are, or the first ones where more came since."""
        if facts is None or facts.get("plan") == plan.digest():
            return plan
        older = (plan.model_copy(update={"parts": plan.parts[:n]}) for n in range(1, len(plan.parts)))
        found = next((p for p in older if p.digest() == facts.get("plan")), None)
        if found is None:
            words = f"is of plan {facts.get('plan')!r}, the plan there is {plan.digest()!r}"
            self.faults.add(schema.DATASET_JSON, words, Mend.JOIN)
            return plan
        kind = "an append" if plan.parts[-1].retry is None else "a retry"
        words = f"{kind} has not finished; run `reelmae shard` again"
        if all(schema.commit_name(t) in self._commits for t in range(plan.tasks)):
            self.faults.add(schema.DATASET_JSON, words, Mend.JOIN)
            return None  # stopped while it joined: the index may be the old one or the new one
        self.faults.add(schema.DATASET_JSON, words, Mend.NONE)
        return found

    @property
    def _commits(self) -> set[str]:
        if not hasattr(self, "_listed"):
            self._listed = {e.path for e in self._store.list("commits") if e.path.endswith(".parquet")}
        return self._listed

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

    def _by_the_index(self, rows: _ByTask | None) -> None:
        """Without a plan: the shards against the index alone."""
        for task, table in rows.runs if rows is not None else ():
            for name, clips in _by_shard(table):
                self.shards.check(task, name, clips, None)

    def _tasks(self, plan: parts.Plan, joined: parts.Plan | None, rows: _ByTask | None) -> None:
        files = [self._part(part) for part in plan.parts]
        retried: list[pa.Array | None] | None = None
        if joined is not None and None not in files:
            retried = ledger.retried_urls(self._store, joined)
        rejects = _Rejects(self._table(schema.REJECTS_FILE, schema.REJECTS), self.faults)
        for number, (part, file) in enumerate(zip(plan.parts, files, strict=True)):
            inside = joined is not None and number < len(joined.parts)
            for task in range(part.first_task, part.first_task + part.tasks):
                mine = rows.take(task) if rows is not None and inside else None
                if not inside and joined is not None and schema.commit_name(task) not in self._commits:
                    self._open.add(task)
                    continue
                commit = self._commit(task, plan, self._sources(file, part, task))
                if commit is None:
                    self._open.add(task)
                    self._sums = self._sums if not inside else None
                    rejects.skip()
                    for name, clips in _by_shard(mine):
                        self.shards.check(task, name, clips, None)
                    continue
                self._named |= commit.shards.keys()
                if inside and retried is None:
                    self._sums = None
                elif inside and retried is not None and self._sums is not None:
                    good, bad = ledger.judged(pa.table({}), _without(commit.table, retried[number]), self._sums)
                    _compare_clips(task, good, mine, self.faults)
                    rejects.compare(task, bad)
                elif inside and retried is not None:
                    good, _ = ledger.judged(
                        pa.table({}), _without(commit.table, retried[number]), ledger.Sums()
                    )
                    _compare_clips(task, good, mine, self.faults)
                self._check_shards(task, commit)
        rejects.end(joined is not None and retried is not None)
        if rows is not None and joined is not None:
            rows.end(joined.tasks)
