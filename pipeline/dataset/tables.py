"""The index and the rejects are compared row by row with the commits, one task at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from reelmae.pipeline import schema
from reelmae.pipeline.dataset.faults import FaultList, Mend, first_line, task_of

ROWS = 10_000  # read from a table at a time
BROKEN = (pa.ArrowException, OSError, ValueError, KeyError, TypeError)  # what a damaged table raises
Row = dict[str, Any]
"""A row of a table: column → value."""


def difference(wanted: pa.Table, found: pa.Table, named: str) -> str:
    """The first difference between the rows of a task's commit and those found; "" where there is none.

    `named`: the column that names a row in the message.
    """
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
            if a != b and not (a != a and b != b):  # NaN equals NaN here
                return f"{name}: {column} is {b!r}, the commit has {a!r}"
    return ""


class IndexRows:
    """The rows of the index, task by task, in one pass."""

    def __init__(self, file: pq.ParquetFile | None, tasks: int | None, format: int, faults: FaultList) -> None:
        self._file, self._tasks, self._format, self._faults = file, tasks, format, faults
        self.broken = file is None  # the index could not be read to its end
        self.runs = self._runs()
        self._head = next(self.runs, None) if tasks is not None else None  # without a plan, `runs` holds all rows

    def _runs(self) -> Iterator[tuple[int, pa.Table]]:
        """Neighbouring rows of one task, with the task."""
        held: list[pa.Table] = []
        last = -1
        for batch in self._batches():
            shards = batch.column("shard").dictionary_encode().combine_chunks()
            of_shard = np.array([task_of(name, self._format) for name in shards.dictionary.to_pylist()])
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
            self._faults.add(schema.INDEX, f"cannot be read: {first_line(e)}", Mend.JOIN)

    def take(self, task: int) -> pa.Table | None:
        """The rows of this task; None where the index cannot be read. Ask for tasks in rising order."""
        while self._head is not None and not task <= self._head[0] < (self._tasks or 0):
            self._skip_stray_rows()
        found = None if self._file is None else self._file.schema_arrow.empty_table()
        if self._head is not None and self._head[0] == task:
            found, self._head = self._head[1], next(self.runs, None)
        return None if self.broken else found

    def _skip_stray_rows(self) -> None:
        assert self._head is not None
        _, rows = self._head
        words = f"{rows.num_rows} rows from {rows.column('key')[0]} ({rows.column('shard')[0]}) are out of place"
        self._faults.add(schema.INDEX, words, Mend.JOIN)
        self._head = next(self.runs, None)

    def end(self) -> None:
        """All tasks were taken: rows that are left are a fault."""
        while self._head is not None:
            self._skip_stray_rows()


class RejectRows:
    """The rows of rejects.parquet, in one pass. The pass ends at the first difference from the commits."""

    def __init__(self, file: pq.ParquetFile | None, format: int, faults: FaultList) -> None:
        self._format, self._faults = format, faults
        self._batches = iter(()) if file is None else file.iter_batches(ROWS)
        self._held = schema.REJECTS.empty_table()
        self._different = file is None
        self.stopped = False  # a commit is missing, so there is nothing to compare with

    def _take(self, n: int) -> pa.Table:
        while self._held.num_rows < n:
            batch = next(self._batches, None)
            if batch is None:
                break
            self._held = pa.concat_tables([self._held, pa.Table.from_batches([batch])])
        found, self._held = self._held.slice(0, n), self._held.slice(n)
        return found

    def compare(self, task: int, wanted: pa.Table) -> None:
        """Compare the next rows with those of a task's commit."""
        if self._different or self.stopped:
            return
        try:
            found = self._take(wanted.num_rows)
            words = difference(wanted.select(found.column_names), found, "source")
        except BROKEN as e:
            words = f"cannot be read: {first_line(e)}"
        if words:
            self._different = True
            self._faults.add(schema.REJECTS_FILE, f"{words} ({schema.commit_name(task, self._format)})", Mend.JOIN)

    def stop(self) -> None:
        """A commit is missing: from here on the rows have nothing to be compared with."""
        self.stopped = True

    def end(self, complete: bool) -> None:
        """Rows that are left are a fault, if every task was compared (`complete`)."""
        if complete and not self._different and not self.stopped and self._take(1).num_rows:
            self._faults.add(schema.REJECTS_FILE, "has rows of no commit", Mend.JOIN)


def check_repeats(index: pq.ParquetFile, faults: FaultList) -> int:
    """Count the clips that repeat another. Each must name an earlier clip that is not itself a repeat."""
    kept = [
        pc.unique(batch.column("duplicate_of")).drop_null()
        for batch in index.iter_batches(ROWS, columns=["duplicate_of"])
    ]
    names = pc.unique(pa.chunked_array(kept, pa.string()))
    at_N = np.full(len(names), np.iinfo(np.int64).max)  # row of each named clip that is not itself a repeat
    row = count = 0
    for batch in index.iter_batches(ROWS, columns=["key", "duplicate_of"]):
        of = batch.column("duplicate_of")
        mine = pc.index_in(pc.if_else(pc.is_null(of), batch.column("key"), None), value_set=names)
        mine_N, of_N = (
            pc.fill_null(a, -1).to_numpy(zero_copy_only=False) for a in (mine, pc.index_in(of, value_set=names))
        )
        here = np.flatnonzero(mine_N >= 0)
        at_N[mine_N[here]] = row + here
        for i in np.flatnonzero(of_N >= 0):
            count += 1
            if at_N[of_N[i]] >= row + i:
                words = f"{batch.column('key')[i]} repeats {of[i]}, which is not an earlier clip or is itself a repeat"
                faults.add(schema.INDEX, words, Mend.JOIN)
        row += batch.num_rows
    return count
