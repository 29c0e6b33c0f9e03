"""What a runner is: it takes the numbers of the tasks to do and a maker of workers, and yields one report per task.

A worker runs whole tasks and holds nothing of the machine it was described on: its maker, such as
`functools.partial(TaskWorker, spec)`, and its reports can be pickled, so that a cluster's nodes make their own
workers. Task numbers go there, reports come back, never video.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

TICK_S = 0.2  # seconds from one tick of a runner to the next
R = TypeVar("R")  # the report of a task
R_co = TypeVar("R_co", covariant=True)
R_contra = TypeVar("R_contra", contravariant=True)
T = TypeVar("T")


class Watch(Protocol[R_contra]):
    """Who is told by a worker how far its task is."""

    def begin(self, item: str) -> int:
        """The worker begins with this item of its task, such as a source.

        Returns how many workers have begun with it and did not go on to another: 1, or more where workers died over it.
        """

    def report(self, report: R_contra) -> None:
        """The report so far of a task under way."""


class Worker(AbstractContextManager["Worker[R]"], Protocol[R]):
    """Runs whole tasks, one at a time, in the thread that made it."""

    def run(self, task: int, watch: Watch[R] | None = None) -> R:
        """Run one task to its end and report. A task that was run in part, by whatever worker, can be run again."""

    def stop(self) -> None:
        """Make `run` end soon, with an error. May be called from any thread."""


class Runner(AbstractContextManager["Runner"], Protocol):
    """Runs tasks. Use it as a context; what it has started ends with it."""

    def run(
        self,
        tasks: Iterable[int],
        make_worker: Callable[[], Worker[R]],
        *,
        on_report: Callable[[R], None] | None = None,
        tick: Callable[[], None] | None = None,
    ) -> Generator[R, None, None]:
        """Reports of the tasks as they end, in any order.

        Both callbacks are called in the caller's thread: `on_report` with the report so far of a running task, `tick`
        after each task and a few times a second. On an error in a worker, or in the caller (Ctrl-C), all workers are
        stopped; then the error goes on.
        """

    def ask_nodes(self, question: Callable[[], T]) -> dict[str, T]:
        """What each machine of a cluster answers, by its name. Where this process does all work: {}."""
