"""Datasets of format 1 go on as they are; those of format 2 lie in folders, and name the files of their sources."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from reelmae.pipeline import schema
from reelmae.pipeline.dataset.contents import facts, job_state
from reelmae.pipeline.dataset.faults import Mend
from reelmae.pipeline.dataset.repairs import repair
from reelmae.pipeline.dataset.verification import verify
from reelmae.pipeline.errors import DatasetError, InputError
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.ffmpeg import find_ffmpeg
from reelmae.pipeline.ingest.job import shard
from reelmae.pipeline.ingest.plan import parts
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.storage.store import Store

Make = Callable[..., Path]
CONFIG = ShardConfig(short_side=48, sources_per_task=1, labels="folder", duplicates="exact")
OLD = Path(__file__).with_name("format1.zip")  # by reelmae 0.1.0: three clips, an append, one reject


def _files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _names(folder: Path) -> list[str]:
    return sorted(_files(folder))


@pytest.fixture
def old(tmp_path: Path) -> Path:
    shutil.unpack_archive(OLD, tmp_path / "old")
    return tmp_path / "old"


def test_a_dataset_of_an_earlier_version_is_whole_and_is_loaded(old: Path) -> None:
    report = verify(str(old), deep=True)
    assert (report.faults, report.clips, report.retries) == ((), 3, {})
    found = facts(str(old))
    assert (found.about["format"], found.clips, found.sources, found.job and found.job.finished) == (1, 3, 4, True)
    index = ClipIndex.open(str(old))
    assert (len(index), index.shard_names[0]) == (3, "shards/000000-00.tar")


@pytest.mark.parametrize("name", [schema.INDEX, schema.REJECTS_FILE, schema.DATASET_JSON, schema.LABELS])
def test_tables_of_an_earlier_version_are_mended_as_they_were(old: Path, name: str) -> None:
    before, index = _files(old), pq.read_table(old / schema.INDEX)
    (old / name).write_bytes(b"noise")
    report = repair(str(old))
    assert (report.after.faults, report.mended) == ((), report.before.faults)
    assert pq.read_table(old / schema.INDEX).equals(index)
    after = _files(old)
    written = {name, schema.DATASET_JSON, schema.INDEX, schema.REJECTS_FILE}  # they name the versions of this machine
    assert {n: d for n, d in after.items() if n not in written} == {n: d for n, d in before.items() if n not in written}
    assert json.loads(after[schema.DATASET_JSON])["format"] == 1


def _begin_format_1(src: Path, dst: Path, monkeypatch: pytest.MonkeyPatch) -> parts.Plan:
    """The plan of a job of format 1, as an earlier version froze it."""
    with monkeypatch.context() as patch:
        patch.setattr(schema, "FORMAT", 1)
        return parts.new_plan(str(src), Store(str(dst)), CONFIG.resolve(), find_ffmpeg(), None)


def test_a_job_that_began_as_format_1_ends_as_format_1(
    make_video: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src, dst = tmp_path / "src", tmp_path / "dst"
    for i in range(2):
        make_video(src / "a" / f"{i}.mp4", seed=i, frames=8)
    (src / "a" / "no.mp4").write_text("no video")
    _begin_format_1(src, dst, monkeypatch)
    shard(str(src), str(dst), CONFIG)
    make_video(src / "b" / "new.mp4", seed=5, frames=8)
    shard(str(src), str(dst), CONFIG, append=True)
    make_video(src / "a" / "no.mp4", seed=6, frames=8)
    shard(str(src), str(dst), CONFIG, retry_rejected="all")
    whole = _files(dst)
    assert sorted(n for n in whole if n.startswith("plan/sources")) == [
        "plan/sources-0001.parquet",
        "plan/sources-0002.parquet",
        "plan/sources.parquet",
    ]
    assert json.loads(whole[schema.PLAN_JSON])["format"] == json.loads(whole[schema.DATASET_JSON])["format"] == 1
    for name in (schema.INDEX, "commits/000000.parquet", "commits/000003.parquet"):
        assert "blocks" not in pq.read_schema(dst / name).names
    assert verify(str(dst), deep=True).faults == ()
    for name in ("commits/000000.parquet", "shards/000003-00.tar", schema.INDEX):
        (dst / name).unlink()
    assert repair(str(dst)).ok
    assert _files(dst) == whole


@pytest.mark.parametrize("format", schema.FORMATS)
def test_a_manifests_column_of_blocks_keeps_its_name_in_format_1(
    make_video: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: int
) -> None:
    manifest, dst = tmp_path / "list.csv", tmp_path / "dst"
    for i in range(2):
        make_video(tmp_path / f"{i}.mp4", seed=i, frames=6)
        manifest.write_text("url,blocks\n" + "".join(f"{n}.mp4,{n + 7}\n" for n in range(i + 1)))
        with monkeypatch.context() as patch:
            if not i:
                patch.setattr(schema, "FORMAT", format)
                parts.new_plan(str(manifest), Store(str(dst)), CONFIG.resolve(), find_ffmpeg(), None)
        shard(str(manifest), str(dst), CONFIG, append=bool(i))
    name = {1: "blocks", 2: "manifest_blocks"}[format]
    index = pq.read_table(dst / schema.INDEX)
    assert index.schema.names[-1] == name
    assert sorted(index.column(name).to_pylist()) == [7, 8]
    assert verify(str(dst)).faults == ()
    assert facts(str(dst)).columns[0].name == name


@pytest.fixture(scope="module")
def large(make_video: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More than a hundred tasks, most of them of sources that are no videos; each hundredth one is."""
    folder = tmp_path_factory.mktemp("large")
    for i in range(205):
        (folder / "src" / "a").mkdir(parents=True, exist_ok=True)
        (folder / "src" / "a" / f"{i:03d}.txt").write_text(f"no video: {i}")
    for i in range(8):
        make_video(folder / "src" / "b" / f"{i}.mp4", seed=i, frames=6)
    shard(str(folder / "src"), str(folder / "dst"), CONFIG)
    return folder


def test_more_than_a_hundred_tasks_are_spread_over_folders(large: Path) -> None:
    dst = large / "dst"
    index = pq.read_table(dst / schema.INDEX)
    assert index.schema.equals(schema.CLIPS)
    names = _names(dst)
    assert [n for n in names if n.startswith("commits/")] == sorted(schema.commit_name(t, 2) for t in range(213))
    tars = index.column("shard").to_pylist()
    assert any(tar.startswith("shards/0001/0001") for tar in tars)
    assert [n for n in names if n.endswith(".tar")] == sorted(tars)
    assert max(len(list(folder.iterdir())) for folder in (dst / "commits", dst / "commits/0001")) <= 102
    assert verify(str(dst), deep=True).faults == ()
    job = job_state(Store(str(dst)))
    assert job is not None
    assert (job.tasks, job.tasks_done) == (213, 213)
    assert [ClipIndex.open(str(dst)).shard(i) for i in range(8)] == tars


def test_what_is_spread_is_resumed_and_mended_to_the_same_bytes(large: Path, tmp_path: Path) -> None:
    dst, whole = tmp_path / "dst", _files(large / "dst")
    shutil.copytree(large / "dst", dst)
    tar = next(n for n in whole if n.startswith("shards/0001/") and n.endswith(".tar"))
    for name in (schema.DATASET_JSON, schema.INDEX, schema.commit_name(150, 2), schema.commit_name(7, 2)):
        (dst / name).unlink()
    for folder in (dst, dst / "commits/0001", dst / "shards/0001", dst / "plan"):
        (folder / ".left.123.456.part").write_bytes(b"of a writer that was killed")
    state = job_state(Store(str(dst)))
    assert state is not None
    assert state.tasks_done == 211
    assert shard(str(large / "src"), str(dst), CONFIG).already_done_tasks == 211
    assert _files(dst) == whole
    (dst / tar).unlink()
    shutil.copy(dst / "shards/0001" / Path(tar).with_suffix(".idx").name, dst / "shards/0001/000199-07.idx")
    report = repair(str(dst))
    assert report.before.faults == (
        f"{tar}: is missing",
        "shards/0001/000199-07.idx: no commit names it",
    )
    assert report.ok
    assert _files(dst) == whole


def test_a_shard_where_another_format_has_it_is_extra(large: Path, tmp_path: Path) -> None:
    dst, whole = tmp_path / "dst", _files(large / "dst")
    shutil.copytree(large / "dst", dst)
    tar = next(n for n in whole if n.startswith("shards/0001/") and n.endswith(".tar"))
    shutil.copy(dst / tar, dst / "shards" / Path(tar).name)
    (fault,) = verify(str(dst)).found
    assert (fault.text, fault.mend) == (f"shards/{Path(tar).name}: no commit names it", Mend.EXTRA)
    task = int(Path(tar).name[:6])
    (dst / schema.commit_name(task, 2)).unlink()  # not even a task whose shards are not known has it there
    assert {fault.text for fault in verify(str(dst)).found} == {
        f"shards/{Path(tar).name}: no commit names it",
        f"{schema.commit_name(task, 2)}: is missing",
    }
    assert repair(str(dst)).ok
    assert _files(dst) == whole


@pytest.mark.parametrize("name", [schema.PLAN_JSON, schema.DATASET_JSON])
def test_an_unknown_format_is_refused_by_name(old: Path, name: str) -> None:
    (old / name).write_text(json.dumps(json.loads((old / name).read_text()) | {"format": 3, "more": 1}))
    before = _files(old)
    words = f"{name}: is of format 3, this version of reelmae reads 1 and 2"
    if name == schema.PLAN_JSON:
        with pytest.raises(InputError, match=words):
            shard("/nowhere", str(old), CONFIG)
        calls: tuple[Callable[[str], object], ...] = (verify, repair, lambda url: job_state(Store(url)))
    else:
        (old / schema.PLAN_JSON).unlink()
        before = _files(old)
        calls = (verify, repair, facts)
    for call in calls:
        with pytest.raises(InputError, match=words):
            call(str(old))
    assert _files(old) == before


def test_blocks_that_are_not_those_of_the_clip_are_found_and_mended(
    make_video: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "BLOCKS_FROM", 1000)
    make_video(tmp_path / "src/one.mp4")
    dst = tmp_path / "dst"
    shard(str(tmp_path / "src"), str(dst), CONFIG, workers=1)
    whole = _files(dst)
    (row,) = pq.read_table(dst / schema.INDEX).to_pylist()
    clip = (dst / row["shard"]).read_bytes()[row["offset"] :][: row["size"]]
    assert row["blocks"] == schema.block_checks(clip)
    assert verify(str(dst)).faults == ()
    for path in (dst / schema.INDEX, dst / "commits/000000.parquet"):
        table = pq.read_table(path)
        at = table.schema.get_field_index("blocks")
        pq.write_table(table.set_column(at, schema.CLIPS.field("blocks"), [[bytes(8)]]), path)
    report = repair(str(dst))
    assert [f for f in report.before.faults if "the blocks of its row are not those of its bytes" in f]
    assert report.tasks_run == (0,)
    assert _files(dst) == whole


# --- the files of sources


def test_a_plan_never_goes_with_the_sources_of_another(make_video: Make, tmp_path: Path) -> None:
    """Two planners at one DST at once: whichever writes plan.json last, its own sources are those that are taken."""
    store, plans = Store(str(tmp_path / "dst")), []
    for name in ("one", "two"):
        make_video(tmp_path / name / "a" / f"{name}.mp4", frames=6)
        plans.append(parts.new_plan(str(tmp_path / name), store, CONFIG.resolve(), find_ffmpeg(), None))
    store.publish_bytes(plans[0].data(), schema.PLAN_JSON)  # the first one is slow
    assert parts.read_plan(store) == plans[0]
    (table,) = parts.sources_of(store, plans[0], ["url"])
    assert table.column("url").to_pylist() == [str(tmp_path / "one/a/one.mp4")]
    assert parts.stray_sources(store, plans[0]) == [plans[1].parts[0].file]
    shard(str(tmp_path / "one"), str(tmp_path / "dst"), CONFIG)
    assert [n for n in _names(tmp_path / "dst") if n.startswith("plan/")] == [schema.PLAN_JSON, plans[0].parts[0].file]
    shard(str(tmp_path / "one"), str(tmp_path / "clean"), CONFIG)
    assert _files(tmp_path / "dst") == _files(tmp_path / "clean")


def test_sources_that_are_not_those_of_the_plan_are_named_and_no_task_is_run(make_video: Make, tmp_path: Path) -> None:
    src, dst = tmp_path / "src", tmp_path / "dst"
    for i in range(2):
        make_video(src / "a" / f"{i}.mp4", seed=i, frames=6)
    shard(str(src), str(dst), CONFIG)
    (sources,) = dst.glob("plan/sources-*.parquet")
    plan = parts.read_plan(Store(str(dst)))
    assert plan is not None
    assert plan.parts[0].file == f"plan/{sources.name}"
    pq.write_table(pq.read_table(sources), sources, row_group_size=1, compression="none")  # the same rows
    assert verify(str(dst)).faults == (f"plan/{sources.name}: its bytes are not those of its name (sha256)",)
    (dst / schema.DATASET_JSON).unlink()
    (dst / "commits/000000.parquet").unlink()
    before = _files(dst)
    with pytest.raises(DatasetError, match=r"sources-.*its bytes are not those of its name \(sha256\); put it back"):
        shard(str(src), str(dst), CONFIG)
    assert _files(dst) == before


def test_a_claim_of_a_job_is_no_fault(large: Path, tmp_path: Path) -> None:
    shutil.copytree(large / "dst", tmp_path / "dst")
    (tmp_path / "dst" / "claim.json").write_text("{}")
    assert verify(str(tmp_path / "dst")).faults == ()
    assert facts(str(tmp_path / "dst")).clips == 8
