"""Pure: a manifest's rows → sources; sources and a seed → the order they are processed in and their tasks.

The order is a shuffle, so that every shard is a fair mix of the bucket and reading one end to end is close to
random. The members of a tar stay together, in the tar's order, so that it is read once. Tasks are runs of that order.
Neither depends on the number of workers or machines.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from reelmae.pipeline.schema import SOURCES, TAR_COLUMNS, source_columns

LISTED = pa.schema([f for f in SOURCES if f.name != "task"])
MEMBERS = pa.schema([*LISTED, *TAR_COLUMNS])  # where some are members of tars
# a manifest's rows: start is WHOLE where a row names the whole source, end is OPEN where it has no end
ROWS = pa.schema(
    [
        pa.field("url", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("start", pa.float64(), nullable=False),
        pa.field("end", pa.float64(), nullable=False),
        pa.field("extra", pa.string()),
        pa.field("line", pa.int64(), nullable=False),
    ]
)
WHOLE, OPEN = -1.0, math.inf


def sources_per_task(n_sources: int, wanted: int | None) -> int:
    """How many sources a task holds: `wanted`, else a 64th of all, at least 8 and at most 256."""
    return wanted or min(256, max(8, -(-n_sources // 64)))


def has_tars(sources: pa.Table) -> bool:
    """Whether some of these sources are members of tars."""
    return "tar" in sources.column_names and sources.column("tar").null_count < sources.num_rows


def deal_sources(sources: pa.Table, *, seed: int, per_task: int, limit: int | None = None) -> pa.Table:
    """The sources (LISTED or MEMBERS, sorted by url) in processing order, with their task (schema.source_columns).

    limit: the most that are taken, a fair draw.
    """
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(sources.num_rows)[:limit]
    tars = has_tars(sources)
    if tars:
        order = _keep_together(sources, order)
    tasks = pa.array(np.arange(len(order), dtype=np.int32) // per_task, pa.int32())
    columns = source_columns(tars)
    return sources.take(pa.array(order)).append_column("task", tasks).select(columns.names).cast(columns)


def _keep_together(sources: pa.Table, order: np.ndarray) -> np.ndarray:
    """This order, in which the members of a tar follow the first of them, in the order of the tar."""
    taken = pa.array(order)
    tar = sources.column("tar").take(taken).combine_chunks().dictionary_encode()
    offset = sources.column("offset").take(taken).fill_null(0).to_numpy()
    place = np.arange(len(order))
    in_tar = tar.is_valid().to_numpy(zero_copy_only=False)
    group = np.where(in_tar, tar.indices.fill_null(0).to_numpy(), len(tar.dictionary) + place)
    by_group = np.lexsort((offset, group))
    new = np.ones(len(order), bool)
    new[1:] = group[by_group][1:] != group[by_group][:-1]
    first = by_group[np.flatnonzero(new)][np.cumsum(new) - 1]  # for each, its group's first member
    return order[by_group[np.lexsort((offset[by_group], first))]]


def write_plan(planned: pa.Table, path: Path, per_task: int) -> None:
    """Write planned sources to a Parquet file: row group 0 holds the table's first task, and so on."""
    planned = planned.combine_chunks()
    with pq.ParquetWriter(path, planned.schema) as writer:
        for start in range(0, planned.num_rows, per_task):
            writer.write_table(planned.slice(start, per_task), row_group_size=per_task)


def label_ids(labels: Iterable[str], known: dict[str, int] | None = None) -> dict[str, int]:
    """label → id: those of `known` as they are, then the others from the next id on, sorted by name."""
    ids = dict(known or {})
    first = max(ids.values(), default=-1) + 1
    return ids | {name: i for i, name in enumerate(sorted(set(labels) - ids.keys()), first)}


def group_rows(rows: pa.Table, unit: str, most: int) -> tuple[pa.Table, list[tuple[int, str]], int]:
    """A manifest's rows (ROWS) → its sources (LISTED, sorted by url), the first `most` faults and the count of all.

    A fault is (line, words). Two things are faults: a row that repeats an earlier one, and a source that is named
    whole in one row and in part in another. `unit` is what the messages call a line. `rows` is null for a source
    with a single row that names the whole of it and carries nothing but a label.
    """
    order = pc.sort_indices(rows.column("url"))
    urls = rows.column("url").take(order)
    new = np.ones(len(order), bool)  # True at the first row of each url
    new[1:] = pc.not_equal(urls.slice(1), urls.slice(0, len(order) - 1)).to_numpy()
    group = np.cumsum(new) - 1
    if not new.all():
        start, end, line = (rows.column(name).take(order).to_numpy() for name in ("start", "end", "line"))
        order = order.take(pa.array(np.lexsort((line, end, start, group))))
    del urls
    rows = rows.take(order)
    first = np.flatnonzero(new)  # the first row of each group; sorting within groups has not moved it
    label = pc.dictionary_encode(rows.column("label"), null_encoding="encode").combine_chunks()
    codes = label.indices.to_numpy()
    other = np.add.reduceat(codes != codes[first[group]], first, dtype=np.int64)
    table = rows.select(["url", "label"]).take(pa.array(first))
    listed = pa.Table.from_arrays(
        [
            table.column("url"),
            pa.array(np.full(len(first), -1)),
            pa.repeat("", len(first)),
            pc.if_else(pa.array(other == 0), table.column("label"), None),
            _row_lists(rows, first),
        ],
        LISTED.names,
    ).cast(LISTED)
    return listed, *_find_faults(rows, new, first, group, unit, most)


def _row_lists(rows: pa.Table, first: np.ndarray) -> pa.Array:
    """The rows of each group as a list, or null where they carry nothing but a label."""
    counts = np.diff(np.append(first, rows.num_rows))
    start, end = rows.column("start").to_numpy(), rows.column("end").to_numpy()
    plain = (counts == 1) & (start[first] == WHOLE) & rows.column("extra").is_null().to_numpy()[first]
    kept = rows.filter(pa.array(np.repeat(~plain, counts)))  # a null list must be empty, or Parquet refuses it
    start, end = kept.column("start").to_numpy(), kept.column("end").to_numpy()
    fields = SOURCES.field("rows").type.value_type
    values = pa.StructArray.from_arrays(
        [
            pa.array(start, mask=start == WHOLE),
            pa.array(end, mask=end == OPEN),
            _one_chunk(kept.column("label")),
            _one_chunk(kept.column("extra")),
        ],
        fields=list(fields),
    )
    offsets = np.zeros(len(first) + 1, np.int32)
    np.cumsum(np.where(plain, 0, counts), out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=SOURCES.field("rows").type, mask=pa.array(plain))


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    whole = column.combine_chunks()
    return pa.concat_arrays(whole.chunks) if isinstance(whole, pa.ChunkedArray) else whole


def _find_faults(
    rows: pa.Table, new: np.ndarray, first: np.ndarray, group: np.ndarray, unit: str, most: int
) -> tuple[list[tuple[int, str]], int]:
    """The first `most` faults, by line, and the count of all: repeated rows, and sources named whole and in part."""
    start, end, line = (rows.column(name).to_numpy() for name in ("start", "end", "line"))
    again = np.zeros(len(new), bool)
    again[1:] = ~new[1:] & (start[1:] == start[:-1]) & (end[1:] == end[:-1])
    original = np.maximum.accumulate(np.where(again, 0, np.arange(len(new))))
    part = ~new & (start != WHOLE) & (start[first[group]] == WHOLE)
    wrong = np.flatnonzero(again | part)
    faults = []
    for i in wrong[np.argsort(line[wrong])][:most]:
        url, label = rows.column("url")[i].as_py(), rows.column("label")[original[i]].as_py()
        if again[i]:
            words = f" (with label {label!r})" if label is not None else ""
            words = f"{url!r} is named in {unit} {line[original[i]]} already{words}; remove one"
        else:
            words = f"{url!r} is named whole in {unit} {line[first[group[i]]]}, here in part; keep one of the two"
        faults.append((int(line[i]), words))
    return faults, len(wrong)
