"""Which tasks are committed: one answer for the job, for verify and for what is shown of a dataset."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reelmae.pipeline import schema
from reelmae.pipeline.dataset.contents import job_state
from reelmae.pipeline.dataset.repairs import repair
from reelmae.pipeline.dataset.verification import verify
from reelmae.pipeline.errors import DatasetError
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.job import shard
from reelmae.pipeline.ingest.shards.commits import READ_AHEAD, committed_tasks, read_commits
from reelmae.pipeline.storage.store import Store


def test_only_the_exact_names_of_commit_records_count(tmp_path: Path) -> None:
    (tmp_path / "commits").mkdir()
    store = Store(str(tmp_path))
    assert committed_tasks(store, 2) == set()
    for task in (0, 17, 1_234_567):
        path = tmp_path / schema.commit_name(task, 2)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "commits/.000003.parquet.123.456.part").write_bytes(b"half")  # of a writer that was killed
    (tmp_path / "commits/notes.txt").write_text("mine")
    assert committed_tasks(store, 2) == {0, 17, 1_234_567}


FOREIGN = (
    "notes.parquet",
    "3.parquet",
    "0000003.parquet",
    "-00003.parquet",
    "old/000003.parquet",
    "٠٠٠٠٠٣.parquet",
    "._000003.parquet",
)


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_among_the_commits_is_refused_by_name(name: str, tmp_path: Path) -> None:
    for path in (tmp_path / "commits" / name, tmp_path / schema.commit_name(2, 2)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    with pytest.raises(DatasetError, match="is not a commit record of a task; remove it") as refused:
        committed_tasks(Store(str(tmp_path)), 2)
    assert name in str(refused.value)
    foreign: list[str] = []
    assert committed_tasks(Store(str(tmp_path)), 2, foreign.append) == {2}
    assert foreign == [f"commits/{name}"]


@pytest.mark.parametrize("format", schema.FORMATS)
def test_a_commit_where_another_format_has_it_is_foreign(format: int, tmp_path: Path) -> None:
    """Task 117 is committed only where the job's own format has it: its rows name shards of that format."""
    for other in schema.FORMATS:
        path = tmp_path / schema.commit_name(117, other)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    foreign: list[str] = []
    assert committed_tasks(Store(str(tmp_path)), format, foreign.append) == {117}
    assert foreign == [schema.commit_name(117, 3 - format)]


def test_verify_names_a_foreign_file_and_a_job_does_nothing_before_it_is_gone(
    make_video: Callable[..., Path], tmp_path: Path
) -> None:
    make_video(tmp_path / "src/one.mp4")
    config = ShardConfig(short_side=48)
    shard(str(tmp_path / "src"), str(tmp_path / "dst"), config)
    dst = shutil.copytree(tmp_path / "dst", tmp_path / "copy")
    (dst / "commits/copy of 000000.parquet").write_bytes(b"")
    (dst / schema.INDEX).unlink()
    next(dst.glob("shards/*.idx")).write_text("damaged")  # not mended before the foreign file is named
    before = {p: p.read_bytes() for p in dst.rglob("*") if p.is_file()}
    faults = verify(str(dst)).faults
    assert [f for f in faults if "copy of 000000.parquet: is not a commit record" in f]
    for run in (lambda: shard(str(tmp_path / "src"), str(dst), config), lambda: repair(str(dst))):
        with pytest.raises(DatasetError, match=r"copy of 000000\.parquet: is not a commit record"):
            run()
    assert {p: p.read_bytes() for p in dst.rglob("*") if p.is_file()} == before
    (dst / "commits/copy of 000000.parquet").unlink()
    assert repair(str(dst)).ok


def test_a_foreign_file_hides_nothing_from_who_only_looks(make_video: Callable[..., Path], tmp_path: Path) -> None:
    """An unfinished job with such a file is still shown with what is done of it."""
    make_video(tmp_path / "src/one.mp4")
    shard(str(tmp_path / "src"), str(tmp_path / "dst"), ShardConfig(short_side=48))
    (tmp_path / "dst" / schema.DATASET_JSON).unlink()
    (tmp_path / "dst/commits/._000000.parquet").write_bytes(b"")
    job = job_state(Store(str(tmp_path / "dst")))
    assert job is not None
    assert (job.finished, job.tasks, job.tasks_done) == (False, 1, 1)


def test_commits_of_a_remote_store_come_in_order_and_are_not_all_held() -> None:
    store, asked = Store("memory://commits-in-order"), []
    for task in range(40):
        table = pa.table({"task": [task]})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        store.publish_bytes(sink.getvalue().to_pybytes(), schema.commit_name(task, 2))

    def ask() -> Iterator[int]:
        for task in range(40):
            asked.append(task)
            yield task

    found = read_commits(store, ask(), 2)
    assert [next(found).column("task")[0].as_py() for _ in range(5)] == list(range(5))
    assert len(asked) <= 5 + READ_AHEAD
    assert [table.column("task")[0].as_py() for table in found] == list(range(5, 40))
    store.remove(schema.commit_name(30, 2))
    with pytest.raises(FileNotFoundError, match=r"commits/000030\.parquet"):
        list(read_commits(store, range(40), 2))
