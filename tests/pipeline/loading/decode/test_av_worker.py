"""A decode worker by itself: what it answers, and that it fetches ahead of what it decodes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Pipe
from typing import Any

import numpy as np
import pytest

from reelmae.pipeline.errors import BadClipError
from reelmae.pipeline.loading.decode.av_worker import map_arena
from reelmae.pipeline.loading.decode.messages import Ready, WorkerSetup
from reelmae.pipeline.loading.fetch.clip import SourceSettings
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.loading.order.draws import SamplePolicy, draw
from reelmae.pipeline.loading.tasks import ClipTask, clip_task
from reelmae.pipeline.storage.store import Store

HANGS_S = 120  # only what never ends takes so long, on any machine
SHAPE = (1, 4, 1, 3, 4, 32, 32)  # slots, videos, R, channels, T, H, W


def task(index: ClipIndex, clip: int) -> ClipTask:
    """The work for one clip of an index of one dataset."""
    drawn = draw(SamplePolicy(frames=4, size=32), seed=0, epoch=0, clip=clip, repeat=0, **index.facts(clip))
    shard, offset, size = index.shard(clip), int(index.offset[clip]), int(index.size[clip])
    digest = hashlib.sha256(index.store.read_range(shard, offset, size)).digest()
    made = clip_task(index, clip, (drawn,), planned=clip)
    assert (made.shard, made.offset, made.size, made.dataset) == (shard, offset, size, 0)
    assert made.check == int.from_bytes(digest[:8], "big")
    return made


@pytest.fixture
def start_worker() -> Iterator[Callable[[str], tuple[Connection, np.ndarray]]]:
    """start_worker(url) → the connection to a worker that is ready, and its arena."""
    processes: list[tuple[subprocess.Popen[bytes], Connection, int]] = []

    def start(url: str) -> tuple[Connection, np.ndarray]:
        ours, theirs = Pipe()
        arena = os.memfd_create("arena")
        os.ftruncate(arena, int(np.prod(SHAPE)))
        argv = [sys.executable, "-m", "reelmae.pipeline.loading.decode.av_worker", str(theirs.fileno())]
        with theirs:
            process = subprocess.Popen(argv, pass_fds=(theirs.fileno(), arena))
        processes.append((process, ours, arena))
        ours.send(WorkerSetup(os.getpid(), SourceSettings((Store(url),)), "auto", arena, SHAPE))
        assert ours.recv() == Ready()
        return ours, map_arena(arena, SHAPE)

    yield start
    for process, connection, arena in processes:
        connection.close()
        assert process.wait(timeout=HANGS_S) == 0  # it ends with its connection
        os.close(arena)


@pytest.fixture
def held_server(natural_index: ClipIndex, serve_ranges: Callable[..., str]) -> str:
    """URL of the dataset on a server that answers only when three requests are waiting for it."""
    barrier = threading.Barrier(3)
    return serve_ranges(natural_index.store, lambda path, start: barrier.wait(timeout=HANGS_S))


def test_answers_come_in_order_with_what_they_cost(natural_index: ClipIndex, start_worker: Any) -> None:
    connection, arena = start_worker(natural_index.store.url())
    good, gone = task(natural_index, 0), task(natural_index, 1)
    connection.send([(7, 0, 0, good)])
    connection.send([(8, 0, 1, ClipTask(**{**vars(gone), "check": gone.check ^ 1})), (9, 0, 2, good)])
    answer = connection.recv()
    assert (answer.ticket, answer.failed) == (7, None)
    assert answer.cost.bytes_read == good.size and answer.cost.fetch_s > 0 and answer.cost.decode_s > 0
    answer = connection.recv()
    assert answer.ticket == 8 and isinstance(answer.failed, BadClipError) and answer.failed.key == gone.key
    answer = connection.recv()
    assert (answer.ticket, answer.failed) == (9, None)
    assert arena[0, 0].std() > 5 and (arena[0, 0] == arena[0, 2]).all()


def test_the_next_clips_are_fetched_while_one_is_waited_for(
    natural_index: ClipIndex, held_server: str, start_worker: Any
) -> None:
    connection, arena = start_worker(held_server)
    for at in range(3):
        connection.send([(at, 0, at, task(natural_index, at))])
    answers = [connection.recv() for _ in range(3)]
    assert [(answer.ticket, answer.failed) for answer in answers] == [(0, None), (1, None), (2, None)]
    assert all(arena[0, at].std() > 5 for at in range(3))


def test_a_worker_starts_without_what_it_does_not_need() -> None:
    program = (
        "import sys, reelmae.pipeline.loading.decode.av_worker\n"
        "print({'torch', 'pyarrow', 'pydantic'} & set(sys.modules))\n"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output == "set()\n"
