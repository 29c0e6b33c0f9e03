"""Worker processes that decode batches with PyAV into shared memory, ahead of the consumer.

Properties that hold:
- pixels cross no pipe: a worker writes each sample to its place in the batch;
- the shared memory has no name, so nothing of it is left behind, however a process ends;
- a worker that dies is replaced, and its clip is decoded again. A worker that takes longer than `timeout_s` for a clip
  is killed; time in which it waits for a store does not count. A clip that costs two workers is bad. `on_bad` names the
  task that replaces a bad clip;
- clips that lie side by side in a shard of a remote store go to one worker together, which reads them by one request;
- of remote stores, CLIPS_IN_FLIGHT clips are at the workers, of no more than BYTES_IN_FLIGHT bytes (see readers.py);
- workers are plain child processes in a session of their own: they do not import the caller's main module,
  do not see Ctrl-C, and end with their parent, however it ends.

One thread of the parent hands out work, so that workers stay busy while the trainer computes.
"""

from __future__ import annotations

import atexit
import logging
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

from reelmae.pipeline.errors import BadClipError, ReelmaeError
from reelmae.pipeline.loading.decode.av_worker import map_arena
from reelmae.pipeline.loading.decode.messages import Answer, Ready, Said, Waiting, WorkerSetup
from reelmae.pipeline.loading.fetch.clip import SourceSettings, accesses_of
from reelmae.pipeline.loading.fetch.readers import BYTES_IN_FLIGHT, CLIPS_IN_FLIGHT
from reelmae.pipeline.loading.tasks import ClipTask, Cost, Decoded, DecodePolicy, OnBad

# threads of a worker that fetch
FETCH_LOCAL, FETCH_REMOTE = 4, (4, 16)
QUEUE_LOCAL = 2  # clips at a worker: the one in work, and one whose bytes it fetches meanwhile
TOGETHER, TOGETHER_BYTES = 8, 2 << 20  # neighbours in a shard that are read by one request
GAP_BYTES = 64 << 10  # between two clips of a shard that count as neighbours
SAY_AGAIN_S = 25.0  # the same news of several workers is said once in this time
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
        self._is_local = all(store.is_local for store in source.stores)
        threads = FETCH_LOCAL if self._is_local else max(FETCH_REMOTE[0], -(-CLIPS_IN_FLIGHT // workers))
        threads = min(threads, FETCH_REMOTE[1])
        self._queue = QUEUE_LOCAL if self._is_local else threads + 1
        self._accesses = accesses_of(source.stores)
        self._said: dict[tuple[str, str], float] = {}
        self._timeout_s = timeout_s
        self._on_bad = on_bad
        self._arena_shape = (slots, *shape)
        self._arena_fd = _anonymous_file(int(np.prod(self._arena_shape, dtype=np.int64)))
        self._arena = map_arena(self._arena_fd, self._arena_shape)
        self._setup = WorkerSetup(
            os.getpid(), source, policy, self._arena_fd, self._arena_shape, threads, self._look_every_s()
        )
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
        with self._changed:  # who waits in another thread
            self._error = self._error or ReelmaeError("the loader was closed while a batch was waited for")
            self._changed.notify_all()
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
                ready = wait([*connections, self._wake_out], timeout=self._look_every_s())
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
        out = 0 if self._is_local else sum(self._places[t].task.size for w in self._workers for t in w.tickets)
        for fill in range(1, self._queue + 1):
            for worker in self._workers:
                if not (self._pending and worker.ready and len(worker.tickets) < fill):
                    continue
                if out > BYTES_IN_FLIGHT and len(worker.tickets) >= QUEUE_LOCAL:
                    continue
                tickets = [self._pending.popleft()] if self._is_local else self._take_neighbours()
                if not worker.tickets:
                    worker.since = time.monotonic()
                worker.tickets += tickets
                out += sum(self._places[t].task.size for t in tickets)
                places = [(t, self._places[t]) for t in tickets]
                try:
                    worker.connection.send([(t, p.batch.slot, p.at, p.task) for t, p in places])
                except (BrokenPipeError, ConnectionResetError):
                    return  # it died: its connection ends, and _take_in replaces it

    def _take_neighbours(self) -> list[int]:
        """The first pending ticket, and those behind it whose clips follow in its shard."""
        most = min(TOGETHER, len(self._pending) // len(self._workers))  # no worker is to stay without work
        tickets = [self._pending.popleft()]
        first = last = self._places[tickets[0]].task
        while self._pending and len(tickets) < most:
            task = self._places[self._pending[0]].task
            same = (task.dataset, task.shard) == (last.dataset, last.shard)
            gap = task.offset - (last.offset + last.size)
            if not same or not 0 <= gap <= GAP_BYTES or task.offset + task.size - first.offset > TOGETHER_BYTES:
                break
            tickets.append(self._pending.popleft())
            last = task
        return tickets

    def _take_in(self, worker: _Worker) -> None:
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):  # OSError: it died in the middle of an answer
            self._replace(worker, "made its worker die")
            return
        if isinstance(message, Said):
            self._say(message)
            return
        worker.since = time.monotonic()
        if isinstance(message, Ready):
            worker.ready = True
            self._failed_starts = 0
        elif isinstance(message, Answer):
            oldest = worker.tickets.popleft()
            assert message.ticket == oldest, "a worker answers in the order of its tasks"
            for access, retries in zip(self._accesses, message.retries, strict=True):
                for cause, n in retries.items():
                    access.retries.add(cause, n)
            if message.failed is not None and not isinstance(message.failed, BadClipError):
                raise message.failed
            self._settle(message.ticket, message.failed, message.cost)
        else:
            assert isinstance(message, Waiting), message  # for a store: its time begins anew

    def _say(self, said: Said) -> None:
        """Log what a worker says, unless another has just said the same."""
        now, news = time.monotonic(), (said.logger, said.template)
        if now - self._said.get(news, -SAY_AGAIN_S) >= SAY_AGAIN_S:
            self._said[news] = now
            logging.getLogger(said.logger).log(said.level, "%s", said.text)

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

    def _look_every_s(self) -> float:
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
