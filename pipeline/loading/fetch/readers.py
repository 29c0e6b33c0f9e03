"""A few threads that read, for callers that go on meanwhile; and how many reads hide the latency of a remote store.

A request for n MB takes 20 ms and n / 60 s through a latency of 20 ms and 60 MB/s for each connection. So one reader
brings 12 MB/s of clips of 0.3 MB, 27 of 1 MB, 43 of 3 MB, 52 of pieces of 8 MB. 200 MB/s take 17, 8, 5 and 4 readers.
With twice as many for the smallest clips, CLIPS_IN_FLIGHT is 32. They take 10 to 100 MB; large clips are fewer, so that
they take no more than BYTES_IN_FLIGHT.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

CLIPS_IN_FLIGHT = 32  # clips of remote stores that are fetched or wait to be decoded, in one rank
BYTES_IN_FLIGHT = 256 << 20  # of these clips; each worker may have two whatever they take
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
            self._do(*work)
            del work  # which has the result: a thread that waits must not keep a clip's bytes

    def _do(self, future: Future[Any], call: Callable[..., Any], values: tuple[Any, ...]) -> None:
        if self._closing or not future.set_running_or_notify_cancel():
            future.cancel()
            return
        try:
            future.set_result(call(*values))
        except BaseException as e:  # noqa: BLE001  raised again where the result is taken
            future.set_exception(e)
