"""Every runner: each task is reported once, errors go on to the caller, and what runs is stopped then."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from reelmae.pipeline.errors import BadClipError, ConfigError, DatasetError, StorageError
from reelmae.pipeline.runners.local import LocalRunner
from reelmae.pipeline.runners.ray import RayRunner
from reelmae.pipeline.runners.runner import Runner, Watch


@pytest.fixture(scope="module", params=["local", "ray"])
def runner(request: pytest.FixtureRequest) -> Iterator[Runner]:
    if request.param == "local":
        with LocalRunner(2) as local:
            yield local
        return
    ray = pytest.importorskip("ray")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the nodes cannot import a test
    with RayRunner(workers=2) as cluster:
        yield cluster
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@dataclass(frozen=True)
class _Report:
    task: int
    items: int


class _Worker:
    """Leaves a file for each task that it runs, and one for its end."""

    def __init__(self, folder: Path, fails: Callable[[int], None] | None = None) -> None:
        self._folder, self._fails, self._halted = folder, fails, False

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        (self._folder / f"closed-{os.getpid()}").touch()

    def stop(self) -> None:
        self._halted = True

    def run(self, task: int, watch: Watch[_Report] | None = None) -> _Report:
        for item in range(3):
            if watch is not None:
                assert watch.begin(f"item {item}") == 1
                watch.report(_Report(task, item + 1))
        if self._fails is not None:
            self._fails(task)
        with (self._folder / f"ran-{task}").open("a") as file:
            file.write("x")
        return _Report(task, 3)


def _fail(kind: type[Exception], words: tuple[str, ...], task: int) -> None:
    if task == 3:
        raise kind(*words)
    time.sleep(0.01)


def _say(task: int) -> None:
    import logging

    logging.getLogger("reelmae.test").warning("task %d waits", task)


def test_each_task_is_run_and_reported_once(runner: Runner, tmp_path: Path) -> None:
    ticks: list[int] = []
    reports = list(runner.run(range(50), partial(_Worker, tmp_path), tick=lambda: ticks.append(1)))
    assert sorted(r.task for r in reports) == list(range(50))
    assert [(tmp_path / f"ran-{task}").read_text() for task in range(50)] == ["x"] * 50
    assert ticks


def test_no_task_is_no_report(runner: Runner, tmp_path: Path) -> None:
    assert list(runner.run([], partial(_Worker, tmp_path))) == []


def test_reports_of_running_tasks_are_passed_on_before_their_end(runner: Runner, tmp_path: Path) -> None:
    seen: set[int] = set()
    ended: set[int] = set()

    def see(report: Any) -> None:
        assert report.task not in ended
        seen.add(report.task)
        (tmp_path / f"seen-{report.task}").touch()

    for report in runner.run(range(4), partial(_Worker, tmp_path, partial(_wait_for, tmp_path)), on_report=see):
        ended.add(report.task)
    assert seen == {0, 1, 2, 3}


def _wait_for(folder: Path, task: int) -> None:
    """Until its report was seen."""
    deadline = time.monotonic() + 120
    while not (folder / f"seen-{task}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _sleep(task: int) -> None:
    time.sleep(1.0)


@pytest.mark.parametrize(
    ("raised", "words", "found"),
    [(StorageError, ("s3://b: gone",), StorageError), (BadClipError, ("k", "torn"), DatasetError)],
)
def test_an_error_of_ours_reaches_the_caller_in_its_own_words(
    runner: Runner, tmp_path: Path, raised: type[Exception], words: tuple[str, ...], found: type[Exception]
) -> None:
    with pytest.raises(found) as caught:
        list(runner.run(range(200), partial(_Worker, tmp_path, partial(_fail, raised, words))))
    assert str(caught.value) == str(raised(*words))
    assert not (tmp_path / "ran-199").exists(), "nothing new begins after it"


def test_an_error_of_the_program_is_not_hidden(runner: Runner, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        list(runner.run(range(9), partial(_Worker, tmp_path, partial(_fail, ZeroDivisionError, ("one",)))))


def test_a_caller_who_stops_early_ends_what_runs(runner: Runner, tmp_path: Path) -> None:
    reports = runner.run(range(500), partial(_Worker, tmp_path, _sleep))
    next(reports)
    reports.close()
    before = len(list(tmp_path.glob("ran-*")))
    time.sleep(1.5)
    assert len(list(tmp_path.glob("ran-*"))) == before < 100


def test_a_second_run_has_workers_of_its_own(runner: Runner, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        list(runner.run(range(4), partial(_Worker, tmp_path / name)))
        assert len(list((tmp_path / name).glob("ran-*"))) == 4


def test_a_warning_of_a_worker_is_one_of_the_caller(
    runner: Runner, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    list(runner.run([0], partial(_Worker, tmp_path, _say)))
    assert any("task 0 waits" in record.getMessage() for record in caplog.records)


def test_nodes_answer_by_name(runner: Runner) -> None:
    answers = runner.ask_nodes(os.getpid)
    if isinstance(runner, LocalRunner):
        assert answers == {}
    else:
        assert len(answers) == 1 and os.getpid() not in answers.values()


@pytest.mark.parametrize("kind", [LocalRunner, RayRunner])
def test_no_worker_at_all_is_refused(kind: Any) -> None:
    with pytest.raises(ConfigError, match="workers=0: must be at least 1"):
        kind(workers=0)
