"""Commit records as they lie at a DST: one parquet a task, its clip rows and reject rows (schema.COMMITS)."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from reelmae.pipeline.schema import REJECT, REJECTS, commit_name
from reelmae.pipeline.storage.store import Store


def read_commit(store: Store, task: int) -> pa.Table:
    """One task's commit record."""
    return pq.read_table(pa.BufferReader(store.read_bytes(commit_name(task))))


def old_rejects(store: Store, task: int) -> dict[str, dict[str, Any]]:
    """url → reject row of the sources that a task's commit rejects as a whole; none where it cannot be read."""
    try:
        rows = read_commit(store, task).select([*REJECTS.names, "kind"]).to_pylist()
    except (FileNotFoundError, pa.ArrowException, KeyError):
        return {}
    return {
        row["source"]: {name: row[name] for name in ("source", "reason", "detail")}
        for row in rows
        if row["kind"] == REJECT and row["span_start_s"] is None
    }
