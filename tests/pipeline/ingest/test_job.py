"""The job from a bucket to shards: bytes, ledger, resume, refusals, others' readers, s3, two jobs on one DST."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from reelmae.pipeline import schema
from reelmae.pipeline.dataset.verification import verify
from reelmae.pipeline.errors import (
    ClaimedError,
    DatasetError,
    InputError,
    JobMismatchError,
    NothingKeptError,
    StorageError,
    StorageFullError,
)
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.job import Progress, shard
from reelmae.pipeline.ingest.plan import parts, sources
from reelmae.pipeline.ingest.shards.ledger import check_ledger
from reelmae.pipeline.storage.claim import Claim
from reelmae.pipeline.storage.store import Store

Make = Callable[..., Path]
SMALL = ShardConfig(short_side=48, clip_seconds=1, sources_per_task=3, labels="folder", shard_bytes=20_000)
VIDEOS, BROKEN = 12, 4


def _files(dst: Path) -> dict[str, bytes]:
    return {str(p.relative_to(dst)): p.read_bytes() for p in sorted(dst.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def sharded(tiny_bucket: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bucket, sharded by one worker. Read only."""
    dst = tmp_path_factory.mktemp("sharded") / "dst"
    summary = shard(str(tiny_bucket), str(dst), SMALL, workers=1)
    assert (summary.sources, summary.sources_kept, summary.already_done_tasks) == (VIDEOS + BROKEN, VIDEOS, 0)
    return dst


def test_dataset_is_whole_and_says_what_became_of_each_source(sharded: Path, tiny_bucket: Path) -> None:
    assert verify(str(sharded), deep=True).faults == ()
    facts = json.loads((sharded / schema.DATASET_JSON).read_text())
    index = pq.read_table(sharded / schema.INDEX)
    assert index.schema.equals(schema.CLIPS)
    assert facts["clips"] == index.num_rows > VIDEOS  # the long ones are cut
    rejects = {Path(r["source"]).name: r["reason"] for r in pq.read_table(sharded / schema.REJECTS_FILE).to_pylist()}
    assert rejects == {
        "empty.mp4": "empty_file",
        "notes.mp4": "not_a_video",
        "cut.mp4": "unreadable",
        ".DS_Store": "not_a_video",
    }
    sources = set(index.column("source").to_pylist())
    assert sources | {str(tiny_bucket / ("b" if n != ".DS_Store" else "") / n) for n in rejects} == {
        str(p) for p in tiny_bucket.rglob("*") if p.is_file()
    }
    assert facts["rejected"] == {"empty_file": 1, "not_a_video": 2, "unreadable": 1}
    assert facts["config_digest"] == SMALL.digest()


def test_rows_tell_true_frames_spans_and_labels(sharded: Path) -> None:
    rows = pq.read_table(sharded / schema.INDEX).to_pylist()
    ten = sorted((r for r in rows if r["source"].endswith("/ten.mp4")), key=lambda r: r["key"])
    assert [(r["span_start_s"], r["span_end_s"], r["frames"]) for r in ten] == [
        (0, 1, 25),
        (1, 2, 25),
        (2, 3, 25),
    ]
    assert [r["key"] for r in ten] == [schema.clip_key(ten[0]["source"], i) for i in range(3)]
    labels = json.loads((sharded / schema.LABELS).read_text())
    assert labels == {"a": 0, "b": 1}
    assert all(labels[r["label"]] == r["label_id"] and f"/raw/{r['label']}/" in r["source"] for r in rows)


@pytest.mark.parametrize("workers", [2, 4])
def test_bytes_do_not_depend_on_the_number_of_workers(
    workers: int, sharded: Path, tiny_bucket: Path, tmp_path: Path
) -> None:
    seen: list[Progress] = []
    shard(str(tiny_bucket), str(tmp_path / "dst"), SMALL, workers=workers, on_progress=seen.append)
    assert _files(tmp_path / "dst") == _files(sharded)
    assert seen[-1].sources_done == seen[-1].sources == VIDEOS + BROKEN
    assert seen[-1].rejected == BROKEN


def test_a_second_run_does_nothing(sharded: Path, tiny_bucket: Path, tmp_path: Path) -> None:
    dst = shutil.copytree(sharded, tmp_path / "dst")
    before = {p: p.stat().st_mtime_ns for p in dst.rglob("*")}
    again = shard(str(tiny_bucket), str(dst), SMALL)
    assert again.already_done_tasks == 6
    assert again.sources_kept == VIDEOS
    assert {p: p.stat().st_mtime_ns for p in dst.rglob("*")} == before


@pytest.mark.parametrize("commits", [1, 3])
def test_a_job_killed_by_sigkill_resumes_to_the_same_bytes(
    commits: int, sharded: Path, tiny_bucket: Path, tmp_path: Path
) -> None:
    dst = tmp_path / "dst"
    code = (
        "import sys\n"
        "from reelmae.pipeline.ingest.job import shard\n"
        "from reelmae.pipeline.ingest.config import ShardConfig\n"
        "shard(sys.argv[1], sys.argv[2], ShardConfig.model_validate_json(sys.argv[3]), workers=1)"
    )
    argv = [sys.executable, "-c", code, str(tiny_bucket), str(dst), SMALL.model_dump_json()]
    process = subprocess.Popen(argv, env={**os.environ, "TMPDIR": str(tmp_path)}, start_new_session=True)
    while len(list(dst.glob("commits/*.parquet"))) < commits:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (dst / schema.DATASET_JSON).exists()
    done = len(list(dst.glob("commits/*.parquet")))
    summary = shard(str(tiny_bucket), str(dst), SMALL, workers=2)
    assert summary.already_done_tasks == done
    assert _files(dst) == _files(sharded)


def test_leftovers_of_a_crash_count_for_nothing(sharded: Path, tiny_bucket: Path, tmp_path: Path) -> None:
    dst = shutil.copytree(sharded, tmp_path / "dst")
    for name in (schema.DATASET_JSON, schema.INDEX, schema.REJECTS_FILE, "commits/000002.parquet"):
        (dst / name).unlink()
    tar = next(dst.glob("shards/000002-*.tar"))
    tar.write_bytes(tar.read_bytes()[:700])
    (dst / "shards/.000002-00.tar.123.456.part").write_bytes(b"half")
    (dst / ".index.parquet.123.456.part").write_bytes(b"half")
    assert shard(str(tiny_bucket), str(dst), SMALL).already_done_tasks == 5
    assert _files(dst) == _files(sharded)


def test_ctrl_c_stops_children_and_leaves_a_resumable_dst(sharded: Path, tiny_bucket: Path, tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.sources_done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shard(str(tiny_bucket), str(tmp_path / "dst"), SMALL, workers=2, on_progress=interrupt)
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    assert not [c for c in children if b"ffmpeg" in Path(f"/proc/{c}/cmdline").read_bytes()]
    shard(str(tiny_bucket), str(tmp_path / "dst"), SMALL)
    assert _files(tmp_path / "dst") == _files(sharded)


def test_another_config_or_source_is_refused_with_the_difference(
    sharded: Path, tiny_bucket: Path, tmp_path: Path
) -> None:
    before = _files(sharded)
    other = SMALL.model_copy(update={"short_side": 64})
    with pytest.raises(JobMismatchError, match="short_side: 48 there, 64 here"):
        shard(str(tiny_bucket), str(sharded), other)
    shutil.copytree(tiny_bucket, tmp_path / "elsewhere")
    with pytest.raises(JobMismatchError, match="elsewhere"):
        shard(str(tmp_path / "elsewhere"), str(sharded), SMALL)
    assert _files(sharded) == before


def test_files_that_come_later_are_not_in_the_frozen_plan(tiny_bucket: Path, tmp_path: Path) -> None:
    src, dst = shutil.copytree(tiny_bucket, tmp_path / "src"), tmp_path / "dst"
    shard(str(src), str(dst), SMALL)
    (dst / schema.DATASET_JSON).unlink()
    shutil.copy(src / "a/one.mp4", src / "a/later.mp4")
    (src / "a/two.mkv").unlink()  # and what is committed needs its source no more
    assert shard(str(src), str(dst), SMALL).sources == VIDEOS + BROKEN


def test_dst_within_src_is_refused(tiny_bucket: Path, tmp_path: Path) -> None:
    for dst in (tiny_bucket, tiny_bucket / "out", tiny_bucket / "a" / ".." / "out"):
        with pytest.raises(InputError, match="lies within"):
            shard(str(tiny_bucket), str(dst), SMALL)
    assert not (tiny_bucket / "out").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        shard(str(tiny_bucket), str(tmp_path / "file"), SMALL)


def test_a_foreign_dataset_is_not_overwritten(tiny_bucket: Path, tmp_path: Path) -> None:
    (tmp_path / "dst" / "shards").mkdir(parents=True)
    with pytest.raises(JobMismatchError, match=r"no plan/plan.json"):
        shard(str(tiny_bucket), str(tmp_path / "dst"), SMALL)


def test_all_rejected_is_an_error_that_names_the_reasons(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    for i in range(3):
        (tmp_path / "src" / f"{i}.mp4").write_text("no video")
    for _ in range(2):  # the second time from the finished dataset
        with pytest.raises(NothingKeptError, match="3 x not_a_video"):
            shard(str(tmp_path / "src"), str(tmp_path / "dst"))
    assert pq.read_table(tmp_path / "dst" / schema.REJECTS_FILE).num_rows == 3
    assert verify(str(tmp_path / "dst")).ok


def test_a_full_destination_is_told_and_resumes(
    sharded: Path, tiny_bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(signal, "SIGXFSZ", signal.SIGXFSZ)  # Python ignores it: the write fails with EFBIG
    shard_files = [p.stat().st_size for p in (sharded / "shards").glob("*.tar")]
    resource.setrlimit(resource.RLIMIT_FSIZE, (min(shard_files) - 1, before[1]))
    try:
        with pytest.raises((StorageFullError, StorageError)):
            shard(str(tiny_bucket), str(tmp_path / "dst"), SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "dst" / schema.DATASET_JSON).exists()
    shard(str(tiny_bucket), str(tmp_path / "dst"), SMALL)
    assert _files(tmp_path / "dst") == _files(sharded)


def test_the_ledger_finds_what_is_lost_doubled_or_foreign() -> None:
    check_ledger(["a", "b"], {"a"}, ["b"])
    for with_clips, rejected, words in (
        ({"a"}, [], "'b' is lost"),
        ({"a", "b"}, ["b"], "clips and a reject"),
        ({"a", "b", "c"}, [], "never planned"),
        ({"a"}, ["b", "b"], "rejected twice"),
    ):
        with pytest.raises(DatasetError, match=words):
            check_ledger(["a", "b"], with_clips, rejected)


def test_a_damaged_commit_stops_the_end_of_a_job(sharded: Path, tiny_bucket: Path, tmp_path: Path) -> None:
    dst = shutil.copytree(sharded, tmp_path / "dst")
    (dst / schema.DATASET_JSON).unlink()
    commit = dst / "commits/000001.parquet"
    table = pq.read_table(commit)
    pq.write_table(table.slice(0, 0), commit)
    with pytest.raises(DatasetError, match="is lost"):
        shard(str(tiny_bucket), str(dst), SMALL)
    assert not (dst / schema.DATASET_JSON).exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its files open
def test_plain_webdataset_reads_the_shards(sharded: Path) -> None:
    import webdataset

    urls = [str(p) for p in sorted(sharded.glob("shards/*.tar"))]
    index = pq.read_table(sharded / schema.INDEX).to_pylist()
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [s["__key__"] for s in read] == [r["key"] for r in index]
    assert [s["json"]["source"] for s in read] == [r["source"] for r in index]
    assert [len(s["mp4"]) for s in read] == [r["size"] for r in index]


def test_dalis_reader_reads_the_shards(sharded: Path) -> None:
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn, pipeline_def

    tars = sorted(sharded.glob("shards/*.tar"))
    rows = pq.read_table(sharded / schema.INDEX).to_pylist()

    @pipeline_def(batch_size=len(rows), num_threads=1, device_id=None)
    def read() -> Any:
        videos, facts = fn.readers.webdataset(
            paths=[str(t) for t in tars],
            index_paths=[str(t.with_suffix(".idx")) for t in tars],
            ext=["mp4", "json"],
        )
        return videos, facts

    pipe = read()
    pipe.build()
    videos, facts = pipe.run()
    for i, row in enumerate(rows):
        tar = (sharded / row["shard"]).read_bytes()
        assert bytes(videos.at(i).tobytes()) == tar[row["offset"] : row["offset"] + row["size"]]
        assert json.loads(facts.at(i).tobytes())["source"] == row["source"]


def test_from_s3_to_s3_on_a_real_server(tiny_bucket: Path, sharded: Path, s3_server: Any, tmp_path: Path) -> None:
    source = Store(s3_server.url("raw"))
    for path in sorted(p for p in tiny_bucket.rglob("*") if p.is_file()):
        source.publish(path, path.relative_to(tiny_bucket).as_posix())
    dst = s3_server.url("out/ds")
    summary = shard(s3_server.url("raw"), dst, SMALL, workers=2)
    assert (summary.sources, summary.sources_kept) == (VIDEOS + BROKEN, VIDEOS)
    report = verify(dst, deep=True)
    assert report.faults == ()
    assert report.clips == pq.read_table(sharded / schema.INDEX).num_rows
    assert shard(s3_server.url("raw"), dst, SMALL).already_done_tasks == 6
    with pytest.raises(InputError, match="lies within"):
        shard(s3_server.url("raw"), s3_server.url("raw/out"), SMALL)
    with pytest.raises(InputError, match="check the path"):
        shard(s3_server.url("nothing-here"), s3_server.url("x"), SMALL)


@pytest.mark.parametrize("left", ["an empty folder", "nothing"])
def test_an_unmounted_disk_is_not_a_thousand_gone_files(
    left: str, sharded: Path, tiny_bucket: Path, tmp_path: Path
) -> None:
    src, dst, away = tmp_path / "src", tmp_path / "dst", tmp_path / "away"
    shutil.copytree(tiny_bucket, src)
    shard(str(src), str(tmp_path / "undisturbed"), SMALL, workers=1)

    def unmount(progress: Progress) -> None:
        if progress.sources_done >= 4 and not away.exists():
            src.rename(away)
            if left == "an empty folder":
                src.mkdir()

    with pytest.raises(StorageError, match=r"is missing, and .*src (is empty: is a disk not mounted|cannot be read)"):
        shard(str(src), str(dst), SMALL, workers=1, on_progress=unmount)
    assert not (dst / schema.DATASET_JSON).exists()
    if left == "an empty folder":
        src.rmdir()
    away.rename(src)
    assert shard(str(src), str(dst), SMALL).rejected == {"empty_file": 1, "not_a_video": 2, "unreadable": 1}
    assert _files(dst) == _files(tmp_path / "undisturbed")


def test_what_is_wrong_with_dst_is_said_before_src_is_listed(sharded: Path, tmp_path: Path) -> None:
    """SRC does not exist here: it would be the error if it were looked at first."""
    dst, nowhere = shutil.copytree(sharded, tmp_path / "dst"), str(tmp_path / "nowhere")
    with pytest.raises(JobMismatchError, match="holds another job"):
        shard(nowhere, str(dst), SMALL)
    (dst / schema.PLAN_JSON).unlink()
    with pytest.raises(JobMismatchError, match="give an empty DST"):
        shard(nowhere, str(dst), SMALL)
    with pytest.raises(InputError, match="no such folder"):
        shard(nowhere, str(tmp_path / "new"), SMALL)
    assert not (tmp_path / "new").exists()  # not even for the claim
    assert not (dst / "claim.json").exists()


def test_of_two_jobs_with_different_sources_the_second_is_told(
    make_video: Make, tmp_path: Path, sharded: Path, tiny_bucket: Path
) -> None:
    """While the first lists its sources, and while it shards."""
    make_video(tmp_path / "other" / "x.mp4", frames=3)
    dst = tmp_path / "dst"
    refused = 0

    def second(progress: Progress | None = None) -> None:
        nonlocal refused
        with pytest.raises(ClaimedError, match=r"another job writes to it \(.*process \d+, since"):
            shard(str(tmp_path / "other"), str(dst), SMALL)
        refused += 1

    listing = sources.list_sources
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "list_sources", lambda *given: (second(), listing(*given))[1])
        shard(str(tiny_bucket), str(dst), SMALL, workers=2, on_progress=second)
    assert refused > 1
    assert _files(dst) == _files(sharded)
    with pytest.raises(JobMismatchError, match="src: "):
        shard(str(tmp_path / "other"), str(dst), SMALL)


@pytest.mark.parametrize("ended", [True, False])
def test_a_job_that_was_taken_over_writes_no_plan(
    ended: bool, sharded: Path, tiny_bucket: Path, tmp_path: Path
) -> None:
    """Whether the other still works or has ended."""
    dst = tmp_path / "dst"
    listing = sources.list_sources
    words = "its claim is gone" if ended else "was taken over by"

    def take_over(*given: Any) -> Any:
        patch.setattr(parts, "list_sources", listing)
        shard(str(tiny_bucket), str(dst), SMALL, takeover=True)
        return listing(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "list_sources", take_over)
        if not ended:
            patch.setattr(Claim, "_release", lambda self: None)
        with pytest.raises(ClaimedError, match=words):
            shard(str(tiny_bucket), str(dst), SMALL.model_copy(update={"short_side": 64}))
    (dst / "claim.json").unlink(missing_ok=True)
    assert _files(dst) == _files(sharded)
