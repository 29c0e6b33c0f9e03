"""Runs the tasks of a job: here on threads of this machine. A task is a number; its work is picklable.

A runner takes the numbers of the tasks that are still to do and a maker of workers, and yields one report per
finished task, in any order. Each thread makes one worker and closes it at its end: heavy lifting is in the
worker's child processes, so threads are enough and no crash of a codec reaches them. A Ray runner has the same
form: the maker goes to the cluster, numbers and reports travel, never video.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeVar

TICK_S = 0.2
R = TypeVar("R", covariant=True)


class Worker(AbstractContextManager["Worker[R]"], Protocol[R]):
    """Runs whole tasks, one at a time."""

    def run(self, task: int) -> R:
        """Run one task to its commit and report."""


@dataclass(frozen=True)
class _Ended:
    """A worker has no more to do, or failed."""

    error: BaseException | None


class LocalRunner:
    """`workers` threads of this process."""

    def __init__(self, workers: int) -> None:
        self._workers = workers

    def run(
        self,
        tasks: Iterable[int],
        make_worker: Callable[[], Worker[R]],
        stop: Callable[[], None],
        tick: Callable[[], None],
    ) -> Generator[R, None, None]:
        """Reports of the tasks as they finish; `tick` is called in the caller's thread a few times a second.

        On an error in a worker, or in the caller (Ctrl-C), `stop` is called, which must make running workers
        end soon; all threads are joined; then the error goes on.
        """
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for task in tasks:
            waiting.put(task)
        done: queue.SimpleQueue[R | _Ended] = queue.SimpleQueue()
        halted = threading.Event()

        def work() -> None:
            try:
                with make_worker() as worker:
                    while not halted.is_set():
                        try:
                            task = waiting.get_nowait()
                        except queue.Empty:
                            break
                        done.put(worker.run(task))
            except BaseException as e:
                done.put(_Ended(e))
                raise
            done.put(_Ended(None))

        with ThreadPoolExecutor(self._workers, thread_name_prefix="shard") as pool:
            try:
                for _ in range(self._workers):
                    pool.submit(work)
                running = self._workers
                while running:
                    try:
                        report = done.get(timeout=TICK_S)
                    except queue.Empty:
                        tick()
                        continue
                    if isinstance(report, _Ended):
                        running -= 1
                        if report.error is not None:
                            raise report.error
                        continue
                    yield report
                    tick()
            except BaseException:
                halted.set()
                stop()
                raise
