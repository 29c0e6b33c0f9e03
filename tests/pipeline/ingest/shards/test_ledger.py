"""The join of a job's commits: what is written when, and in which pieces."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3_servers import S3Server

from reelmae.pipeline import schema
from reelmae.pipeline.errors import ClaimedError
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.job import shard
from reelmae.pipeline.ingest.plan import parts
from reelmae.pipeline.ingest.shards import ledger
from reelmae.pipeline.ingest.shards.duplicates import find_repeats
from reelmae.pipeline.storage.store import Store
from reelmae.tools.bench.join import write_job

CONFIG = ShardConfig(short_side=48, sources_per_task=1)
TABLES = (schema.INDEX, schema.REJECTS_FILE, schema.DATASET_JSON)


@pytest.fixture
def dst(make_video: Callable[..., Path], tmp_path: Path) -> Path:
    for i in range(4):
        make_video(tmp_path / "src" / f"{i}.mp4", seed=i, frames=8)
    shard(str(tmp_path / "src"), str(tmp_path / "dst"), CONFIG)
    return tmp_path / "dst"


def _plan(store: Store) -> parts.Plan:
    plan = parts.read_plan(store)
    assert plan is not None
    return plan


@pytest.mark.parametrize("calls", [1, 2])
def test_a_job_that_lost_its_claim_writes_no_table(dst: Path, calls: int) -> None:
    """The second time it is asked is before dataset.json, which is what makes a dataset."""
    for name in TABLES:
        (dst / name).unlink()
    left = iter(range(calls - 1))

    def confirm() -> None:
        if next(left, None) is None:
            raise ClaimedError("taken over")

    store = Store(str(dst))
    with pytest.raises(ClaimedError, match="taken over"):
        ledger.finish(store, _plan(store), confirm)
    assert [name for name in TABLES if (dst / name).exists()] == list(TABLES[: 2 * (calls - 1)])


def test_rows_with_many_blocks_are_written_in_smaller_pieces(dst: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that memory stays flat however long the clips are; what is in the index is the same."""
    store = Store(str(dst))
    whole = pq.read_table(dst / schema.INDEX)
    at = whole.schema.get_field_index("blocks")
    for task in range(4):
        path = dst / schema.commit_name(task, 2)
        table = pq.read_table(path)
        where = table.schema.get_field_index("blocks")
        pq.write_table(table.set_column(where, schema.CLIPS.field("blocks"), [[bytes(1000)]]), path)
    for most, groups in ((10_000, 1), (1500, 2), (1, 4)):
        monkeypatch.setattr(ledger, "_BLOCKS_BYTES", most)
        ledger.finish(store, _plan(store))
        assert pq.ParquetFile(dst / schema.INDEX).num_row_groups == groups
        found = pq.read_table(dst / schema.INDEX)
        assert found.column("blocks").to_pylist() == [bytes(1000)] * 4
        assert found.remove_column(at).equals(whole.remove_column(at))


def test_the_index_is_not_held_while_repeats_are_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path))
    write_job(store, 30_000)
    monkeypatch.setattr(ledger, "_ROWS", 1000)
    held: list[int] = []
    flush = ledger._Rows._flush

    def look(rows: ledger._Rows) -> None:
        flush(rows)
        held.append(pa.total_allocated_bytes())

    def find(*args: Any, **values: Any) -> Any:
        held.clear()
        return find_repeats(*args, **values)

    monkeypatch.setattr(ledger._Rows, "_flush", look)
    monkeypatch.setattr(ledger, "find_repeats", find)
    ledger.finish(store, _plan(store))
    assert pq.ParquetFile(tmp_path / schema.INDEX).num_row_groups > 20
    assert max(held) < (tmp_path / schema.INDEX).stat().st_size / 2


def test_dangling_uploads_of_the_job_are_aborted_and_no_others(dst: Path, s3_server: S3Server) -> None:
    store = Store(s3_server.url("ledger/dst"))
    for path in dst.rglob("*"):
        if path.is_file():
            store.publish(path, path.relative_to(dst).as_posix())
    names = ("shards/000001-00.tar", schema.shard_name(117, 0, 2), schema.commit_name(117, 2), "plan/sources-0.parquet")
    others = (
        "within/shards/000001-00.tar",
        "shards-2/000001-00.tar",
    )  # of a dataset below this one, and of a neighbour
    client = s3_server.client()
    try:
        for name in (*names, *others):
            client.create_multipart_upload(Bucket=s3_server.bucket, Key=f"ledger/dst/{name}")

        def uploads() -> set[str]:
            found = client.list_multipart_uploads(Bucket=s3_server.bucket, Prefix="ledger/dst").get("Uploads", ())
            return {upload["Key"].removeprefix("ledger/dst/") for upload in found}

        assert uploads() == {*names, *others}
        ledger.finish(store, _plan(store))
        assert uploads() == set(others)
    finally:
        client.close()
    assert store.read_bytes(schema.DATASET_JSON) == (dst / schema.DATASET_JSON).read_bytes()
