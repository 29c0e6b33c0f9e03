"""A decode worker: `python -m reelmae.pipeline.loading.decode.av_worker FD`. Only av_pool starts it.

Reads lists of requests (ticket, slot, place in the batch, task) from the connection FD, writes samples into the shared
arena, and answers each with an Answer, in the same order. Ends with its connection, or with its parent.

While a clip is decoded, threads fetch the bytes of the next ones, to hide the latency of a remote store. The parent
decides how many: it keeps some tasks queued at each worker. Requests that come in one list are fetched together.

While the bytes of the next clip do not come, it sends Waiting, so that the parent can tell a worker that waits for a
store from one that hangs in a decoder. What the storage layer says of an outage it sends as Said: the parent says it
once for all workers.
"""

from __future__ import annotations

import logging
import mmap
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from reelmae.pipeline.errors import BadClipError, ReelmaeError, StorageError
from reelmae.pipeline.loading.decode.messages import Answer, Ready, Said, Waiting, WorkerSetup
from reelmae.pipeline.loading.decode.pyav import AvDecoder
from reelmae.pipeline.loading.fetch.blocks import ClipParts
from reelmae.pipeline.loading.fetch.clip import ClipSource, accesses_of
from reelmae.pipeline.loading.fetch.readers import Readers
from reelmae.pipeline.loading.tasks import ClipTask, Cost

PARENT_CHECK_S = 1.0
WAIT_TOLD_S = 30.0  # after which a worker says itself what it waits for, where the storage layer does not
PATIENCE_SLACK_S = 300.0  # a store has its patience from its first failure on, and a request has deadlines of its own

_Fetched = bytes | ClipParts | BadClipError


@dataclass(frozen=True)
class _Request:
    ticket: int
    slot: int
    at: int
    task: ClipTask
    number: int  # among those that are fetched together
    fetched: Future[tuple[list[_Fetched], float]]  # of all of them, and the seconds that each took


def map_arena(fd: int, shape: tuple[int, ...]) -> np.ndarray:
    """Map the shared pixels, uint8 of this shape."""
    return np.frombuffer(mmap.mmap(fd, int(np.prod(shape, dtype=np.int64))), np.uint8).reshape(shape)


class _Parent:
    """The connection, for all threads. The process ends where the parent has closed it: nothing is left to be done."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, message: Ready | Waiting | Said | Answer) -> None:
        try:
            with self._lock:
                self._connection.send(message)
        except OSError:
            os._exit(0)

    def receive(self) -> Any:
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            os._exit(0)


class _ToParent(logging.Handler):
    """Sends what is logged to the parent."""

    def __init__(self, parent: _Parent) -> None:
        super().__init__(logging.WARNING)
        self._parent = parent

    def emit(self, record: logging.LogRecord) -> None:
        self._parent.send(Said(record.name, record.levelno, str(record.msg), record.getMessage()))


def _watch(parent: int) -> None:
    """End the process when the parent has ended, even during a decode that never returns."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    os._exit(1)


def _requests(parent: _Parent, source: ClipSource, decoder: AvDecoder, threads: int) -> Iterator[_Request]:
    """The requests, for ever. The bytes of each are fetched from the moment it arrives."""
    arrived: queue.SimpleQueue[_Request] = queue.SimpleQueue()
    readers = Readers(threads, "reelmae-fetch")

    def fetch(tasks: Sequence[ClipTask]) -> tuple[list[_Fetched], float]:
        began = time.perf_counter()
        return source.fetch_all(tasks, decoder.needed), (time.perf_counter() - began) / len(tasks)

    def receive() -> None:
        while True:
            requests = parent.receive()
            fetched = readers.submit(fetch, [task for *_, task in requests])
            for number, (ticket, slot, at, task) in enumerate(requests):
                arrived.put(_Request(ticket, slot, at, task, number, fetched))

    threading.Thread(target=receive, name="reelmae-receive", daemon=True).start()
    while True:
        yield arrived.get()


class _Server:
    """Serves requests, one after the other."""

    def __init__(self, setup: WorkerSetup, parent: _Parent) -> None:
        self._parent = parent
        self._waiting_s = setup.waiting_s
        self._arena = map_arena(setup.arena_fd, setup.arena_shape)
        self._source = ClipSource(setup.source)
        self._retries = [access.retries for access in accesses_of(self._source.stores)]
        self._counted: list[dict[str, int]] = [{} for _ in self._retries]
        _, _, _, _, frames, size, _ = setup.arena_shape
        self._decoder = AvDecoder(frames=frames, size=size, policy=setup.policy)
        self.requests = _requests(parent, self._source, self._decoder, setup.fetch_threads)

    def serve(self, request: _Request) -> Answer:
        """Wait for the clip's bytes, and decode them."""
        failed: ReelmaeError | None = None
        cost = Cost()
        try:
            if not request.fetched.done():
                self._wait(request)
            fetched, fetch_s = request.fetched.result()
            data = fetched[request.number]
            if isinstance(data, BadClipError):
                raise data
            cost = self._decoder.decode(request.task, data, self._arena[request.slot, request.at])
            cost.fetch_s = fetch_s
        except ReelmaeError as e:
            failed = e
        return Answer(request.ticket, failed, cost, self._new_retries())

    def _wait(self, request: _Request) -> None:
        """Until the bytes are here. StorageError where they do not come long after the store's patience."""
        store = self._source.stores[request.task.dataset]
        began, told, limit = time.monotonic(), False, store.access.patience_s + PATIENCE_SLACK_S
        while not wait([request.fetched], timeout=self._waiting_s).done:
            self._parent.send(Waiting())
            waited = time.monotonic() - began
            if waited > limit:
                raise StorageError(
                    f"{store.url(request.task.shard)}: no answer for {waited:.0f} s; run again once it answers"
                )
            if waited > WAIT_TOLD_S and store.is_local and not told:
                told = True
                logging.getLogger("reelmae.storage").warning(
                    "waiting for %s for %.0f s: its disk does not answer", store.url(request.task.shard), waited
                )

    def _new_retries(self) -> tuple[dict[str, int], ...]:
        """What was counted since the last call."""
        new = []
        for at, retries in enumerate(self._retries):
            counts, before = retries.counts(), self._counted[at]
            new.append({cause: n - before.get(cause, 0) for cause, n in counts.items() if n != before.get(cause, 0)})
            self._counted[at] = counts
        return tuple(new)


def main(fd: int) -> None:
    """Serve one connection until it ends; the process ends with it."""
    parent = _Parent(Connection(fd))
    setup: WorkerSetup = parent.receive()
    threading.Thread(target=_watch, args=(setup.parent,), daemon=True).start()
    logger = logging.getLogger("reelmae")
    logger.addHandler(_ToParent(parent))
    logger.propagate = False
    server = _Server(setup, parent)
    parent.send(Ready())
    for request in server.requests:
        parent.send(server.serve(request))


if __name__ == "__main__":
    main(int(sys.argv[1]))
