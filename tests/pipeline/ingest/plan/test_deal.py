"""The plan: rows gathered into sources, a permutation in tasks, the same for the same seed."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reelmae.pipeline.ingest.plan.deal import (
    LISTED,
    MEMBERS,
    OPEN,
    ROWS,
    WHOLE,
    deal_sources,
    group_rows,
    label_ids,
    sources_per_task,
    write_plan,
)
from reelmae.pipeline.schema import SOURCES, source_columns


def _listed(n: int) -> pa.Table:
    span = [{"start_s": 1.0, "end_s": None, "label": "x", "extra": '{"a": 1}'}]
    rows = [
        {"url": f"/b/{i:05d}", "size": i, "etag": "", "label": None, "rows": span * i if i % 3 == 1 else None}
        for i in range(n)
    ]
    return pa.Table.from_pylist(rows, LISTED)


@pytest.mark.parametrize(("n", "wanted", "size"), [(1, None, 8), (600, None, 10), (10**6, None, 256), (50, 3, 3)])
def test_task_size_depends_on_the_number_of_sources_only(n: int, wanted: int | None, size: int) -> None:
    assert sources_per_task(n, wanted) == size


def test_plan_is_a_permutation_in_tasks() -> None:
    planned = deal_sources(_listed(100), seed=5, per_task=8)
    assert planned.schema.equals(SOURCES)
    assert sorted(planned.column("url").to_pylist()) == _listed(100).column("url").to_pylist()
    assert planned.column("task").to_pylist() == [i // 8 for i in range(100)]
    by_url = {row["url"]: row["rows"] for row in planned.to_pylist()}
    assert by_url == {row["url"]: row["rows"] for row in _listed(100).to_pylist()}


def test_a_row_group_is_a_task(tmp_path: Path) -> None:
    planned = deal_sources(_listed(100), seed=5, per_task=8)
    write_plan(planned, tmp_path / "sources.parquet", 8)
    with pq.ParquetFile(tmp_path / "sources.parquet") as file:
        assert file.metadata.num_row_groups == 13
        for task in range(13):
            assert file.read_row_group(task).equals(planned.slice(8 * task, 8))
        assert file.schema_arrow.equals(SOURCES)
    write_plan(planned.slice(16), tmp_path / "part.parquet", 8)
    with pq.ParquetFile(tmp_path / "part.parquet") as file:
        assert file.read_row_group(0).column("task").to_pylist() == [2] * 8


def test_same_seed_same_plan_other_seed_another() -> None:
    assert deal_sources(_listed(50), seed=1, per_task=8).equals(deal_sources(_listed(50), seed=1, per_task=8))
    assert not deal_sources(_listed(50), seed=1, per_task=8).equals(deal_sources(_listed(50), seed=2, per_task=8))


def _with_tars(loose: int, tars: int, members: int) -> pa.Table:
    """Loose sources and members of tars; the names of members are no order, and neither are their rows."""
    rows = [{"url": f"/b/{i:05d}", "size": i, "etag": ""} for i in range(loose)]
    rows += [
        {"url": f"/b/{t}.tar#{m * 7 % 10}-{m}", "size": m, "etag": "", "tar": f"/b/{t}.tar", "offset": m, "end": m + 1}
        for t in range(tars)
        for m in range(members)
    ]
    return pa.Table.from_pylist(rows, MEMBERS).sort_by("url")


def test_loose_sources_are_dealt_as_they_always_were() -> None:
    order = np.random.Generator(np.random.Philox(key=5)).permutation(100)
    urls = [f"/b/{i:05d}" for i in order]
    assert deal_sources(_listed(100), seed=5, per_task=8).column("url").to_pylist() == urls
    assert deal_sources(_listed(100), seed=5, per_task=8, limit=9).column("url").to_pylist() == urls[:9]
    without = deal_sources(_with_tars(100, 0, 0), seed=5, per_task=8)
    assert without.schema.equals(SOURCES)
    assert without.column("url").to_pylist() == urls


def test_members_of_a_tar_stay_together_in_its_order(tmp_path: Path) -> None:
    table = _with_tars(loose=200, tars=50, members=20)
    planned = deal_sources(table, seed=3, per_task=32)
    assert planned.schema.equals(source_columns(tars=True))
    assert sorted(planned.column("url").to_pylist()) == sorted(table.column("url").to_pylist())
    assert planned.column("task").to_pylist() == [i // 32 for i in range(1200)]
    groups = [(tar, [row["offset"] for row in rows]) for tar, rows in itertools.groupby(planned.to_pylist(), _tar_of)]
    in_tars = [(tar, offsets) for tar, offsets in groups if tar is not None]
    assert [offsets for _, offsets in in_tars] == [list(range(20))] * 50
    order = [tar for tar, _ in in_tars]
    assert len(set(order)) == 50
    assert order != sorted(order)
    loose = [row["url"] for row in planned.to_pylist() if row["tar"] is None]
    assert loose != sorted(loose)
    places = [i for i, row in enumerate(planned.to_pylist()) if row["tar"] is None]
    assert 0.35 < sum(places) / len(places) / 1200 < 0.65  # tars and loose files are mixed, neither come first
    assert not planned.equals(deal_sources(table, seed=4, per_task=32))
    write_plan(planned, tmp_path / "sources.parquet", 32)
    with pq.ParquetFile(tmp_path / "sources.parquet") as file:
        assert file.read_row_group(1).equals(planned.slice(32, 32))


def test_a_limit_draws_members_of_all_tars() -> None:
    planned = deal_sources(_with_tars(loose=0, tars=10, members=100), seed=0, per_task=8, limit=100)
    rows = planned.to_pylist()
    assert len(rows) == len({row["url"] for row in rows}) == 100
    drawn = Counter(row["tar"] for row in rows)
    assert len(drawn) == 10
    assert max(drawn.values()) < 25
    for _, some in itertools.groupby(rows, _tar_of):
        offsets = [row["offset"] for row in some]
        assert offsets == sorted(offsets)


def _tar_of(row: dict[str, Any]) -> str | None:
    tar: str | None = row["tar"]
    return tar


def test_label_ids_follow_the_sorted_names() -> None:
    assert label_ids({"wave", "a", "yoga"}) == {"a": 0, "wave": 1, "yoga": 2}


def test_labels_that_are_known_keep_their_ids() -> None:
    assert label_ids({"wave", "a", "yoga"}, {"yoga": 0, "run": 3}) == {"yoga": 0, "run": 3, "a": 4, "wave": 5}
    assert label_ids([], {"yoga": 0}) == {"yoga": 0}


def _group(*rows: tuple[Any, ...]) -> tuple[pa.Table, list[tuple[int, str]], int]:
    names = ("url", "start", "end", "label", "extra")
    dicts = [dict(zip(names, row, strict=True)) | {"line": 10 + i} for i, row in enumerate(rows)]
    return group_rows(pa.Table.from_pylist(dicts, ROWS), "row", 2)


def test_rows_become_sources() -> None:
    table, faults, count = _group(
        ("/c", WHOLE, OPEN, None, '{"a": 1}'),
        ("/b", 2.0, 3.0, "x", None),
        ("/d", WHOLE, OPEN, "x", None),
        ("/b", 2.0, OPEN, None, None),
        ("/a", 0.0, OPEN, "x", None),
        ("/b", 1.0, 9.0, "x", "{}"),
    )
    assert (faults, count) == ([], 0)
    assert table.schema.equals(LISTED)
    row = dict.fromkeys(("start_s", "end_s", "label", "extra"))
    x = row | {"label": "x"}
    spans = [x | {"start_s": 1, "end_s": 9, "extra": "{}"}, x | {"start_s": 2, "end_s": 3}, row | {"start_s": 2}]
    assert {r["url"]: (r["label"], r["rows"]) for r in table.to_pylist()} == {
        "/a": ("x", [x | {"start_s": 0.0}]),
        "/b": (None, spans),
        "/c": (None, [row | {"extra": '{"a": 1}'}]),
        "/d": ("x", None),
    }


def test_the_first_faults_are_told_and_all_counted() -> None:
    whole, part = (WHOLE, OPEN, None, None), (1.0, 2.0, "x", None)
    _, faults, count = _group(("/b", *part), ("/b", *whole), ("/a", *part), ("/a", *part), ("/a", *part))
    assert count == 3
    assert faults == [
        (10, "'/b' is named whole in row 11, here in part; keep one of the two"),
        (13, "'/a' is named in row 12 already (with label 'x'); remove one"),
    ]
