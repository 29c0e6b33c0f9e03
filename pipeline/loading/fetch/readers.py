"""A few threads that read, for callers that go on meanwhile."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
END_GRACE_S = 5.0


class Readers:
    """Calls are made in the order in which they come, `threads` at a time.

    As a ThreadPoolExecutor, but a store that stalls does not hold up the end of the process: the threads are daemons.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None] = (
            queue.SimpleQueue()
        )
        self._closing = False
        self._threads = [threading.Thread(target=self._run, name=f"{name}-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[..., T], *values: Any) -> Future[T]:
        """Have it called; the future has what it returns or raises."""
        future: Future[T] = Future()
        self._work.put((future, call, values))
        return future

    def close(self, *, wait: bool = True) -> None:
        """Make no more calls. Waits a little for those being made: stop their stores before."""
        self._closing = True
        for _ in self._threads:
            self._work.put(None)
        for thread in self._threads if wait else ():
            thread.join(END_GRACE_S)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            future, call, values = work
            if self._closing or not future.set_running_or_notify_cancel():
                future.cancel()
                continue
            try:
                future.set_result(call(*values))
            except BaseException as e:  # noqa: BLE001  raised again where the result is taken
                future.set_exception(e)
