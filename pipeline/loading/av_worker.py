"""A decode worker: `python -m reelmae.pipeline.loading.av_worker FD`, started by av_pool and by nobody else.

Reads (ticket, place in the arena, task) from the connection FD, writes samples into the shared arena, answers
(ticket, None or why the clip is bad, cost). Ends when the connection does, or when its parent is gone.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np

from reelmae.pipeline.errors import BadClipError, StorageError
from reelmae.pipeline.loading.decode_av import AvDecoder
from reelmae.pipeline.loading.tasks import Cost
from reelmae.pipeline.storage import Store

PARENT_CHECK_S = 1.0


@dataclass(frozen=True)
class WorkerSetup:
    """First message to a worker. `arena_shape` is (slots, videos, R, T, H, W, 3)."""

    parent: int
    store_url: str
    arena_fd: int
    arena_shape: tuple[int, ...]


def map_arena(fd: int, shape: tuple[int, ...]) -> np.ndarray:
    """The shared pixels, uint8 of this shape."""
    return np.frombuffer(mmap.mmap(fd, int(np.prod(shape, dtype=np.int64))), np.uint8).reshape(shape)


def _watch(parent: int) -> None:
    """End the process when the parent is gone, even in the middle of a decode that never returns."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    os._exit(1)


def main(fd: int) -> None:
    """Serve one connection until it ends."""
    connection = Connection(fd)
    setup: WorkerSetup = connection.recv()
    threading.Thread(target=_watch, args=(setup.parent,), daemon=True).start()
    arena = map_arena(setup.arena_fd, setup.arena_shape)
    _, _, _, frames, size, _, _ = setup.arena_shape
    decoder = AvDecoder(Store(setup.store_url), frames=frames, size=size)
    connection.send(None)  # ready
    while True:
        try:
            ticket, slot, at, task = connection.recv()
        except EOFError:
            return
        answer: BadClipError | StorageError | None = None
        cost = Cost()
        try:
            cost = decoder.decode(task, arena[slot, at])
        except (BadClipError, StorageError) as e:
            answer = e
        try:
            connection.send((ticket, answer, cost))
        except BrokenPipeError:
            return


if __name__ == "__main__":
    main(int(sys.argv[1]))
