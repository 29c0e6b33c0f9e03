"""The closed list of reasons: each has a meaning, and the README says which step gives it. Names and tables of both formats."""

from __future__ import annotations

import hashlib
import pickle
import random
import re
from pathlib import Path

import pyarrow as pa
import pytest

from reelmae.pipeline import schema
from reelmae.pipeline.schema import Reason, block_checks, commit_name, reason_meaning, shard_name

README = Path(__file__).resolve().parents[2] / "pipeline" / "ingest" / "README.md"


def test_each_reason_has_a_meaning_of_its_own() -> None:
    meanings = [reason.meaning for reason in Reason]
    assert all(meanings)
    assert len(set(meanings)) == len(meanings) == 27


def test_the_readme_names_every_reason_and_no_other_with_the_step_that_gives_it() -> None:
    section = README.read_text(encoding="utf-8").split("## The steps of one source")[1].split("\n## ")[0]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("| ")]
    of_steps = {word for row in rows for word in re.findall(r"`(\w+)`", row[3])}
    of_any_step = set(re.findall(r"`(\w+)`", section.split("Any step that runs a child")[1].split(".")[0]))
    assert of_steps | of_any_step == set(Reason)


def test_a_reason_is_its_value_in_the_tables() -> None:
    assert Reason("too_short") is Reason.TOO_SHORT
    assert Reason.TOO_SHORT == Reason.TOO_SHORT.value == str(Reason.TOO_SHORT) == "too_short"
    assert pickle.loads(pickle.dumps(Reason.TOO_SHORT)) is Reason.TOO_SHORT


def test_the_meaning_of_a_reason_of_another_version_is_empty() -> None:
    assert reason_meaning("static") == Reason.STATIC.meaning
    assert reason_meaning("eaten_by_the_dog") == ""


def test_each_hundred_of_tasks_has_a_folder_from_task_100_on() -> None:
    at = {task: (shard_name(task, 3, 2), commit_name(task, 2)) for task in (0, 99, 100, 117, 9_999, 1_234_567)}
    assert at == {
        0: ("shards/000000-03.tar", "commits/000000.parquet"),
        99: ("shards/000099-03.tar", "commits/000099.parquet"),
        100: ("shards/0001/000100-03.tar", "commits/0001/000100.parquet"),
        117: ("shards/0001/000117-03.tar", "commits/0001/000117.parquet"),
        9_999: ("shards/0099/009999-03.tar", "commits/0099/009999.parquet"),
        1_234_567: ("shards/12345/1234567-03.tar", "commits/12345/1234567.parquet"),
    }
    assert (shard_name(117, 0, 1), commit_name(117, 1)) == ("shards/000117-00.tar", "commits/000117.parquet")


@pytest.mark.parametrize("tasks", [0, 1, 100, 101, 250])
@pytest.mark.parametrize("format", schema.FORMATS)
def test_the_folders_of_tasks_are_those_that_their_files_lie_in(tasks: int, format: int) -> None:
    names = [
        f(task) for task in range(tasks) for f in (lambda t: shard_name(t, 0, format), lambda t: commit_name(t, format))
    ]
    wanted = {name.rpartition("/")[0] for name in names} | {"shards", "commits"}
    folders = schema.task_folders(tasks, format)
    assert (set(folders), len(folders)) == (wanted, len(wanted))


def test_the_checks_of_a_clips_blocks_are_the_beginnings_of_their_hashes() -> None:
    data = random.Random(0).randbytes(2 * schema.BLOCK + 5)
    blocks = [data[: 1 << 16], data[1 << 16 : 2 << 16], data[2 << 16 :]]
    wanted = b"".join(hashlib.sha256(block).digest()[:8] for block in blocks)
    assert block_checks(data) == block_checks(memoryview(data)) == wanted
    assert block_checks(b"") == b""
    assert len(block_checks(bytes(schema.BLOCK))) == 8
    assert schema.clip_blocks(data) is None
    large = bytes(1 << 20)
    assert schema.clip_blocks(large) == block_checks(large)
    assert schema.clip_blocks(large[1:]) is None


def test_the_tables_of_format_2_have_one_column_more_before_the_manifests_own() -> None:
    extra = {"stars": "int64"}
    for table, rest in ((schema.clip_columns, []), (schema.commit_columns, ["reason", "detail"])):
        old, new = table(1, extra), table(2, extra)
        assert old.names[-1 - len(rest) :] == [*rest, "stars"]
        assert [f.name for f in new if f not in list(old)] == ["blocks"]
        assert new.names[-2:] == ["blocks", "stars"]
        assert new.field("blocks").equals(pa.field("blocks", pa.binary()))
    assert schema.clip_columns(schema.FORMAT).equals(schema.CLIPS)
    assert schema.commit_columns(schema.FORMAT).equals(schema.COMMITS)


@pytest.mark.parametrize("found", [0, 3, "2", None, True, 2.0, [1]])
def test_a_format_that_is_not_known_is_named(found: object) -> None:
    assert schema.format_fault(found) == (
        f"is of format {found!r}, this version of reelmae reads 1 and 2; use the version that wrote it"
    )
    assert [schema.format_fault(f) for f in schema.FORMATS] == ["", ""]
