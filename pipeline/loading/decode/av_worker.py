"""A decode worker: `python -m reelmae.pipeline.loading.decode.av_worker FD`. Only av_pool starts it.

Reads (ticket, place in the arena, task) from the connection FD, writes samples into the shared arena, and answers
(ticket, None or why the clip is bad, cost), in the same order. Ends with its connection, or with its parent.

While a clip is decoded, threads fetch the bytes of the next ones, to hide the latency of a remote store. The parent
decides how many: it keeps a few tasks queued at each worker.
"""

from __future__ import annotations

import mmap
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np

from reelmae.pipeline.errors import BadClipError, StorageError
from reelmae.pipeline.loading.decode.pyav import AvDecoder
from reelmae.pipeline.loading.fetch.clip import ClipSource, SourceSettings
from reelmae.pipeline.loading.tasks import ClipTask, Cost, DecodePolicy

PARENT_CHECK_S = 1.0
FETCH_THREADS = 4


@dataclass(frozen=True)
class WorkerSetup:
    """First message to a worker. `arena_shape` is (slots, videos, R, 3, T, H, W)."""

    parent: int
    source: SourceSettings
    policy: DecodePolicy
    arena_fd: int
    arena_shape: tuple[int, ...]


@dataclass(frozen=True)
class _Request:
    ticket: int
    slot: int
    at: int
    task: ClipTask
    fetched: Future[tuple[bytes, float]]  # the bytes, and the seconds they took


def map_arena(fd: int, shape: tuple[int, ...]) -> np.ndarray:
    """Map the shared pixels, uint8 of this shape."""
    return np.frombuffer(mmap.mmap(fd, int(np.prod(shape, dtype=np.int64))), np.uint8).reshape(shape)


def _watch(parent: int) -> None:
    """End the process when the parent has ended, even during a decode that never returns."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    os._exit(1)


def _requests(connection: Connection, source: ClipSource) -> Iterator[_Request]:
    """The requests of a connection until it ends. The bytes of each are fetched from the moment it arrives."""
    arrived: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
    fetchers = ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix="reelmae-fetch")

    def fetch(task: ClipTask) -> tuple[bytes, float]:
        began = time.perf_counter()
        return source.fetch(task), time.perf_counter() - began

    def receive() -> None:
        try:
            while True:
                ticket, slot, at, task = connection.recv()
                arrived.put(_Request(ticket, slot, at, task, fetchers.submit(fetch, task)))
        except (EOFError, ConnectionResetError):
            arrived.put(None)

    threading.Thread(target=receive, name="reelmae-receive", daemon=True).start()
    while (request := arrived.get()) is not None:
        yield request
    fetchers.shutdown(wait=False, cancel_futures=True)


def main(fd: int) -> None:
    """Serve one connection until it ends."""
    connection = Connection(fd)
    setup: WorkerSetup = connection.recv()
    threading.Thread(target=_watch, args=(setup.parent,), daemon=True).start()
    arena = map_arena(setup.arena_fd, setup.arena_shape)
    _, _, _, _, frames, size, _ = setup.arena_shape
    source = ClipSource(setup.source)
    decoder = AvDecoder(frames=frames, size=size, policy=setup.policy)
    try:
        connection.send(None)  # ready
    except BrokenPipeError:  # closed before it began
        return
    for request in _requests(connection, source):
        answer: BadClipError | StorageError | None = None
        cost = Cost()
        try:
            data, fetch_s = request.fetched.result()
            cost = decoder.decode(request.task, data, arena[request.slot, request.at])
            cost.fetch_s = fetch_s
        except (BadClipError, StorageError) as e:
            answer = e
        try:
            connection.send((request.ticket, answer, cost))
        except BrokenPipeError:
            return


if __name__ == "__main__":
    main(int(sys.argv[1]))
