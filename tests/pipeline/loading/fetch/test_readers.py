"""Reads in the background: in order, several at a time, and never in the way of an end."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import weakref

import pytest

from reelmae.pipeline.errors import StorageError
from reelmae.pipeline.loading.fetch.readers import Readers

HANGS_S = 120  # only what never ends takes so long, on any machine


def test_results_and_errors_come_from_as_many_threads_as_asked() -> None:
    readers, barrier = Readers(3, "reelmae-test"), threading.Barrier(3)

    def call(n: int) -> int:
        barrier.wait(HANGS_S)
        if n == 2:
            raise StorageError("away")
        return n * n

    futures = [readers.submit(call, n) for n in range(3)]
    assert [futures[0].result(), futures[1].result()] == [0, 1]
    with pytest.raises(StorageError, match="away"):
        futures[2].result()
    readers.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("reelmae-test")]


def test_closing_drops_what_has_not_begun() -> None:
    readers, begun, gate = Readers(1, "reelmae-test"), threading.Event(), threading.Event()

    def hold() -> str:
        begun.set()
        gate.wait(HANGS_S)
        return "done"

    first, second = readers.submit(hold), readers.submit(hold)
    assert begun.wait(HANGS_S)
    closing = threading.Thread(target=readers.close)
    closing.start()
    while not readers._closing:
        pass
    gate.set()
    closing.join()
    assert first.result() == "done" and second.cancelled()


def test_a_result_that_was_taken_is_kept_by_nobody() -> None:
    class Clip(bytearray):
        pass

    readers = Readers(2, "reelmae-test")
    clips = [weakref.ref(readers.submit(Clip, 100).result()) for _ in range(4)]
    deadline = time.monotonic() + HANGS_S
    while any(clip() is not None for clip in clips) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [clip() for clip in clips] == [None] * 4
    readers.close()


def test_a_read_that_never_returns_does_not_keep_the_process() -> None:
    program = (
        "import threading\n"
        "from reelmae.pipeline.loading.fetch.readers import Readers\n"
        "readers, begun = Readers(2, 'r'), threading.Event()\n"
        "readers.submit(lambda: (begun.set(), threading.Event().wait()))\n"
        "begun.wait()\n"
        "print('end')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=HANGS_S)
    assert (done.stdout, done.stderr, done.returncode) == ("end\n", "", 0)
