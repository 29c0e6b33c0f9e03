"""A worker is made from a picklable description alone: on any machine, stopped from any thread, refused by name."""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from reelmae.pipeline.errors import ClaimedError, JobMismatchError
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.ffmpeg import find_ffmpeg
from reelmae.pipeline.ingest.job import shard
from reelmae.pipeline.ingest.plan import parts
from reelmae.pipeline.ingest.run.task import BEGINS, JobSpec, StoppedError, TaskReport, TaskWorker
from reelmae.pipeline.ingest.shards.commits import committed_tasks, read_commit
from reelmae.pipeline.runners.local import LocalRunner
from reelmae.pipeline.schema import CLIP, REJECT, commit_name
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.claim import Claim
from reelmae.pipeline.storage.store import Store

Make = Callable[..., Path]
SMALL = ShardConfig(short_side=48, clip_seconds=1, sources_per_task=6, labels="folder").resolve()


class _Watch:
    """Remembers what a worker says. `died`: url → how many workers died over it before."""

    def __init__(self, died: dict[str, int] | None = None) -> None:
        self.died = died or {}
        self.begun: list[str] = []
        self.reports: list[TaskReport] = []

    def begin(self, item: str) -> int:
        self.begun.append(item)
        return self.died.get(item, 0) + 1

    def report(self, report: TaskReport) -> None:
        self.reports.append(report)


def _plan(src: Path, dst: Path, config: ShardConfig = SMALL) -> JobSpec:
    store = Store(str(dst))
    return JobSpec.of(store, parts.new_plan(str(src), store, config, find_ffmpeg(), None))


def _files(dst: Path) -> dict[str, bytes]:
    return {str(p.relative_to(dst)): p.read_bytes() for p in sorted(dst.rglob("*")) if p.is_file()}


def test_a_pickled_spec_runs_in_a_fresh_process_to_the_same_bytes(
    tiny_bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch, elsewhere = tmp_path / "scratch", tmp_path / "elsewhere"
    scratch.mkdir()
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    shard(str(tiny_bucket), str(tmp_path / "local"), SMALL, workers=1)
    spec = _plan(tiny_bucket, tmp_path / "dst")
    with TaskWorker(spec):  # a worker that was made from it leaves nothing in it
        data = pickle.dumps(spec)
    assert spec.labels == {"a": 0, "b": 1}
    for path in (find_ffmpeg().path, str(scratch)):
        assert path.encode() not in data
    (tmp_path / "spec").write_bytes(data)
    code = (
        "import pickle, sys\n"
        "from pathlib import Path\n"
        "from reelmae.pipeline.ingest.run.task import TaskWorker\n"
        "spec = pickle.loads(Path(sys.argv[1]).read_bytes())\n"
        "with TaskWorker(spec) as worker:\n"
        "    reports = [worker.run(task) for task in range(spec.plan.tasks)]\n"
        "Path(sys.argv[2]).write_bytes(pickle.dumps(reports))\n"
    )
    argv = [sys.executable, "-c", code, str(tmp_path / "spec"), str(tmp_path / "reports")]
    subprocess.run(argv, env={**os.environ, "TMPDIR": str(elsewhere)}, check=True)
    assert list(elsewhere.iterdir()) == []
    reports: list[TaskReport] = pickle.loads((tmp_path / "reports").read_bytes())
    here = {name: data for name, data in _files(tmp_path / "local").items() if name.startswith(("commits/", "shards/"))}
    there = {name: data for name, data in _files(tmp_path / "dst").items() if name.startswith(("commits/", "shards/"))}
    assert len(here) > len(reports) == 3
    assert there == here
    assert shard(str(tiny_bucket), str(tmp_path / "dst"), SMALL).already_done_tasks == 3
    assert _files(tmp_path / "dst") == _files(tmp_path / "local")


def test_a_report_counts_what_its_commit_holds(tiny_bucket: Path, tmp_path: Path) -> None:
    spec, watch = _plan(tiny_bucket, tmp_path / "dst"), _Watch()
    with TaskWorker(spec) as worker:
        reports = [worker.run(task, watch) for task in range(spec.plan.tasks)]
    store, seen = Store(spec.dst), watch.reports
    for report in reports:
        rows = read_commit(store, report.task, spec.plan.format).to_pylist()
        clips = [row for row in rows if row["kind"] == CLIP]
        rejects = Counter(row["reason"] for row in rows if row["kind"] != CLIP)
        sources = {row["source"] for row in rows}
        read = [Path(s).stat().st_size for s in sources]
        assert report == TaskReport(
            report.task, len(sources), sum(read), len(clips), sum(row["size"] for row in clips), dict(rejects)
        )
    assert [report.task for report in reports] == [0, 1, 2]
    assert [(r.task, r.sources) for r in seen] == [(t, n + 1) for t in range(3) for n in range(reports[t].sources)]
    assert [r for r in seen if r.sources == reports[r.task].sources] == reports
    (planned,) = parts.sources_of(store, spec.plan, ["url"])
    assert watch.begun == planned.column("url").to_pylist()


def test_a_source_over_which_workers_died_costs_its_own_row(tiny_bucket: Path, tmp_path: Path) -> None:
    spec = _plan(tiny_bucket, tmp_path / "dst")
    (planned,) = parts.sources_of(Store(spec.dst), spec.plan, ["url", "task"])
    urls = [row["url"] for row in planned.to_pylist() if row["task"] == 0 and "/a/" in row["url"]]
    watch = _Watch({urls[0]: BEGINS, urls[1]: BEGINS - 1})
    with TaskWorker(spec) as worker:
        report = worker.run(0, watch)
    assert report.rejected["crashed"] == 1
    rows = read_commit(Store(spec.dst), 0, spec.plan.format).to_pylist()
    assert [(r["kind"], r["reason"], r["detail"]) for r in rows if r["source"] == urls[0]] == [
        (REJECT, "crashed", f"{BEGINS} workers died over it")
    ]
    assert [r["kind"] for r in rows if r["source"] == urls[1]] == [CLIP]


def test_the_local_runner_reports_sources_of_running_tasks_in_the_callers_thread(
    tiny_bucket: Path, tmp_path: Path
) -> None:
    spec, threads, seen = _plan(tiny_bucket, tmp_path / "dst"), set(), Counter[int]()

    def see(report: TaskReport) -> None:
        threads.add(threading.get_ident())
        seen[report.task] = max(seen[report.task], report.sources)

    reports = list(LocalRunner(2).run([2, 0], lambda: TaskWorker(spec), on_report=see))
    assert threads == {threading.get_ident()}
    assert {r.task: r.sources for r in reports} == seen
    assert seen.total() == 6 + 4
    assert committed_tasks(Store(spec.dst), spec.plan.format) == {0, 2}


def test_another_ffmpeg_than_the_plans_is_refused_before_any_work(tiny_bucket: Path, tmp_path: Path) -> None:
    spec = _plan(tiny_bucket, tmp_path / "dst")
    old = spec.plan.parts[0].model_copy(update={"ffmpeg": "ffmpeg version 3.1"})
    plan = spec.plan.model_copy(update={"parts": (old,)})
    before, watch = _files(tmp_path / "dst"), _Watch()
    with TaskWorker(JobSpec(spec.dst, plan, spec.labels)) as worker, pytest.raises(JobMismatchError) as refused:
        worker.run(1, watch)
    words = str(refused.value)
    for part in ("task 1", "'ffmpeg version 3.1' there", f"{find_ffmpeg().version!r} here", "REELMAE_FFMPEG"):
        assert part in words
    assert (watch.begun, watch.reports) == ([], [])
    assert _files(tmp_path / "dst") == before


def test_only_the_part_of_the_task_must_have_this_ffmpeg(tiny_bucket: Path, make_video: Make, tmp_path: Path) -> None:
    src = tmp_path / "src"
    make_video(src / "a/one.mp4")
    shard(str(src), str(tmp_path / "dst"), SMALL)
    make_video(src / "a/two.mp4", seed=1)
    store = Store(str(tmp_path / "dst"))
    old = parts.read_plan(store)
    assert old is not None
    plan, _ = parts.append_sources(str(src), store, old, find_ffmpeg(), None)
    first = plan.parts[0].model_copy(update={"ffmpeg": "ffmpeg version 3.1"})
    spec = JobSpec.of(store, plan.model_copy(update={"parts": (first, plan.parts[1])}))
    with TaskWorker(spec) as worker:
        assert worker.run(1).sources == 1
        with pytest.raises(JobMismatchError, match=r"ffmpeg version 3\.1"):
            worker.run(0)


def test_another_version_of_ours_than_the_drivers_is_refused(tiny_bucket: Path, tmp_path: Path) -> None:
    """As on a node that joined later."""
    spec = replace(_plan(tiny_bucket, tmp_path / "dst"), reelmae="0.0.0")
    with TaskWorker(spec) as worker, pytest.raises(JobMismatchError, match=r"reelmae: 0\.0\.0 at the driver"):
        worker.run(0)


def test_a_worker_stopped_from_another_thread_kills_its_children_and_leaves_no_commit(
    list_processes: Callable[[Path], list[int]], make_video: Make, tmp_path: Path
) -> None:
    for i in range(6):
        make_video(tmp_path / "src" / "a" / f"{i}.mp4", frames=200, width=320, height=240, seed=i)
    spec, made = _plan(tmp_path / "src", tmp_path / "dst"), queue.SimpleQueue[TaskWorker]()

    def run_in_thread() -> Path:
        with TaskWorker(spec) as worker:
            made.put(worker)
            for _ in range(2):  # a stopped worker stays stopped
                with pytest.raises(StoppedError):
                    worker.run(0)
            assert list_processes(worker._folder) == []
            return worker._folder

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run_in_thread)
        worker = made.get()
        while not list_processes(worker._folder):
            assert not future.done()
            time.sleep(0.001)
        worker.stop()
        assert not future.result().exists()
    assert committed_tasks(Store(spec.dst), spec.plan.format) == set()
    shard(str(tmp_path / "src"), spec.dst, SMALL)
    assert pq.read_table(tmp_path / "dst" / "rejects.parquet").num_rows == 0


def test_a_commit_is_created_and_never_overwritten(tiny_bucket: Path, tmp_path: Path) -> None:
    spec = _plan(tiny_bucket, tmp_path / "dst")
    with TaskWorker(spec) as worker:
        report = worker.run(1)
        before = _files(tmp_path / "dst")
        assert worker.run(1) == report  # the same bytes: our own request whose answer was lost, or the same job
        assert _files(tmp_path / "dst") == before
        commit = tmp_path / "dst" / commit_name(1, spec.plan.format)
        commit.write_bytes(before[commit_name(1, spec.plan.format)] + b"x")
        with pytest.raises(
            ClaimedError, match=r"000001\.parquet: another job has written it meanwhile, with other rows"
        ):
            worker.run(1)
        assert commit.read_bytes().endswith(b"x")
    with TaskWorker(replace(spec, repairs=True)) as worker:  # a repair is there to replace it
        worker.run(1)
    assert _files(tmp_path / "dst") == before


def test_a_worker_whose_job_lost_its_claim_publishes_nothing(tiny_bucket: Path, tmp_path: Path) -> None:
    spec = _plan(tiny_bucket, tmp_path / "dst")
    before = _files(tmp_path / "dst")
    store = Store(spec.dst)
    with Claim(store) as claim:
        with TaskWorker(replace(spec, holders=("another",))) as worker, pytest.raises(ClaimedError, match="taken over"):
            worker.run(0)
        files = _files(tmp_path / "dst")
        files.pop("claim.json")
        assert files == before
        with TaskWorker(replace(spec, holders=claim.holders)) as worker:
            assert worker.run(0).sources == 6
    with TaskWorker(replace(spec, holders=claim.holders)) as worker, pytest.raises(ClaimedError, match="claim is gone"):
        worker.run(1)
    assert committed_tasks(store, spec.plan.format) == {0}


def test_a_worker_counts_and_stops_accesses_of_its_own(tiny_bucket: Path, tmp_path: Path) -> None:
    shared = Access({"auto_mkdir": True}, patience_s=7)
    spec = replace(_plan(tiny_bucket, tmp_path / "dst"), src_access=shared, dst_access=shared)
    with TaskWorker(spec) as worker:
        worker._src_access.retries.add("503 SlowDown", 2)
        worker._dst_access.retries.add("timed out")
        worker.stop()
    assert not shared.stopping.is_set()
    assert shared.retries.counts() == {}
    assert (worker._src_access.options, worker._src_access.patience_s) == ({"auto_mkdir": True}, 7)
    total = TaskReport(1, retries={"a": 1, "b": 2}) + TaskReport(1, retries={"b": 3})
    assert total.retries == {"a": 1, "b": 5}


def test_a_spec_shows_no_secret(tiny_bucket: Path, tmp_path: Path) -> None:
    access = Access({"secret": "s3cr3t"})
    spec = replace(_plan(tiny_bucket, tmp_path / "dst"), src_access=access, dst_access=access)
    assert "s3cr3t" not in repr(spec)
    assert b"s3cr3t" not in spec.plan.data()
    assert pickle.loads(pickle.dumps(spec)).src_access.options == {"secret": "s3cr3t"}
