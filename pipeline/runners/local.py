"""Runs tasks on threads of this process.

The heavy work of a task is done by its worker's child processes, so threads are enough, and no crash of a codec
reaches them.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic

from reelmae.pipeline.cores import usable_cores
from reelmae.pipeline.errors import ConfigError
from reelmae.pipeline.runners.runner import TICK_S, R, T, Worker


@dataclass(frozen=True)
class _Report(Generic[R]):
    """What a task reports: at its end, or so far."""

    report: R
    at_end: bool


@dataclass(frozen=True)
class _Ended:
    """A worker has no more to do, or failed."""

    error: BaseException | None


class _Watch(Generic[R]):
    """Puts the reports of a worker into a queue. No worker dies in this process without the process."""

    def __init__(self, events: queue.SimpleQueue[_Report[R] | _Ended]) -> None:
        self._events = events

    def begin(self, item: str) -> int:
        """Always the first."""
        return 1

    def report(self, report: R) -> None:
        """To the thread of the runner."""
        self._events.put(_Report(report, at_end=False))


class LocalRunner:
    """Threads of this process, by default one per core."""

    def __init__(self, workers: int | None = None) -> None:
        self.workers = usable_cores() if workers is None else workers
        if self.workers < 1:
            raise ConfigError(f"workers={workers}: must be at least 1")

    def __enter__(self) -> LocalRunner:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing outlives `run`."""

    def ask_nodes(self, question: Callable[[], T]) -> dict[str, T]:
        """There is no other machine."""
        return {}

    def run(
        self,
        tasks: Iterable[int],
        make_worker: Callable[[], Worker[R]],
        *,
        on_report: Callable[[R], None] | None = None,
        tick: Callable[[], None] | None = None,
    ) -> Generator[R, None, None]:
        """As Runner.run. Each thread makes one worker and closes it at its end; all threads are joined."""
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for task in tasks:
            waiting.put(task)
        events: queue.SimpleQueue[_Report[R] | _Ended] = queue.SimpleQueue()
        halted = threading.Event()
        workers: list[Worker[R]] = []

        watch = None if on_report is None else _Watch(events)
        threads = max(1, min(self.workers, waiting.qsize()))

        def work() -> None:
            try:
                with make_worker() as worker:
                    workers.append(worker)  # before `halted` is read: who halts stops all that are in the list
                    while not halted.is_set():
                        try:
                            task = waiting.get_nowait()
                        except queue.Empty:
                            break
                        report = worker.run(task, watch)
                        events.put(_Report(report, at_end=True))
            except BaseException as e:
                events.put(_Ended(e))
                raise
            events.put(_Ended(None))

        with ThreadPoolExecutor(threads, thread_name_prefix="shard") as pool:
            try:
                for _ in range(threads):
                    pool.submit(work)
                running = threads
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
                    elif event is not None and on_report is not None:
                        on_report(event.report)
                    if time.monotonic() >= next_tick:
                        if tick is not None:
                            tick()
                        next_tick = time.monotonic() + TICK_S
            except BaseException:
                halted.set()
                for worker in list(workers):
                    worker.stop()
                raise
