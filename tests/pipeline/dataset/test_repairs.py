"""Each kind of damage is found, named by its file, and mended to the same bytes with no more work than needed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from reelmae.pipeline import schema
from reelmae.pipeline.dataset.contents import facts
from reelmae.pipeline.dataset.repairs import repair
from reelmae.pipeline.dataset.verification import VerifyReport, verify
from reelmae.pipeline.errors import ClaimedError, ClusterError, DatasetError, InputError, JobMismatchError, StorageError
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.job import shard
from reelmae.pipeline.ingest.plan import parts
from reelmae.pipeline.ingest.shards.pack import dali_index, member_offsets
from reelmae.pipeline.runners.local import LocalRunner
from reelmae.pipeline.runners.ray import RayRunner
from reelmae.pipeline.runners.runner import Runner
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.claim import Claim
from reelmae.pipeline.storage.store import Store
from reelmae.tools import cli

CONFIG = ShardConfig(short_side=48, sources_per_task=2, shard_bytes=1, duplicates="exact")


def _make(folder: Path, make_video: Callable[..., Path]) -> Path:
    """Five sources in three tasks, a shard for each clip, two labels, a repeat, columns of the user's (not in
    the order of their names), rejects."""
    for i in range(3):
        make_video(folder / "src" / f"{i}.mp4", seed=i)
    shutil.copy(folder / "src" / "0.mp4", folder / "src" / "again.mp4")
    (folder / "src" / "no.mp4").write_text("no video")
    lines = (
        "0.mp4,a,,,3",
        "1.mp4,b,0.2,0.6,4",
        "1.mp4,a,7,8,5",
        "2.mp4,,,,",
        "again.mp4,a,,,6",
        "no.mp4,b,,,7",
    )
    (folder / "src" / "list.csv").write_text("\n".join(["url,label,start,end,stars", *lines]) + "\n")
    shard(str(folder / "src" / "list.csv"), str(folder / "dst"), CONFIG, workers=2)
    return folder / "dst"


@pytest.fixture(scope="module")
def dataset(make_video: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _make(tmp_path_factory.mktemp("repair"), make_video)


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    return shutil.copytree(dataset, tmp_path / "dst")


def _files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _rows(dst: Path) -> list[dict[str, Any]]:
    return pq.read_table(dst / schema.INDEX).to_pylist()


def _first(dst: Path) -> dict[str, Any]:
    return _rows(dst)[0]


def _flip(path: Path, at: int) -> str:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    return path.name


def _byte_of_a_clip(dst: Path) -> str:
    row = _first(dst)
    return _flip(dst / row["shard"], row["offset"] + row["size"] // 2)


def _byte_of_a_header(dst: Path) -> str:
    row = _first(dst)
    return _flip(dst / row["shard"], row["offset"] - 400)


def _byte_of_the_first_header(dst: Path) -> str:
    return _flip(dst / _first(dst)["shard"], 3)


def _byte_of_a_json(dst: Path) -> str:
    return _flip(dst / _first(dst)["shard"], 512 + 12)


def _byte_of_the_end(dst: Path) -> str:
    return _flip(dst / _first(dst)["shard"], -1)


def _cut_tar(dst: Path) -> str:
    tar = dst / _first(dst)["shard"]
    tar.write_bytes(tar.read_bytes()[:1600])
    return tar.name


def _no_shard(dst: Path) -> str:
    tar = dst / _first(dst)["shard"]
    tar.unlink()
    return tar.name


def _extra_shard(dst: Path) -> str:
    for suffix in (".tar", ".idx"):
        shutil.copy((dst / _first(dst)["shard"]).with_suffix(suffix), dst / f"shards/000099-00{suffix}")
    return "shards/000099-00.tar"


def _extra_shard_of_a_task(dst: Path) -> str:
    shutil.copy(dst / _first(dst)["shard"], dst / "shards/000000-77.tar")
    return "shards/000000-77.tar"


def _no_commit(dst: Path) -> str:
    (dst / "commits/000001.parquet").unlink()
    return "commits/000001.parquet"


def _no_commit_and_an_extra_shard(dst: Path) -> str:
    shutil.copy(dst / _first(dst)["shard"], dst / "shards/000001-77.tar")
    return _no_commit(dst)


def _commit_of_noise(dst: Path) -> str:
    (dst / "commits/000001.parquet").write_bytes(b"PAR1 but no more than that")
    return "commits/000001.parquet"


def _commit_of_another(dst: Path) -> str:
    shutil.copy(dst / "commits/000002.parquet", dst / "commits/000001.parquet")
    return "commits/000001.parquet"


def _commit_edited(dst: Path) -> str:
    return _edit(dst / "commits/000001.parquet", "frames", 19)


def _commit_without_a_source(dst: Path) -> str:
    path = dst / "commits/000001.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    return "commits/000001.parquet"


def _edit(path: Path, column: str, value: Any, row: int = 0) -> str:
    table = pq.read_table(path)
    at = table.schema.get_field_index(column)
    values = table.column(column).to_pylist()
    assert values[row] != value
    values[row] = value
    pq.write_table(table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type)), path)
    return path.name


def _other_idx(dst: Path) -> str:
    first, last = _rows(dst)[0]["shard"], _rows(dst)[-1]["shard"]
    shutil.copy((dst / last).with_suffix(".idx"), (dst / first).with_suffix(".idx"))
    return Path(first).with_suffix(".idx").name


def _no_idx(dst: Path) -> str:
    idx = (dst / _first(dst)["shard"]).with_suffix(".idx")
    idx.unlink()
    return idx.name


def _no_idx_at_the_end(dst: Path) -> str:
    idx = (dst / _rows(dst)[-1]["shard"]).with_suffix(".idx")
    idx.unlink()
    return idx.name


def _edited_idx(dst: Path) -> str:
    idx = (dst / _first(dst)["shard"]).with_suffix(".idx")
    idx.write_text(idx.read_text().replace("json 512", "json 513"))
    return idx.name


def _index_lost_a_row(dst: Path) -> str:
    table = pq.read_table(dst / schema.INDEX)
    pq.write_table(pa.concat_tables([table.slice(0, 1), table.slice(2)]), dst / schema.INDEX)
    return schema.INDEX


def _index_doubled_a_row(dst: Path) -> str:
    table = pq.read_table(dst / schema.INDEX)
    pq.write_table(pa.concat_tables([table.slice(0, 2), table.slice(1)]), dst / schema.INDEX)
    return schema.INDEX


def _index_moved_a_row(dst: Path) -> str:
    table = pq.read_table(dst / schema.INDEX)
    pq.write_table(pa.concat_tables([table.slice(1), table.slice(0, 1)]), dst / schema.INDEX)
    return schema.INDEX


def _index_column(column: str, value: Any) -> Callable[[Path], str]:
    return lambda dst: _edit(dst / schema.INDEX, column, value)


def _repeat(dst: Path) -> int:
    return next(i for i, row in enumerate(_rows(dst)) if row["duplicate_of"])


def _repeat_of_itself(dst: Path) -> str:
    at = _repeat(dst)
    return _edit(dst / schema.INDEX, "duplicate_of", _rows(dst)[at]["key"], at)


def _repeat_of_nothing(dst: Path) -> str:
    return _edit(dst / schema.INDEX, "duplicate_of", "0123456789abcdef_0000", _repeat(dst))


def _repeat_unmarked(dst: Path) -> str:
    _edit(dst / schema.INDEX, "duplicate_of", None, _repeat(dst))
    return f"{schema.DATASET_JSON}: duplicates"


def _noise(name: str) -> Callable[[Path], str]:
    def damage(dst: Path) -> str:
        (dst / name).write_bytes(b"{noise")
        return name

    return damage


def _gone(name: str) -> Callable[[Path], str]:
    def damage(dst: Path) -> str:
        (dst / name).unlink()
        return name

    return damage


def _rejects_edited(dst: Path) -> str:
    return _edit(dst / schema.REJECTS_FILE, "reason", "dark")


def _rejects_doubled(dst: Path) -> str:
    table = pq.read_table(dst / schema.REJECTS_FILE)
    pq.write_table(pa.concat_tables([table, table.slice(0, 1)]), dst / schema.REJECTS_FILE)
    return schema.REJECTS_FILE


def _facts(key: str, value: Any) -> Callable[[Path], str]:
    def damage(dst: Path) -> str:
        facts = json.loads((dst / schema.DATASET_JSON).read_text())
        (dst / schema.DATASET_JSON).write_text(json.dumps({**facts, key: value}))
        return schema.DATASET_JSON

    return damage


def _labels_edited(dst: Path) -> str:
    (dst / schema.LABELS).write_text('{"a": 1, "b": 0}')
    return schema.LABELS


def _labels_lost_one(dst: Path) -> str:
    (dst / schema.LABELS).write_text('{"a": 0}')
    return schema.LABELS


NOTHING: tuple[int, ...] = ()
DAMAGE: tuple[tuple[Callable[[Path], str], tuple[int, ...]], ...] = (
    (_byte_of_a_clip, (0,)),
    (_byte_of_a_header, (0,)),
    (_byte_of_the_first_header, (0,)),
    (_byte_of_a_json, (0,)),
    (_byte_of_the_end, (0,)),
    (_cut_tar, (0,)),
    (_no_shard, (0,)),
    (_extra_shard, NOTHING),
    (_extra_shard_of_a_task, NOTHING),
    (_no_commit, (1,)),
    (_no_commit_and_an_extra_shard, (1,)),
    (_commit_of_noise, (1,)),
    (_commit_of_another, (1,)),
    (_commit_edited, (1,)),
    (_commit_without_a_source, (1,)),
    (_other_idx, NOTHING),
    (_no_idx, NOTHING),
    (_edited_idx, NOTHING),
    (_index_lost_a_row, NOTHING),
    (_index_doubled_a_row, NOTHING),
    (_index_moved_a_row, NOTHING),
    (_index_column("motion", 99.0), NOTHING),
    (_index_column("offset", 99), NOTHING),
    (_index_column("stars", 99), NOTHING),
    (_index_column("shard", "shards/000002-00.tar"), NOTHING),
    (_repeat_of_itself, NOTHING),
    (_repeat_of_nothing, NOTHING),
    (_repeat_unmarked, NOTHING),
    (_noise(schema.INDEX), NOTHING),
    (_gone(schema.INDEX), NOTHING),
    (_rejects_edited, NOTHING),
    (_rejects_doubled, NOTHING),
    (_noise(schema.REJECTS_FILE), NOTHING),
    (_facts("clips", 7), NOTHING),
    (_facts("seconds", 7), NOTHING),
    (_facts("plan", "another"), NOTHING),
    (_noise(schema.DATASET_JSON), NOTHING),
    (_gone(schema.LABELS), NOTHING),
    (_labels_edited, NOTHING),
    (_labels_lost_one, NOTHING),
)


@pytest.mark.parametrize(
    ("damage", "tasks"), DAMAGE, ids=[f"{i}{d.__qualname__.split('.')[0]}" for i, (d, _) in enumerate(DAMAGE)]
)
def test_damage_is_found_and_mended(
    dataset: Path, copy: Path, damage: Callable[[Path], str], tasks: tuple[int, ...]
) -> None:
    name = damage(copy)
    report = repair(str(copy), workers=1)
    assert any(name in fault for fault in report.before.faults), report.before.faults
    assert report.before.damaged_tasks == report.tasks_run == tasks, report.before.faults
    assert (report.after.faults, report.mended) == ((), report.before.faults)
    assert _files(copy) == _files(dataset)
    assert json.dumps(report.as_dict())


@pytest.fixture(scope="module")
def ray() -> Iterator[Runner]:
    with RayRunner(workers=2) as runner:
        yield runner


def _told(report: VerifyReport) -> VerifyReport:
    return replace(report, seconds=0.0, ms_per_clip=0.0)


@pytest.mark.parametrize("damage", [d for d, _ in DAMAGE], ids=[f"{i}" for i in range(len(DAMAGE))])
def test_workers_of_a_runner_tell_the_same_damage(copy: Path, damage: Callable[[Path], str]) -> None:
    damage(copy)
    alone = _told(verify(str(copy)))
    assert alone.faults
    assert _told(verify(str(copy), runner=LocalRunner(2))) == alone


@pytest.mark.parametrize("damage", [_byte_of_a_clip, _no_shard, _commit_of_another, _other_idx, _index_moved_a_row])
def test_workers_on_ray_tell_the_same_damage(copy: Path, damage: Callable[[Path], str], ray: Runner) -> None:
    damage(copy)
    alone = _told(verify(str(copy)))
    assert alone.faults
    assert _told(verify(str(copy), runner=ray)) == alone


def test_a_node_that_does_not_see_the_dataset_is_named(dataset: Path, ray: Runner) -> None:
    here = Store("memory://damage/dst")  # of this process alone
    for name, data in _files(dataset).items():
        here.publish_bytes(data, name)
    assert verify(here.url(), runner=LocalRunner(2)).ok
    for check in (verify, repair):
        with pytest.raises(
            ClusterError, match=r"^node .* does not see the same dataset at memory://.*; give a DST that all"
        ):
            check(here.url(), runner=ray)  # type: ignore[operator]
    assert {e.path: here.read_bytes(e.path) for e in here.list()} == _files(dataset)


def _rewrite(dst: Path, video: bytes, at: int = 0) -> dict[str, Any]:
    """Another video in the place of a clip: tar, idx, commit, index and sums agree about it."""
    row = _rows(dst)[at]
    tar = dst / row["shard"]
    with tarfile.open(tar) as old:
        facts = old.extractfile(f"{row['key']}.json").read()  # type: ignore[union-attr]
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as new:
        for ending, data in (("json", facts), ("mp4", video)):
            info = tarfile.TarInfo(f"{row['key']}.{ending}")
            info.size, info.mode, info.uname, info.gname = len(data), 0o444, "reelmae", "reelmae"
            new.addfile(info, io.BytesIO(data))
    tar.with_suffix(".idx").write_text(dali_index(tar))
    now = {
        "size": len(video),
        "sha256": hashlib.sha256(video).hexdigest(),
        "offset": member_offsets(tar)[f"{row['key']}.mp4"][0],
    }
    commit = dst / "commits" / f"{Path(row['shard']).name[:6]}.parquet"
    metadata = pq.read_table(commit).schema.metadata
    for table in (commit, dst / schema.INDEX):
        place = pq.read_table(table).column("key").to_pylist().index(row["key"])
        for column, value in now.items():
            if pq.read_table(table).column(column)[place].as_py() != value:
                _edit(table, column, value, place)
    shards = json.loads(metadata[b"shards"]) | {row["shard"]: tar.stat().st_size}
    pq.write_table(pq.read_table(commit).replace_schema_metadata({"shards": json.dumps(shards)}), commit)
    facts_now = json.loads((dst / schema.DATASET_JSON).read_text())
    facts_now["bytes"] = sum(p.stat().st_size for p in (dst / "shards").glob("*.tar"))
    (dst / schema.DATASET_JSON).write_bytes(parts.as_json(facts_now))
    return row


@pytest.mark.parametrize("kind", ["short", "noise", "small"])
def test_a_clip_that_only_decoding_tells_is_found_and_mended(
    dataset: Path, copy: Path, make_video: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    sizes = {"short": (12, 64, 48), "small": (20, 32, 32), "noise": (20, 64, 48)}
    frames, width, height = sizes[kind]
    video = make_video(tmp_path / "v.mp4", frames=frames, width=width, height=height).read_bytes()
    row = _rewrite(copy, b"\1" * 5000 if kind == "noise" else video)
    assert verify(str(copy)).faults == ()
    report = repair(str(copy), deep=True)
    (fault,) = report.before.faults
    assert row["shard"] in fault and row["key"] in fault
    assert (report.tasks_run, report.after.faults) == ((0,), ())
    assert _files(copy) == _files(dataset)


def test_workers_of_a_runner_decode_and_mend_as_this_machine_does(
    dataset: Path, copy: Path, make_video: Callable[..., Path], tmp_path: Path, ray: Runner
) -> None:
    """Clips that only decoding tells, one in each task: beside other damage, without a commit, in a shard with no index."""
    video = make_video(tmp_path / "v.mp4", frames=12, width=64, height=48).read_bytes()
    rows = _rows(copy)
    of_task = [next(i for i, row in enumerate(rows) if f"shards/00000{task}-" in row["shard"]) for task in range(3)]
    for at in of_task:
        _rewrite(copy, video, at)
    for damage in (_commit_of_noise, _no_idx_at_the_end, _extra_shard, _repeat_of_itself):
        damage(copy)
    other = next(row["shard"] for row in rows if row["shard"] not in {rows[at]["shard"] for at in of_task})
    (copy / other).write_bytes((copy / other).read_bytes()[:1600])
    alone = _told(verify(str(copy), deep=True))
    decoded = [f.task for f in alone.found if "frames" in f.text]
    assert decoded == [f.task for f in alone.found[-3:]] == [0, 1, 2], "what only decoding tells comes last"
    assert alone.damaged_tasks == (0, 1, 2)
    for number, runner in enumerate((LocalRunner(2), ray)):
        damaged = shutil.copytree(copy, tmp_path / f"{number}" / "dst")
        assert replace(_told(verify(str(damaged), deep=True, runner=runner)), dst=alone.dst) == alone
        report = repair(str(damaged), deep=True, runner=runner)
        assert (report.tasks_run, report.after.faults) == ((0, 1, 2), ())
        assert _files(damaged) == _files(dataset)


def test_a_whole_dataset_is_left_alone(dataset: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in dataset.rglob("*")}
    report = repair(str(dataset))
    assert (report.ok, report.mended, report.tasks_run) == (True, (), ())
    assert {p: p.stat().st_mtime_ns for p in dataset.rglob("*")} == before


def test_all_at_once(dataset: Path, copy: Path) -> None:
    for damage in (
        _cut_tar,
        _commit_of_another,
        _no_idx_at_the_end,
        _extra_shard,
        _labels_edited,
        _noise(schema.INDEX),
    ):
        damage(copy)
    report = repair(str(copy))
    assert (report.tasks_run, report.after.faults) == ((0, 1), ())
    assert _files(copy) == _files(dataset)


@pytest.mark.parametrize("name", [schema.PLAN_JSON, "sources"])
@pytest.mark.parametrize("how", [_gone, _noise])
def test_without_its_plan_nothing_is_touched(
    copy: Path, name: str, how: Callable[[str], Callable[[Path], str]]
) -> None:
    if name == "sources":
        name = next(copy.glob("plan/sources-*")).relative_to(copy).as_posix()
    how(name)(copy)
    tar = _cut_tar(copy)
    before = _files(copy)
    faults = verify(str(copy)).faults
    assert any(name in f for f in faults)
    assert any(tar in f for f in faults)
    with pytest.raises(DatasetError, match=f"{name}.*put it back from a copy"):
        repair(str(copy))
    assert _files(copy) == before


def test_a_source_that_is_gone_is_named_and_nothing_is_touched(
    make_video: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dst = _make(tmp_path, make_video)
    row = _first(dst)
    _no_shard(dst)
    _noise(schema.INDEX)(dst)
    before = _files(dst)
    Path(row["source"]).rename(tmp_path / "kept")
    with pytest.raises(StorageError, match="Put back what is gone"):
        repair(str(dst))
    assert cli.main(["verify", str(dst), "--repair"]) == 1
    assert row["source"] in capsys.readouterr().err
    assert _files(dst) == before
    (tmp_path / "kept").rename(row["source"])
    assert repair(str(dst)).ok


def test_another_ffmpeg_is_named_and_nothing_is_touched(copy: Path) -> None:
    plan = parts.read_plan(Store(str(copy)))
    assert plan is not None
    old = plan.model_copy(update={"parts": (plan.parts[0].model_copy(update={"ffmpeg": "ffmpeg of old"}),)})
    (copy / schema.PLAN_JSON).write_bytes(old.data())
    _facts("plan", old.digest())(copy)
    _cut_tar(copy)
    before = _files(copy)
    with pytest.raises(JobMismatchError, match="'ffmpeg of old' there"):
        repair(str(copy))
    assert _files(copy) == before


def test_a_commit_beyond_the_plan_keeps_its_shards(copy: Path) -> None:
    _extra_shard(copy)
    shutil.copy(copy / "commits/000002.parquet", copy / "commits/000099.parquet")
    before = _files(copy)
    report = repair(str(copy))
    (fault,) = report.after.faults
    assert "commits/000099.parquet" in fault
    assert _files(copy) == before


def test_the_command_tells_what_was_mended(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = _edited_idx(copy)
    assert cli.main(["verify", str(copy), "--json"]) == 1
    assert name in json.loads(capsys.readouterr().out)["faults"][0]
    assert cli.main(["verify", str(copy), "--repair", "--deep", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["ok"], answer["faults"], answer["tasks_run"], answer["deep"]) == (True, [], [], True)
    assert name in answer["mended"][0]


def test_a_dataset_on_s3_is_mended(dataset: Path, s3_server: Any) -> None:
    store = Store(s3_server.url("repair/dst"))
    for name, data in _files(dataset).items():
        store.publish_bytes(data, name)
    first, last = _rows(dataset)[0]["shard"], _rows(dataset)[-1]["shard"]
    idx = last.removesuffix(".tar") + ".idx"
    store.remove(first)
    store.publish_bytes(b"v1.2 0\n", idx)
    store.publish_bytes(b"extra", "shards/000000-77.tar")
    report = repair(store.url())
    assert {f.file for f in report.before.found} == {first, idx, "shards/000000-77.tar"}
    assert (report.tasks_run, report.after.faults) == ((0,), ())
    assert {e.path: store.read_bytes(e.path) for e in store.list()} == _files(dataset)


def test_rejects_are_taken_over_when_a_task_is_run_again(make_video: Callable[..., Path], tmp_path: Path) -> None:
    """A source that was gone stays so, and one that was tried again since does not turn up twice."""
    src, dst = tmp_path / "src", tmp_path / "dst"
    for i in range(3):
        make_video(src / f"{i}.mp4", seed=i)
    (src / "later.mp4").write_text("no video yet")
    (src / "dangling.mp4").symlink_to("nowhere")
    config = ShardConfig(short_side=48, sources_per_task=5)
    shard(str(src), str(dst), config, workers=1)
    make_video(src / "later.mp4", seed=9)
    shard(str(src), str(dst), config, retry_rejected="not_a_video", workers=1)
    before = {p: p.read_bytes() for p in dst.rglob("*") if p.is_file()}
    (dst / "shards/000000-00.tar").write_bytes(b"")
    assert not verify(str(dst)).ok
    assert repair(str(dst)).ok
    assert {p: p.read_bytes() for p in dst.rglob("*") if p.is_file()} == before


def test_nothing_is_repaired_while_a_job_is_at_work(copy: Path) -> None:
    """Not even a table or an index, which need no task to be run."""
    for damage in (_extra_shard, _edited_idx, _labels_edited):
        damage(copy)
    with Claim(Store(str(copy))):
        before = _files(copy)
        with pytest.raises(ClaimedError, match="another job writes to it"):
            repair(str(copy))
        assert _files(copy) == before
        assert len(verify(str(copy)).faults) == 5  # which writes nothing
    assert repair(str(copy)).ok
    assert "claim.json" not in _files(copy)


def test_where_there_is_no_dataset_no_claim_is_made(tmp_path: Path) -> None:
    before = tmp_path.stat().st_mtime_ns
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="no dataset"):
            repair(str(folder))
    assert tmp_path.stat().st_mtime_ns == before


class Keyed(LocalFileSystem):  # type: ignore[misc]
    """Local files for who has the key."""

    protocol = "keyed"
    cachable = False

    def __init__(self, key: str = "", **values: Any) -> None:
        super().__init__(auto_mkdir=True, **values)
        self.key = key

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return str(path).removeprefix("keyed://")

    def info(self, path: Any, **values: Any) -> Any:
        """What is there; PermissionError where the key is no folder above it."""
        if not self.key or f"/{self.key}/" not in os.fspath(path):
            raise PermissionError(path)
        return super().info(path, **values)


def test_sources_and_dataset_are_reached_each_in_its_own_way(make_video: Callable[..., Path], tmp_path: Path) -> None:
    fsspec.register_implementation("keyed", Keyed, clobber=True)
    for i in range(2):
        make_video(tmp_path / "theirs" / "src" / f"{i}.mp4", seed=i)
    (tmp_path / "ours").mkdir()
    src, dst = f"keyed://{tmp_path}/theirs/src", f"keyed://{tmp_path}/ours/dst"
    theirs, ours = Access({"key": "theirs"}), Access({"key": "ours"})
    shard(src, dst, CONFIG, src_access=theirs, dst_access=ours)
    whole = _files(tmp_path / "ours")
    for path in [*tmp_path.glob("ours/dst/shards/*.tar"), tmp_path / "ours/dst" / schema.INDEX]:
        path.unlink()
    with pytest.raises(StorageError):
        verify(dst, access=theirs)
    with pytest.raises(StorageError):
        repair(dst, access=ours, src_access=ours)
    assert repair(dst, access=ours, src_access=theirs).ok
    assert _files(tmp_path / "ours") == whole
    assert facts(dst, access=ours).clips == 2
    secret = ["--storage-options", '{"key": "ours"}']
    assert cli.main(["verify", dst, *secret]) == cli.main(["inspect", dst, *secret]) == 0
    assert cli.main(["verify", dst]) == 1
    (tmp_path / "ours/dst" / _first(tmp_path / "ours/dst")["shard"]).unlink()
    assert cli.main(["verify", dst, "--repair", *secret, "--src-storage-options", '{"key": "theirs"}']) == 0
    assert cli.main(["verify", dst, *secret, "--src-storage-options", "{}"]) == 2
    assert _files(tmp_path / "ours") == whole
