"""Runs tasks on a Ray cluster, as plain Ray tasks: Ray places them and repeats those whose worker or node has died.

Only numbers of tasks, the maker of workers (once), and reports travel. A Ray worker process keeps the worker that it
has made for its next task. Reports of running tasks and warnings of the nodes come by a small actor beside the driver
(ray_watch.py), which also counts how many workers have died over one item.

A few more tasks than the cluster has room for are submitted, so the driver's memory does not grow with their number.
What is running when the driver is killed is ended by Ray; the tasks can be run again, from any machine.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any
from urllib.parse import urlsplit

from reelmae.pipeline.cores import usable_cores
from reelmae.pipeline.errors import ClusterError, ConfigError
from reelmae.pipeline.runners.ray_watch import Failed, Tracker, WorkerMaker, answer, run_task
from reelmae.pipeline.runners.runner import TICK_S, R, T, Worker
from reelmae.pipeline.storage.scratch import Scratch

RETRIES = 20  # of a task whose worker or node died
AHEAD = 2  # tasks submitted for each one that the cluster has room for
CONNECT_S = 10.0  # for the first answer of a cluster's address
JOIN_S = 30.0  # for a trial process to join it
CLIENT_S = 90.0  # the same by ray://, where the cluster starts a process for it first
ANSWER_S = 120.0  # for a node's answer, which may have to start a process first
STOP_S = 10.0  # for running tasks to end
LOOK_S = 2.0  # from one look at the cluster's room to the next
SAY_S = 30.0  # from one warning that there is no room to the next
LONGEST = 45  # characters of a folder for Ray's sockets
_OBJECTS_BYTES = 80 << 20  # of a local Ray's object store: nothing large passes through it
_LOCAL = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # the second one: loopback only
_TRIAL = """
import sys, warnings, logging
warnings.simplefilter("ignore")
import ray
try:
    ray.init(sys.argv[1], log_to_driver=False, logging_level=logging.CRITICAL)
except Exception as e:
    sys.exit(f"{type(e).__name__}: " + (str(e).strip().splitlines() or [""])[0])
"""  # joins and leaves at once: where nothing answers, Ray tries for minutes, and may end the process
_log = logging.getLogger("reelmae.runners")


class RayRunner:
    """A Ray cluster, joined when the runner is entered and left when it is left.

    address: of the cluster (HOST:PORT, `auto`, or ray://HOST:PORT); None is that of RAY_ADDRESS, else a Ray of this
        machine alone, which listens on loopback only. Where this process has joined a cluster already, it is used.
    workers: the most tasks at a time; None is as many as the cluster has room for. Of a local Ray: its cores.
    cores, memory_bytes, gpus: what one task needs.

    Entering raises ClusterError where the cluster does not answer, or where no node of it has room for a task.
    """

    def __init__(
        self,
        address: str | None = None,
        workers: int | None = None,
        *,
        cores: float = 1,
        memory_bytes: int = 1 << 30,
        gpus: float = 0,
    ) -> None:
        if workers is not None and workers < 1:
            raise ConfigError(f"workers={workers}: must be at least 1")
        self.address = address or os.environ.get("RAY_ADDRESS") or None
        self.workers = workers
        self._needs = {"CPU": float(cores), "memory": float(memory_bytes), "GPU": float(gpus)}
        self._stack = contextlib.ExitStack()
        self._ray: Any = None

    def __enter__(self) -> RayRunner:
        self._ray = import_ray()
        if not self._ray.is_initialized():
            with self._stack:
                self._join()
                self._refuse_lack()
                self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(
        self,
        tasks: Iterable[int],
        make_worker: Callable[[], Worker[R]],
        *,
        on_report: Callable[[R], None] | None = None,
        tick: Callable[[], None] | None = None,
    ) -> Generator[R, None, None]:
        """As Runner.run. ClusterError where a task has lost its worker RETRIES times more."""
        ray, waiting = self._ray, deque(tasks)
        maker = WorkerMaker.of(ray.put(make_worker))
        tracker = _Messages(ray, self._start_tracker(), on_report)
        submit = ray.remote(run_task).options(max_retries=RETRIES, **self._options())
        flying: dict[Any, int] = {}
        room = _Room(self)
        next_tick = time.monotonic() + TICK_S
        try:
            while True:
                for _ in range(min(len(waiting), room.tasks() - len(flying))):
                    task = waiting.popleft()
                    flying[submit.remote(maker, tracker.actor, task)] = task
                if not flying and not waiting:
                    for _ in range(2):  # the first answer may be older than the last message
                        tracker.pass_on(set(), wait_s=STOP_S)
                    return
                ended: list[Any] = []
                if flying:
                    some, _ = ray.wait(list(flying), num_returns=1, timeout=max(0.0, next_tick - time.monotonic()))
                    ended = ray.wait(list(flying), num_returns=len(flying), timeout=0)[0] if some else []
                else:
                    time.sleep(TICK_S)
                for ref in ended:
                    yield self._result(ref, flying.pop(ref))
                if ended or time.monotonic() >= next_tick:
                    tracker.pass_on(set(flying.values()))
                    room.warn(len(flying))
                    if tick is not None:
                        tick()
                    next_tick = time.monotonic() + TICK_S
        except BaseException:
            _stop(ray, list(flying))
            raise
        finally:
            ray.kill(tracker.actor)

    def ask_nodes(self, question: Callable[[], T]) -> dict[str, T]:
        """What each node that has room for a task answers, by its name. Errors name the node."""
        ray = self._ray
        asked = {
            node_name(node): ray.remote(answer)
            .options(
                num_cpus=0,
                max_retries=2,
                scheduling_strategy=ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
                    node["NodeID"], soft=False
                ),
            )
            .remote(question)
            for node in self._nodes()
            if self._fits(node)
        }
        if not asked:
            raise ClusterError(f"{self._words()}: has no node left with room for a task")
        deadline = time.monotonic() + ANSWER_S
        return {name: self._answer(name, ref, deadline) for name, ref in asked.items()}

    def _answer(self, name: str, ref: Any, deadline: float) -> Any:
        ray = self._ray
        try:
            found = ray.get(ref, timeout=max(0.1, deadline - time.monotonic()))
        except ray.exceptions.GetTimeoutError as e:
            raise ClusterError(
                f"node {name} of {self._words()}: does not answer within {ANSWER_S:g} s; mend it, or remove it"
            ) from e
        except ray.exceptions.RayTaskError as e:
            raise ClusterError(
                f"node {name} of {self._words()}: cannot run reelmae ({_last_line(e)}); install reelmae[ray] "
                "there as it is here"
            ) from e
        except ray.exceptions.RayError as e:
            raise ClusterError(f"node {name} of {self._words()}: died when asked ({_first_line(e)})") from e
        if isinstance(found, Failed):
            raise found.error(f"node {name}")
        return found

    def _result(self, ref: Any, task: int) -> Any:
        ray = self._ray
        try:
            found = ray.get(ref)
        except ray.exceptions.RayTaskError:
            raise
        except ray.exceptions.RayError as e:
            raise ClusterError(
                f"task {task} has lost its worker {RETRIES + 1} times ({_first_line(e)}); look at the nodes and their "
                "memory, then run the same command again"
            ) from e
        if isinstance(found, Failed):
            raise found.error()
        return found

    def _options(self) -> dict[str, Any]:
        needs = self._needs
        gpus = {"num_gpus": needs["GPU"]} if needs["GPU"] else {}
        return {"num_cpus": needs["CPU"], "memory": needs["memory"], **gpus}

    def _start_tracker(self) -> Any:
        ray = self._ray
        here = {}
        if not _is_client(self.address):  # it lives as long as the driver's own node
            node = ray.get_runtime_context().get_node_id()
            strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=True)
            here = {"scheduling_strategy": strategy}
        return ray.remote(Tracker).options(num_cpus=0, max_restarts=-1, max_task_retries=-1, **here).remote()

    # --- the cluster -------------------------------------------------------------------------------------------------

    def _join(self) -> None:
        """ray.init; what it has to be undone is put on the stack."""
        ray = self._ray
        quiet = {"logging_level": logging.CRITICAL, "log_to_driver": False, "configure_logging": True}
        before = signal.getsignal(signal.SIGTERM) if threading.current_thread() is threading.main_thread() else None
        if self.address is None:
            cores, self.workers = self.workers or usable_cores(), None  # they are all the room that there is
            folder, temporary = self._stack.enter_context(_folders())
            make = {"address": "local", "num_cpus": cores, "include_dashboard": False, "_temp_dir": folder}
            make |= {"object_store_memory": _OBJECTS_BYTES}
            environment = _LOCAL | {"TMPDIR": temporary}
            self._stack.enter_context(_loopback())
        else:
            make, environment = {"address": self.address}, {}
            _refuse_silent(self.address)
        self._stack.enter_context(_silence())
        self._stack.callback(ray.shutdown)
        try:
            with _environment(environment):
                ray.init(**make, **({"log_to_driver": False} if _is_client(self.address) else quiet))
        except Exception as e:
            raise ClusterError(f"{self._words()}: cannot be joined ({_first_line(e)})") from e
        finally:
            if before is not None:
                signal.signal(signal.SIGTERM, before)

    def _words(self) -> str:
        return "the local Ray" if self.address is None else f"Ray at {self.address}"

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def _fits(self, node: dict[str, Any]) -> bool:
        return all(node["Resources"].get(name, 0.0) >= wanted for name, wanted in self._needs.items())

    def _refuse_lack(self) -> None:
        nodes = self._nodes()
        if any(self._fits(node) for node in nodes):
            return
        wanted = _resources(self._needs)
        have = "; ".join(f"{node_name(node)}: {_resources(node['Resources'])}" for node in nodes[:5])
        raise ClusterError(
            f"{self._words()}: no node has what a task needs ({wanted}); there are {have or 'no nodes'}. Start larger ones"
        )

    def count_room(self) -> int:
        """How many tasks the nodes have room for at a time, if nothing else runs there."""
        counts = (
            min(int(node["Resources"].get(name, 0.0) / wanted) for name, wanted in self._needs.items() if wanted)
            for node in self._nodes()
        )
        return sum(counts)


class _Room:
    """How many tasks are to be submitted: looked up anew every LOOK_S, since nodes join and leave."""

    def __init__(self, runner: RayRunner) -> None:
        self._runner = runner
        self._room, self._looked, self._said = runner.count_room(), time.monotonic(), time.monotonic()

    @property
    def is_none(self) -> bool:
        """Whether no node has room for a task at all."""
        return self._room == 0

    def tasks(self) -> int:
        """Tasks to be submitted at a time."""
        if time.monotonic() - self._looked > LOOK_S:
            self._room, self._looked = self._runner.count_room(), time.monotonic()
        most = self._runner.workers
        return AHEAD * self._room if most is None else min(most, AHEAD * self._room)  # `workers` bounds what runs

    def warn(self, flying: int) -> None:
        """Say now and then that nothing can run."""
        if not self.is_none:
            self._said = time.monotonic()
        elif time.monotonic() - self._said > SAY_S:
            self._said = time.monotonic()
            _log.warning("the cluster has no node with room for a task; waiting for one (%d tasks submitted)", flying)


class _Messages:
    """Passes on what the workers tell the tracker, without waiting for it."""

    def __init__(self, ray: Any, actor: Any, on_report: Callable[[R], None] | None) -> None:
        self._ray, self.actor, self._on_report = ray, actor, on_report
        self._asked = actor.take.remote()

    def pass_on(self, running: set[int], wait_s: float = 0.0) -> None:
        """What came since the last call. A report of a task that has ended meanwhile is left out."""
        ready, _ = self._ray.wait([self._asked], timeout=wait_s)
        if not ready:
            return
        reports, lines = self._ray.get(self._asked)
        self._asked = self.actor.take.remote()
        for line in lines:
            _log.warning("%s", line)
        if self._on_report is not None:
            for task, report in reports.items():
                if task in running:
                    self._on_report(report)


def import_ray() -> Any:
    """The module ray, with what is used of it; ConfigError where it is not installed."""
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as e:
        raise ConfigError(f"--runner ray: Ray is not installed ({e}); pip install 'reelmae[ray]'") from e
    return ray


def node_name(node: dict[str, Any]) -> str:
    """A node of `ray.nodes()` for people: host, address and the start of its id."""
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, id {node['NodeID'][:8]})"


def _resources(needs: dict[str, float]) -> str:
    words = [f"{needs.get('CPU', 0.0):g} cores", f"{needs.get('memory', 0.0) / (1 << 30):.1f} GiB"]
    return ", ".join(words + ([f"{needs['GPU']:g} GPUs"] if needs.get("GPU") else []))


def _stop(ray: Any, flying: list[Any]) -> None:
    """End the tasks: as Ctrl-C would, and those that do not end so, by force."""
    for force in (False, True):
        for ref in flying:
            ray.cancel(ref, force=force)
        if not flying:
            return
        _, flying = ray.wait(flying, num_returns=len(flying), timeout=STOP_S)


def _is_client(address: str | None) -> bool:
    return address is not None and address.startswith("ray://")


def _refuse_silent(address: str) -> None:
    """ClusterError where nothing listens at the address, or what answers there is no Ray that can be joined."""
    try:
        place = urlsplit(address if "://" in address else f"//{address}")
        host, port = place.hostname, place.port
    except ValueError:
        host, port = None, None
    if address != "auto":
        if not host or not port:
            raise ConfigError(f"--ray-address {address}: give HOST:PORT, ray://HOST:PORT or auto")
        try:
            socket.create_connection((host, port), CONNECT_S).close()
        except OSError as e:
            raise ClusterError(
                f"Ray at {address}: does not answer ({e}); check the address, and that `ray start --head` runs there"
            ) from e
    patience_s = CLIENT_S if _is_client(address) else JOIN_S
    try:
        argv = [sys.executable, "-c", _TRIAL, address]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=patience_s, check=False)
        words = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it died"])[-1]
    except subprocess.TimeoutExpired:
        words = f"no answer within {patience_s:g} s"
    if words:
        raise ClusterError(
            f"Ray at {address}: cannot be joined ({words}); check the address, that a node of the cluster runs on this "
            "machine (else give ray://HOST:10001), and that Ray and Python have the same versions there as here"
        )


@contextlib.contextmanager
def _folders() -> Iterator[tuple[str, str]]:
    """Scratch folders for a local Ray: its sockets and logs, and TMPDIR of its workers, who are killed with theirs.

    Both are one, but below a long TMPDIR: there the sockets' paths would be too long for the system, and lie in /tmp.
    """
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(_folder())
        yield temporary if len(temporary) <= LONGEST else stack.enter_context(_folder("/tmp")), temporary


@contextlib.contextmanager
def _folder(place: str | None = None) -> Iterator[str]:
    scratch = Scratch("ray-", place)
    try:
        yield str(scratch.path)
    finally:
        deadline = time.monotonic() + STOP_S
        while True:
            with contextlib.suppress(OSError):  # processes of Ray that are about to end may still write there
                scratch.close()
            if not scratch.path.exists() or time.monotonic() > deadline:  # then the next job's sweep removes it
                break
            time.sleep(TICK_S)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """What Ray tells of its own doings is left out: it goes to stdout in part, where a command's result belongs."""
    from ray._private import worker

    handlers = [(handler, handler.level) for handler in logging.getLogger("ray").handlers]
    before, worker._worker_logs_enabled = worker._worker_logs_enabled, False
    for handler, _ in handlers:  # its loggers have levels of their own, which Ray sets
        handler.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        worker._worker_logs_enabled = before
        for handler, level in handlers:
            handler.setLevel(level)


@contextlib.contextmanager
def _loopback() -> Iterator[None]:
    """Ray of this process takes loopback for its address. It reads the variable for that once, when it is imported."""
    from ray._private import ray_constants

    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """These environment variables, for the processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
