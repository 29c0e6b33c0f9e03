"""One worker of a runner checks the shards of tasks: what it reports, and how it ends."""

from __future__ import annotations

import hashlib
import pickle
import threading
from collections.abc import Callable, Generator
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from reelmae.pipeline import schema
from reelmae.pipeline.dataset.faults import Mend
from reelmae.pipeline.dataset.task_check import CheckSpec, CheckWorker, TaskCheck, _find_problem
from reelmae.pipeline.dataset.verification import verify
from reelmae.pipeline.errors import ReelmaeError
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.job import shard
from reelmae.pipeline.ingest.run.task import BEGINS
from reelmae.pipeline.runners.local import LocalRunner
from reelmae.pipeline.storage.access import Access


@pytest.fixture(scope="module")
def dst(make_video: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks of two sources, a shard for each clip."""
    folder = tmp_path_factory.mktemp("check")
    for i in range(4):
        make_video(folder / "src" / f"{i}.mp4", seed=i)
    config = ShardConfig(short_side=48, sources_per_task=2, shard_bytes=1)
    shard(str(folder / "src"), str(folder / "dst"), config, workers=1)
    return folder / "dst"


def _spec(dst: Path, deep: bool = False, **values: object) -> CheckSpec:
    about = hashlib.sha256((dst / schema.DATASET_JSON).read_bytes()).hexdigest() if dst.exists() else ""
    return CheckSpec(str(dst), schema.FORMAT, {}, deep, Access(), about, **values)  # type: ignore[arg-type]


class _Watch:
    """As of a cluster on which `deaths` workers have died over the second shard."""

    def __init__(self, deaths: int = 0, on_begin: Callable[[], None] = lambda: None) -> None:
        self.deaths, self.on_begin = deaths, on_begin
        self.begun: list[str] = []
        self.reports: list[TaskCheck] = []

    def begin(self, item: str) -> int:
        self.begun.append(item)
        self.on_begin()
        return 1 + self.deaths * (len(self.begun) == 2)

    def report(self, report: TaskCheck) -> None:
        self.reports.append(report)


@pytest.mark.parametrize("deep", [False, True])
def test_reports_are_the_counts_of_a_task_and_can_be_pickled(dst: Path, deep: bool) -> None:
    make = pickle.loads(pickle.dumps(partial(CheckWorker, _spec(dst, deep))))
    with make() as worker:
        found = [pickle.loads(pickle.dumps(worker.run(task))) for task in (1, 0)]
    whole = verify(str(dst), deep)
    assert [(r.task, r.is_checked, r.faults, r.undecodable) for r in found] == [(t, True, (), ()) for t in (1, 0)]
    assert sum(r.shards for r in found) == whole.shards == 4
    assert sum(r.clips for r in found) == whole.clips
    assert sum(r.bytes for r in found) == whole.bytes


def test_a_task_without_a_commit_is_left_to_the_one_who_asked(dst: Path) -> None:
    with CheckWorker(_spec(dst)) as worker:
        assert worker.run(7) == TaskCheck(7, is_checked=False)


def test_a_shard_over_which_workers_died_is_named_and_the_others_are_checked(dst: Path) -> None:
    for deaths in (BEGINS - 1, BEGINS):
        watch = _Watch(deaths)
        with CheckWorker(_spec(dst)) as worker:
            report = worker.run(0, watch)
        assert [r.shards for r in watch.reports] == [1, 2 if deaths < BEGINS else 1]
        if deaths < BEGINS:
            assert report.faults == ()
    (fault,) = report.faults
    assert fault.text == f"{watch.begun[1]}: cannot be checked: {BEGINS} workers died over it"
    assert (fault.mend, fault.task, report.shards) == (Mend.NONE, None, 1)


class _Hiding(LocalRunner):
    """Its workers do not see a commit that is there for everybody else."""

    hidden: Path

    def run(self, *args: Any, **how: Any) -> Generator[Any, None, None]:
        away = self.hidden.with_suffix(".away")
        self.hidden.rename(away)
        yield from super().run(*args, **how)
        away.rename(self.hidden)


def test_a_commit_that_only_workers_do_not_see_is_no_fault(dst: Path) -> None:
    runner = _Hiding(2)
    runner.hidden = dst / schema.commit_name(1, schema.FORMAT)
    report, wanted = verify(str(dst), runner=runner), verify(str(dst))
    assert report.faults == ()
    assert (report.shards, report.clips, report.bytes) == (wanted.shards, wanted.clips, wanted.bytes)


@pytest.mark.parametrize("deep", [False, True])
def test_a_worker_that_is_stopped_blames_no_clip(dst: Path, deep: bool) -> None:
    with CheckWorker(_spec(dst, deep)) as worker:

        def stop() -> None:
            thread = threading.Thread(target=worker.stop)
            thread.start()
            thread.join()

        with pytest.raises(ReelmaeError, match="stopped"):
            worker.run(0, _Watch(on_begin=stop))


def test_what_keeps_a_machine_from_checking_is_told(dst: Path) -> None:
    ours = version("reelmae")
    assert _find_problem(_spec(dst), ours) == ""
    assert _find_problem(_spec(dst), "0.0") == f"has reelmae {ours}, this machine 0.0; install the same on all nodes"
    assert "give a DST that all nodes share" in _find_problem(_spec(dst / "nowhere"), ours)
    assert "does not see the same dataset" in _find_problem(replace(_spec(dst), about="0" * 64), ours)  # an older copy
    assert _find_problem(CheckSpec("nofs://x", schema.FORMAT, {}, False), ours).startswith("cannot reach the dataset: ")
