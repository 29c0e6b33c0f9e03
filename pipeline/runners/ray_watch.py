"""The other end of RayRunner: what runs on the nodes, and the actor that stands between them and the driver."""

from __future__ import annotations

import atexit
import contextlib
import logging
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic
from uuid import uuid4

from reelmae.pipeline import errors
from reelmae.pipeline.errors import ClusterError, ReelmaeError, StorageError
from reelmae.pipeline.runners.runner import R, T, Worker

LINES = 100  # warnings held for the driver
LOSSES = 20  # workers that a task may lose between two of its items; those lost over an item count for the item


class Tracker(Generic[R]):
    """An actor. It counts begins of items, and holds reports and warnings until the driver takes them."""

    def __init__(self) -> None:
        self._under_way: dict[int, str] = {}  # task → the item that its worker began with; "" between two
        self._deaths: dict[int, Counter[str]] = {}  # task under way → item → workers that died over it
        self._reports: dict[int, R] = {}
        self._lines: list[str] = []

    def start(self, task: int) -> int:
        """A worker starts with a task. Returns how many have died between two of its items."""
        deaths = self._deaths.setdefault(task, Counter())
        if task in self._under_way:  # the one before did not come to its end
            deaths[self._under_way[task]] += 1
        self._under_way[task] = ""
        return deaths[""]

    def begin(self, task: int, item: str) -> int:
        """As Watch.begin."""
        self._under_way[task] = item
        return self._deaths.setdefault(task, Counter())[item] + 1

    def report(self, task: int, report: R) -> None:
        """As Watch.report: the item under way has ended."""
        self._under_way[task] = ""
        self._reports[task] = report

    def end(self, task: int) -> None:
        """The task has ended, or has failed by itself."""
        for held in (self._reports, self._under_way, self._deaths):
            held.pop(task, None)

    def warn(self, line: str) -> None:
        """Hold a warning; of very many, the first ones."""
        if len(self._lines) < LINES:
            self._lines.append(line)

    def take(self) -> tuple[dict[int, R], list[str]]:
        """Task → its newest report, and the warnings, since the last call."""
        taken = self._reports, self._lines
        self._reports, self._lines = {}, []
        return taken


def _wait(reference: Any) -> Any:
    """The value behind a reference. In `ray.get` a task lends its cores to the next one, and goes on beside it then."""
    return reference.future().result()


@dataclass(frozen=True)
class _TaskWatch(Generic[R]):
    """Watch of one task, by the tracker."""

    tracker: Any
    task: int

    def begin(self, item: str) -> int:
        """Waits for the answer."""
        return _wait(self.tracker.begin.remote(self.task, item))

    def report(self, report: R) -> None:
        """Waits for nothing."""
        self.tracker.report.remote(self.task, report)


@dataclass(frozen=True)
class WorkerMaker:
    """The maker of workers of one run, held by Ray; small, so that it can go with each task."""

    run: str
    held: tuple[Any]
    """The reference in a tuple: alone it would be fetched for each task."""

    @classmethod
    def of(cls, reference: Any) -> WorkerMaker:
        """The maker behind a reference of `ray.put`."""
        return cls(uuid4().hex, (reference,))


@dataclass(frozen=True)
class Failed:
    """An error of ours on a node. It travels as its class and words: not every error can be pickled."""

    kind: str
    words: str

    @classmethod
    def of(cls, error: ReelmaeError) -> Failed:
        """What travels of an error: the nearest class that is made of words alone."""
        kind = next(c for c in type(error).__mro__ if "__init__" not in vars(c) or c is ReelmaeError)
        return cls(kind.__name__, str(error))

    def error(self, place: str = "") -> ReelmaeError:
        """The error again, with the place where it happened."""
        kind = getattr(errors, self.kind, ReelmaeError)
        return kind(f"{place}: {self.words}" if place else self.words)


@dataclass
class _Warm:
    """The worker that this process keeps between tasks."""

    run: str = ""
    worker: Worker[Any] | None = None

    def take(self, maker: WorkerMaker) -> Worker[Any]:
        """The worker of this run."""
        if self.run != maker.run or self.worker is None:
            self.close()
            worker = _wait(maker.held[0])()
            self.worker, self.run = worker.__enter__(), maker.run
        return self.worker

    def close(self) -> None:
        """Close the worker, if there is one."""
        worker, self.worker = self.worker, None
        if worker is not None:
            worker.__exit__(None, None, None)


_warm = _Warm()
atexit.register(_warm.close)


class _WarningsToDriver(logging.Handler):
    """Gives warnings of ours to the tracker, with the name of this machine."""

    def __init__(self, tracker: Any) -> None:
        super().__init__(logging.WARNING)
        self._tracker = tracker

    def emit(self, record: logging.LogRecord) -> None:
        """Waits for nothing."""
        self._tracker.warn.remote(f"{socket.gethostname()}: {record.getMessage()}")


def run_task(maker: WorkerMaker, tracker: Any, task: int) -> Any:
    """A Ray task: one task of ours, by this process's worker. Its report, or Failed."""
    log, handler = logging.getLogger("reelmae"), _WarningsToDriver(tracker)
    log.addHandler(handler)
    try:
        if (deaths := _wait(tracker.start.remote(task))) > LOSSES:
            raise ClusterError(
                f"task {task} has lost its worker {deaths} times; look at the nodes and their memory, then run the same "
                "command again"
            )
        return _warm.take(maker).run(task, _TaskWatch(tracker, task))
    except (ReelmaeError, OSError) as e:
        with contextlib.suppress(ReelmaeError, OSError):  # the error under way is the one to tell
            _warm.close()
        return Failed.of(e if isinstance(e, ReelmaeError) else StorageError(f"node {socket.gethostname()}: {e}"))
    except BaseException:  # Ctrl-C at the driver, or an error of the program: what the worker was doing is not over
        with contextlib.suppress(ReelmaeError, OSError):
            _warm.close()
        raise
    finally:
        log.removeHandler(handler)
        _wait(tracker.end.remote(task))  # it comes after all that was told: who knows of the end, can take the rest


def answer(question: Callable[[], T]) -> T | Failed:
    """A Ray task: ask this node."""
    try:
        return question()
    except ReelmaeError as e:
        return Failed.of(e)
