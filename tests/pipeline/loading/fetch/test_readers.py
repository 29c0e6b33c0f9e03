"""Reads in the background: in order, several at a time, and never in the way of an end."""

from __future__ import annotations

import subprocess
import sys
import threading

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
