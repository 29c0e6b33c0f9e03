"""`reelmae bench cluster`: the driver of a job on a Ray cluster of which nodes join and leave all the while.

The nodes are real raylets, all on this machine. First `tasks` tasks run that do nothing. Then the tasks of a plan of
`sources` sources run, made as `bench plan` makes it; their workers read their sources and write generated commits
(commits.py), which the driver joins. Every `change_s` seconds a node joins, or the oldest one is killed with what runs
on it.

The driver is a process of its own, so that its peak memory is its alone. It checks that each task is reported once, and
that the counts of progress, as a job shows them, never go back; then, that the joined tables hold what was generated.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any

from reelmae.pipeline.errors import ReelmaeError
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.ffmpeg import find_ffmpeg
from reelmae.pipeline.ingest.job import Counts
from reelmae.pipeline.ingest.plan import parts
from reelmae.pipeline.ingest.run.task import TaskReport
from reelmae.pipeline.ingest.shards.ledger import finish
from reelmae.pipeline.runners.ray import RayRunner
from reelmae.pipeline.runners.ray_join import import_ray
from reelmae.pipeline.runners.runner import Watch, Worker
from reelmae.pipeline.schema import Reason
from reelmae.pipeline.storage.store import Store
from reelmae.tools.bench.commits import REJECTED, write_commit
from reelmae.tools.bench.config import BenchClusterConfig
from reelmae.tools.bench.join import check_counts
from reelmae.tools.bench.plan import write_manifest
from reelmae.tools.bench.processes import peak_bytes
from reelmae.tools.machine import machine, versions

_WATCHED = 64  # sources from one report of a task to the next; a job reports each one, but takes longer over it
_OBJECTS_BYTES = 80 << 20
_TASK_BYTES = 256 << 20  # of memory, that a task asks for
_SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # the second: loopback only
_SOON = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 300, "health_check_timeout_ms": 1000}


def bench_cluster(config: BenchClusterConfig) -> dict[str, Any]:
    """Measure once. ConfigError where Ray is not installed, ReelmaeError if a driver fails or counts wrong."""
    import_ray()
    environment = os.environ | _SETTINGS  # Ray reads them when it is imported: so the cluster's process is another
    argv = [sys.executable, "-m", "reelmae.tools.bench.cluster", "cluster", config.model_dump_json()]
    child = subprocess.run(argv, capture_output=True, text=True, check=False, env=environment)
    if child.returncode:
        raise ReelmaeError(f"the cluster failed: {child.stderr.strip()[-2000:]}")
    found = json.loads(child.stdout.splitlines()[-1])
    return {**config.model_dump(), **found, "machine": machine(), "versions": versions()}


# --- the cluster's process -------------------------------------------------------------------------------------------


class _Nodes:
    """A head without cores, on which the driver lives, and nodes of one core. Use as a context."""

    def __init__(self, count: int) -> None:
        from ray.cluster_utils import Cluster

        self._folder = tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True)
        self._cluster = Cluster(shutdown_at_exit=False)
        self._add(0, _system_config=_SOON, include_dashboard=False, no_monitor=True, include_log_monitor=False)
        self._count = count
        self.joined = self.left = 0
        for _ in range(count):
            self._add(1)

    def _add(self, cores: int, **values: Any) -> None:
        self._cluster.add_node(
            num_cpus=cores,
            object_store_memory=_OBJECTS_BYTES,
            node_ip_address="127.0.0.1",
            temp_dir=self._folder.name,  # a short path: sockets lie below it
            **values,
        )

    def __enter__(self) -> _Nodes:
        return self

    def __exit__(self, *_: object) -> None:
        for node in [*self._cluster.worker_nodes, self._cluster.head_node]:
            self._cluster.remove_node(node, allow_graceful=False)
        self._folder.cleanup()

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return str(self._cluster.address)

    def change(self) -> None:
        """A node joins; the next time the oldest one is killed, and so on."""
        nodes = self._cluster.worker_nodes
        if len(nodes) <= self._count:
            self._add(1)
            self.joined += 1
        else:
            self._cluster.remove_node(min(nodes, key=self._age), allow_graceful=False)
            self.left += 1

    def _age(self, node: Any) -> int:
        return int(node.all_processes["raylet"][0].process.pid)


def run_cluster(config: BenchClusterConfig) -> dict[str, Any]:
    """Both measurements, on one cluster."""
    with tempfile.TemporaryDirectory(prefix="reelmae-") as folder, _Nodes(config.nodes) as nodes:
        empty = _drive(nodes, config.change_s, "empty", str(config.tasks))
        manifest, dst = Path(folder, "manifest.csv"), Path(folder, "dst")
        write_manifest(manifest, config.sources)
        settings = ShardConfig(encoder="x264", duplicates="near").resolve()
        parts.new_plan(str(manifest), Store(str(dst)), settings, find_ffmpeg(), None)
        plan = _drive(nodes, config.change_s, "plan", str(dst))
        return {"empty": empty, "plan": plan | check_counts(dst, config.sources)}


def _drive(nodes: _Nodes, change_s: float, what: str, argument: str) -> dict[str, Any]:
    """Start a driver and change the cluster until it ends; what it measured, and how many nodes joined and left."""
    before = nodes.joined, nodes.left
    argv = [sys.executable, "-m", "reelmae.tools.bench.cluster", what, nodes.address, argument]
    driver = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                printed, words = driver.communicate(timeout=change_s)
                break
            nodes.change()
    finally:
        driver.kill()
    if driver.returncode:
        raise ReelmaeError(f"the driver failed: {words.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found | {"nodes_joined": nodes.joined - before[0], "nodes_left": nodes.left - before[1]}


# --- the driver ------------------------------------------------------------------------------------------------------


class Progress:
    """What a job shows of its tasks. ReelmaeError where a count goes back, or a task is reported twice."""

    def __init__(self, tasks: int) -> None:
        self._tasks, self._counts = tasks, Counts()
        self._ended: set[int] = set()
        self._shown = (0, 0, 0)

    def see(self, report: TaskReport) -> None:
        """As the runner's on_report."""
        self._counts.see(report)
        self.tick()

    def end(self, report: TaskReport) -> None:
        """A task has ended."""
        if report.task in self._ended:
            raise ReelmaeError(f"task {report.task} was reported twice")
        self._ended.add(report.task)
        self._counts.end(report)

    def tick(self) -> None:
        """As the runner's tick."""
        total = self._counts.total()
        shown = (total.sources, total.clips, sum(total.rejected.values()))
        if any(now < before for now, before in zip(shown, self._shown, strict=True)):
            raise ReelmaeError(f"progress went back from {self._shown} sources, clips and rejects to {shown}")
        self._shown = shown

    def close(self, sources: int) -> None:
        """All has ended."""
        self.tick()
        if self._ended != set(range(self._tasks)) or self._shown[0] != sources:
            raise ReelmaeError(
                f"{len(self._ended)} of {self._tasks} tasks, {self._shown[0]} of {sources} sources ended"
            )


def _run_tasks(address: str, tasks: int, make_worker: Callable[[], Worker[TaskReport]], sources: int) -> dict[str, Any]:
    """Run the tasks 0 to `tasks` - 1 and check what is reported; seconds, tasks a second, peak memory."""
    progress = Progress(tasks)
    with RayRunner(address, memory_bytes=_TASK_BYTES) as runner:
        began, cpu = time.perf_counter(), time.process_time()
        with closing(runner.run(range(tasks), make_worker, on_report=progress.see, tick=progress.tick)) as reports:
            for report in reports:
                progress.end(report)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
        progress.close(sources)
    return {
        "tasks": tasks,
        "seconds": seconds,
        "tasks_per_second": tasks / seconds,
        "driver_cpu_seconds": cpu_seconds,
        "driver_peak_rss_bytes": peak_bytes(),
    }


def drive_empty(address: str, tasks: str) -> dict[str, Any]:
    """The driver of tasks that do nothing."""
    return _run_tasks(address, int(tasks), _IdleWorker, int(tasks))


def drive_plan(address: str, dst: str) -> dict[str, Any]:
    """The driver of the plan at `dst`, to its joined tables."""
    store = Store(dst)
    plan = parts.read_plan(store)
    assert plan is not None
    found = _run_tasks(address, plan.tasks, functools.partial(_CommitWorker, dst), plan.sources)
    began = time.perf_counter()
    finish(store, plan)
    return found | {"join_seconds": time.perf_counter() - began, "driver_peak_rss_with_join_bytes": peak_bytes()}


# --- the workers -----------------------------------------------------------------------------------------------------


class _IdleWorker:
    """Does nothing."""

    def __enter__(self) -> _IdleWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def stop(self) -> None:
        """There is nothing to stop."""

    def run(self, task: int, watch: Watch[TaskReport] | None = None) -> TaskReport:
        """A report of one source."""
        return TaskReport(task, sources=1)


class _CommitWorker(_IdleWorker):
    """Reads the sources of a task and writes a generated commit."""

    def __init__(self, dst: str) -> None:
        self._store = Store(dst)
        plan = parts.read_plan(self._store)
        assert plan is not None
        self._stack = contextlib.ExitStack()
        self._sources = self._stack.enter_context(parts.part_file(self._store, plan.parts[0]))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def run(self, task: int, watch: Watch[TaskReport] | None = None) -> TaskReport:
        """Run one task; each _WATCHED sources are reported."""
        per_task = self._sources.metadata.row_group(0).num_rows
        urls = self._sources.read_row_group(task, columns=["url"]).column("url").to_pylist()
        report = TaskReport(task)
        for first in range(0, len(urls), _WATCHED):
            begin = task * per_task + first
            end = task * per_task + min(first + _WATCHED, len(urls))
            if watch is not None:
                watch.begin(urls[first])
            rejected = end // REJECTED - begin // REJECTED
            clips = end - begin - rejected
            report += TaskReport(task, end - begin, clips=clips, rejected={Reason.TRUNCATED.value: rejected})
            if watch is not None:
                watch.report(report)
        write_commit(self._store, task, task * per_task, urls)
        return report


def _main(what: str, *arguments: str) -> dict[str, Any]:
    """A process of the benchmark."""
    if what == "cluster":
        return run_cluster(BenchClusterConfig.model_validate_json(arguments[0]))
    return (drive_empty if what == "empty" else drive_plan)(*arguments)


if __name__ == "__main__":
    from reelmae.tools.bench import cluster  # not this module again: workers travel as names in it

    print(json.dumps(cluster._main(*sys.argv[1:])))
