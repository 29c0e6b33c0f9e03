"""Worker processes that decode batches with PyAV into shared memory, ahead of the consumer.

Properties that hold:
- pixels cross no pipe: a worker writes each sample to its place in the batch;
- the shared memory has no name, so nothing of it is left behind, however a process ends;
- a worker that dies is replaced, and its clip is decoded again. A worker that takes longer than `timeout_s` for a clip
  is killed. A clip that costs two workers is bad. `on_bad` names the task that replaces a bad clip;
- workers are plain child processes in a session of their own: they do not import the caller's main module,
  do not see Ctrl-C, and end with their parent, however it ends.

One thread of the parent hands out work, so that workers stay busy while the trainer computes.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait

import numpy as np

from reelmae.pipeline.errors import BadClipError, ReelmaeError, StorageError
from reelmae.pipeline.loading.decode.av_worker import WorkerSetup, map_arena
from reelmae.pipeline.loading.fetch.clip import SourceSettings
from reelmae.pipeline.loading.tasks import ClipTask, Cost, Decoded, DecodePolicy, OnBad
from reelmae.pipeline.storage.store import Store

# clips at a worker: the one in work, and those whose bytes it fetches meanwhile
QUEUE_LOCAL, QUEUE_REMOTE = 2, 4
STRIKES = 2  # workers a clip may cost before it is bad
START_TIMEOUT_S = 120.0
FAILED_STARTS = 3
END_GRACE_S = 1.0


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    ready: bool = False
    since: float = field(default_factory=time.monotonic)  # when the task at the head of `tickets` began
    tickets: deque[int] = field(default_factory=deque)


@dataclass(eq=False)
class _Place:
    """One clip of one batch in flight."""

    batch: _Batch
    at: int
    task: ClipTask
    strikes: int = 0


@dataclass(eq=False)
class _Batch:
    slot: int
    tasks: list[ClipTask]
    left: int
    cost: Cost = field(default_factory=Cost)


class AvPool:
    """A BatchDecoder (see tasks) over `workers` processes. `shape` is (videos, R, 3, T, H, W) of one batch."""

    def __init__(
        self,
        source: SourceSettings,
        shape: tuple[int, ...],
        *,
        policy: DecodePolicy,
        workers: int,
        slots: int,
        timeout_s: float,
        on_bad: OnBad,
    ) -> None:
        self.restarts = 0
        self._queue = QUEUE_LOCAL if all(Store(url).is_local for url in source.urls) else QUEUE_REMOTE
        self._timeout_s = timeout_s
        self._on_bad = on_bad
        self._arena_shape = (slots, *shape)
        self._arena_fd = _anonymous_file(int(np.prod(self._arena_shape, dtype=np.int64)))
        self._arena = map_arena(self._arena_fd, self._arena_shape)
        self._setup = WorkerSetup(os.getpid(), source, policy, self._arena_fd, self._arena_shape)
        self._changed = threading.Condition()  # guards the fields below
        self._free = deque(range(slots))
        self._order: deque[_Batch] = deque()
        self._pending: deque[int] = deque()
        self._places: dict[int, _Place] = {}
        self._next_ticket = 0
        self._error: BaseException | None = None
        self._closing = False
        self._failed_starts = 0
        self._workers = [self._start() for _ in range(workers)]
        self._wake_out, self._wake_in = Pipe(duplex=False)
        self._thread = threading.Thread(target=self._run, name="reelmae-decode", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers alive now."""
        return [w.process.pid for w in self._workers]

    def submit(self, tasks: list[ClipTask]) -> None:
        """Queue a batch; there must be a free slot."""
        with self._changed:
            batch = _Batch(self._free.popleft(), list(tasks), len(tasks))
            self._order.append(batch)
            for at, task in enumerate(tasks):
                self._places[self._next_ticket] = _Place(batch, at, task)
                self._pending.append(self._next_ticket)
                self._next_ticket += 1
        self._wake_in.send(None)

    def collect(self) -> Decoded:
        """Wait for the oldest batch."""
        with self._changed:
            batch = self._order[0]
            self._changed.wait_for(lambda: batch.left == 0 or self._error is not None)
            if self._error is not None:
                raise self._error
            self._order.popleft()
        videos, repeats, *rest = self._arena_shape[1:]
        clips_BCTHW = self._arena[batch.slot].reshape(videos * repeats, *rest)
        return Decoded(batch.tasks, clips_BCTHW, lambda: self._release(batch.slot), batch.cost)

    def close(self) -> None:
        """End thread and workers, and close the shared memory."""
        if self._closing:
            return
        self._closing = True
        atexit.unregister(self.close)
        self._wake_in.send(None)
        self._thread.join()
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            _end(worker.process)
        self._workers.clear()
        self._wake_in.close()
        self._wake_out.close()
        os.close(self._arena_fd)

    def _release(self, slot: int) -> None:
        with self._changed:
            self._free.append(slot)

    def _start(self) -> _Worker:
        ours, theirs = Pipe()
        command = [
            sys.executable,
            "-P",
            "-m",
            "reelmae.pipeline.loading.decode.av_worker",
            str(theirs.fileno()),
        ]
        with theirs:
            process = subprocess.Popen(
                command,
                pass_fds=(theirs.fileno(), self._arena_fd),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            ours.send(self._setup)
        return _Worker(process, ours)

    def _run(self) -> None:
        """The thread: hand out tasks, take in answers, replace workers."""
        try:
            while not self._closing:
                with self._changed:
                    self._hand_out()
                connections = [w.connection for w in self._workers]
                ready = wait([*connections, self._wake_out], timeout=self._patience())
                if self._wake_out in ready:
                    self._wake_out.recv()
                for worker in [w for w in self._workers if w.connection in ready]:
                    self._take_in(worker)
                for worker in [w for w in self._workers if self._is_late(w)]:
                    worker.process.kill()
                    self._replace(worker, f"took longer than {self._limit(worker):g} s")
        except BaseException as e:  # noqa: BLE001  raised again in the consumer's thread
            with self._changed:
                self._error = e
                self._changed.notify_all()

    def _hand_out(self) -> None:
        for fill in range(1, self._queue + 1):
            for worker in self._workers:
                if self._pending and worker.ready and len(worker.tickets) < fill:
                    ticket = self._pending.popleft()
                    place = self._places[ticket]
                    if not worker.tickets:
                        worker.since = time.monotonic()
                    worker.tickets.append(ticket)
                    try:
                        worker.connection.send((ticket, place.batch.slot, place.at, place.task))
                    except (BrokenPipeError, ConnectionResetError):
                        return  # it died: its connection ends, and _take_in replaces it

    def _take_in(self, worker: _Worker) -> None:
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):  # OSError: it died in the middle of an answer
            self._replace(worker, "made its worker die")
            return
        worker.since = time.monotonic()
        if message is None:
            worker.ready = True
            self._failed_starts = 0
            return
        ticket, answer, cost = message
        oldest = worker.tickets.popleft()
        assert ticket == oldest, "a worker answers in the order of its tasks"
        if isinstance(answer, StorageError):
            raise answer
        self._settle(ticket, answer, cost)

    def _settle(self, ticket: int, bad: BadClipError | None, cost: Cost) -> None:
        """Count a clip as done, or queue the clip that replaces a bad one."""
        place = self._places[ticket]
        if bad is not None:
            place.task = self._on_bad(place.task, bad)
            place.strikes = 0
        with self._changed:
            batch = place.batch
            batch.cost.add(cost)
            batch.tasks[place.at] = place.task
            if bad is not None:
                self._pending.appendleft(ticket)
                return
            del self._places[ticket]
            batch.left -= 1
            self._changed.notify_all()

    def _replace(self, worker: _Worker, what: str) -> None:
        """Start a worker in place of a dead one. Its clips are queued again; the one in work gets a strike."""
        worker.connection.close()
        status = _end(worker.process)
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= FAILED_STARTS:
                raise ReelmaeError(
                    f"decode workers do not start (exit status {status}, {FAILED_STARTS} times in a row); "
                    "their own message is above; workers=0 decodes in this process instead"
                )
        self.restarts += 1
        tickets = list(worker.tickets)
        self._workers[self._workers.index(worker)] = self._start()
        with self._changed:
            self._pending.extendleft(reversed(tickets))
        if tickets:
            head = self._places[tickets[0]]
            head.strikes += 1
            if head.strikes >= STRIKES:
                with self._changed:
                    self._pending.remove(tickets[0])
                reason = f"{what}, {STRIKES} times (exit status {status})"
                self._settle(tickets[0], BadClipError(head.task.key, reason), Cost())

    def _limit(self, worker: _Worker) -> float:
        return self._timeout_s if worker.ready else START_TIMEOUT_S

    def _is_late(self, worker: _Worker) -> bool:
        busy = bool(worker.tickets) or not worker.ready
        return busy and time.monotonic() - worker.since > self._limit(worker)

    def _patience(self) -> float:
        return min(1.0, self._timeout_s / 4)


def _anonymous_file(size: int) -> int:
    """A file descriptor of `size` zero bytes in memory, with no name to leave behind."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("reelmae-arena", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, size)
    return fd


def _end(process: subprocess.Popen[bytes]) -> int:
    """End a worker, and return its exit status. Its connection is closed, so a healthy one ends by itself."""
    try:
        return process.wait(timeout=END_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
