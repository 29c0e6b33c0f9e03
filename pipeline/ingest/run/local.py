"""Runs the tasks of a job: here on threads of this machine.

A runner takes the numbers of the tasks that are still to do and a maker of workers, and yields one report per
finished task, in any order. The heavy work is done by the worker's child processes, so threads are enough and no
crash of a codec reaches them.

A runner of a cluster has the same form: the maker of workers is pickled and goes to each node, which makes its own
workers (`functools.partial(TaskWorker, spec)` holds nothing else than the spec); task numbers go there, reports come
back, never video. `on_source` is for the display only and may be left out there.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

TICK_S = 0.2
R = TypeVar("R")  # the report of a task
R_co = TypeVar("R_co", covariant=True)


class Worker(AbstractContextManager["Worker[R_co]"], Protocol[R_co]):
    """Runs whole tasks, one at a time, in the thread that made it."""

    def run(self, task: int, on_source: Callable[[R_co], None] | None = None) -> R_co:
        """Run one task to its commit and report. `on_source` is called with the report so far, after each source."""

    def stop(self) -> None:
        """Make `run` end soon, with an error and without a commit. May be called from any thread."""


@dataclass(frozen=True)
class _Report(Generic[R]):
    """What a task reports: at its end, or so far."""

    report: R
    at_end: bool


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
        *,
        on_source: Callable[[R], None] | None = None,
        tick: Callable[[], None] | None = None,
    ) -> Generator[R, None, None]:
        """Reports of the tasks as they finish.

        Both callbacks are called in the caller's thread: `on_source` with the report so far of a running task, `tick`
        after each task and a few times a second. Each thread makes one worker and closes it at its end. On an error
        in a worker, or in the caller (Ctrl-C), all workers are stopped and all threads joined; then the error goes on.
        """
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for task in tasks:
            waiting.put(task)
        events: queue.SimpleQueue[_Report[R] | _Ended] = queue.SimpleQueue()
        halted = threading.Event()
        workers: list[Worker[R]] = []

        def send(report: R) -> None:
            events.put(_Report(report, at_end=False))

        def work() -> None:
            try:
                with make_worker() as worker:
                    workers.append(worker)  # before `halted` is read: who halts stops all that are in the list
                    while not halted.is_set():
                        try:
                            task = waiting.get_nowait()
                        except queue.Empty:
                            break
                        report = worker.run(task, None if on_source is None else send)
                        events.put(_Report(report, at_end=True))
            except BaseException as e:
                events.put(_Ended(e))
                raise
            events.put(_Ended(None))

        with ThreadPoolExecutor(self._workers, thread_name_prefix="shard") as pool:
            try:
                for _ in range(self._workers):
                    pool.submit(work)
                running = self._workers
                next_tick = time.monotonic() + TICK_S
                while running:
                    event: _Report[R] | _Ended | None = None
                    with contextlib.suppress(queue.Empty):
                        event = events.get(timeout=max(0.0, next_tick - time.monotonic()))
                    if isinstance(event, _Ended):
                        running -= 1
                        if event.error is not None:
                            raise event.error
                    elif event is not None and event.at_end:
                        yield event.report
                        next_tick = 0.0
                    elif event is not None and on_source is not None:
                        on_source(event.report)
                    if time.monotonic() >= next_tick:
                        if tick is not None:
                            tick()
                        next_tick = time.monotonic() + TICK_S
            except BaseException:
                halted.set()
                for worker in list(workers):
                    worker.stop()
                raise
