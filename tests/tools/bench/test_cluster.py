"""The benchmark of a cluster at a small size, and its checks of what a driver is told."""

from __future__ import annotations

import json

import pytest

from reelmae.pipeline.errors import ReelmaeError
from reelmae.pipeline.ingest.run.task import TaskReport
from reelmae.tools.bench.cluster import Progress, bench_cluster
from reelmae.tools.bench.commits import expected_counts
from reelmae.tools.bench.config import BenchClusterConfig


def test_all_tasks_end_while_nodes_join_and_leave() -> None:
    pytest.importorskip("ray", reason="Ray is not installed (pip install 'reelmae[ray]')")
    found = json.loads(json.dumps(bench_cluster(BenchClusterConfig(tasks=300, sources=3000, nodes=1, change_s=2.0))))
    empty, plan = found["empty"], found["plan"]
    assert empty["tasks"] == 300
    assert plan["tasks"] == 64
    assert {name: plan[name] for name in expected_counts(3000)} == expected_counts(3000)
    assert plan["join_seconds"] > 0
    for part in (empty, plan):
        assert part["tasks_per_second"] == pytest.approx(part["tasks"] / part["seconds"])
        assert 50 << 20 < part["driver_peak_rss_bytes"] < 1 << 30
    assert empty["nodes_joined"] + plan["nodes_joined"] >= 1
    assert {"cpu", "cores"} <= set(found["machine"])


def _report(task: int, sources: int) -> TaskReport:
    return TaskReport(task, sources, clips=sources)


def test_a_task_that_begins_again_does_not_set_progress_back() -> None:
    progress = Progress(2)
    for task, sources in ((0, 4), (1, 2), (0, 9), (0, 3), (0, 9)):  # the worker of task 0 died after nine sources
        progress.see(_report(task, sources))
    progress.end(_report(0, 10))
    progress.end(_report(1, 10))
    progress.close(20)


def test_progress_that_goes_back_is_an_error() -> None:
    progress = Progress(2)
    progress.see(_report(0, 4))
    progress.end(_report(0, 3))
    with pytest.raises(ReelmaeError, match=r"went back from \(4, 4, 0\)"):
        progress.tick()


def test_a_task_that_is_reported_twice_or_never_is_an_error() -> None:
    progress = Progress(2)
    progress.end(_report(0, 3))
    with pytest.raises(ReelmaeError, match="task 0 was reported twice"):
        progress.end(_report(0, 3))
    with pytest.raises(ReelmaeError, match="1 of 2 tasks"):
        progress.close(3)
    progress.end(_report(1, 3))
    with pytest.raises(ReelmaeError, match="6 of 7 sources"):
        progress.close(7)
    progress.close(6)
