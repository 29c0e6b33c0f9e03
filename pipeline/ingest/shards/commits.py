"""Commit records as they lie at a DST: one parquet a task, its clip rows and reject rows (schema.commit_columns)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from reelmae.pipeline.errors import DatasetError
from reelmae.pipeline.schema import REJECT, REJECTS, commit_name
from reelmae.pipeline.storage.access import interruptible
from reelmae.pipeline.storage.checked import read_agreed
from reelmae.pipeline.storage.store import Store

READ_AHEAD = 8  # commits
FOREIGN = "is not a commit record of a task; remove it, or give it its name back"


def committed_tasks(store: Store, format: int, on_foreign: Callable[[str], None] | None = None) -> set[int]:
    """The tasks that are done: those whose commit record is there under its exact name in this format of dataset.

    Any other .parquet file among the commits is foreign: it may be a commit that was renamed, or moved to where
    another format has it. Its path is given to `on_foreign`; without that it raises DatasetError.
    """
    tasks: set[int] = set()
    for entry in store.list("commits"):
        if not entry.path.endswith(".parquet"):
            continue
        number = PurePosixPath(entry.path).stem
        if number.isdecimal() and entry.path == commit_name(int(number), format):
            tasks.add(int(number))
        elif on_foreign is not None:
            on_foreign(entry.path)
        else:
            raise DatasetError(f"{entry.url}: {FOREIGN}")
    return tasks


def read_commit(store: Store, task: int, format: int) -> pa.Table:
    """One task's commit record. A damaged one raises what pyarrow raises (ArrowException, OSError)."""
    # not pq.read_table, and no threads: for files as small as these both cost more than they save
    with pq.ParquetFile(pa.BufferReader(read_agreed(store, commit_name(task, format)))) as file:
        return file.read(use_threads=False)


def read_commits(store: Store, tasks: Iterable[int], format: int) -> Generator[pa.Table, None, None]:
    """The commit records of tasks, in their order. Of a remote store READ_AHEAD are read at a time and held at most."""
    if store.is_local:
        yield from (read_commit(store, task, format) for task in tasks)
        return
    pool = ThreadPoolExecutor(READ_AHEAD, thread_name_prefix="commits")
    try:
        waiting: deque[Future[pa.Table]] = deque()
        for task in tasks:
            if len(waiting) == READ_AHEAD:
                yield _result(waiting.popleft(), pool)
            waiting.append(pool.submit(read_commit, store, task, format))
        while waiting:
            yield _result(waiting.popleft(), pool)
    finally:
        pool.shutdown(cancel_futures=True)


def _result(commit: Future[pa.Table], pool: ThreadPoolExecutor) -> pa.Table:
    with interruptible(pool):
        return commit.result()


def read_rejects(store: Store, task: int, format: int) -> dict[str, dict[str, Any]]:
    """url → reject row of the sources that a task's commit rejects as a whole; none where it cannot be read."""
    try:
        rows = read_commit(store, task, format).select([*REJECTS.names, "kind"]).to_pylist()
    except (OSError, pa.ArrowException, KeyError):
        return {}
    return {
        row["source"]: {name: row[name] for name in ("source", "reason", "detail")}
        for row in rows
        if row["kind"] == REJECT and row["span_start_s"] is None
    }
