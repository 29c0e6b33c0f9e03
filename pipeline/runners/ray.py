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
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import Any

from reelmae.pipeline.errors import ClusterError, ConfigError
from reelmae.pipeline.runners.ray_join import first_line, import_ray, is_client, join, name_of
from reelmae.pipeline.runners.ray_watch import Failed, Tracker, WorkerMaker, answer, run_task
from reelmae.pipeline.runners.runner import TICK_S, R, T, Worker

AHEAD = 2  # tasks submitted for each one that the cluster has room for
ANSWER_S = 120.0  # for a node's answer, which may have to start a process first
STOP_S = 10.0  # for running tasks to end
LOOK_S = 2.0  # from one look at the cluster's room to the next
SAY_S = 30.0  # from one warning that there is no room to the next
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
        if address == "":
            raise ConfigError("--ray-address '': give HOST:PORT, ray://HOST:PORT or auto, or leave it out")
        self.address = address or os.environ.get("RAY_ADDRESS") or None
        self.workers = workers
        self._needs = {"CPU": float(cores), "memory": float(memory_bytes), "GPU": float(gpus)}
        self._stack = contextlib.ExitStack()
        self._joined: Any = None

    def __enter__(self) -> RayRunner:
        self._joined = import_ray()
        if not self._ray.is_initialized():
            with self._stack:
                self._stack.enter_context(join(self._ray, self.address, self.workers))
                self._refuse_lack()
                self._stack = self._stack.pop_all()
        return self

    @property
    def _ray(self) -> Any:
        if self._joined is None:
            raise ConfigError("RayRunner is not entered; use it as a context: with RayRunner() as runner")
        return self._joined

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
        """As Runner.run. ClusterError where a task loses its worker again and again (ray_watch.LOSSES)."""
        ray, waiting = self._ray, deque(tasks)
        maker = WorkerMaker.of(ray.put(make_worker))
        tracker = _Messages(ray, self._start_tracker(), on_report)
        submit = ray.remote(run_task).options(max_retries=-1, **self._options())  # counted by the tracker
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
        except BaseException as e:
            with contextlib.suppress(
                ray.exceptions.RayError, ConnectionError
            ):  # the error under way is the one to tell
                _stop(ray, list(flying))
            if isinstance(e, (ray.exceptions.RayError, ConnectionError)) and not isinstance(
                e, ray.exceptions.RayTaskError
            ):
                raise ClusterError(
                    f"{name_of(self.address)}: is lost ({first_line(e)}); run the same command again"
                ) from e
            raise
        finally:
            with contextlib.suppress(ray.exceptions.RayError, ConnectionError):
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
            raise ClusterError(f"{name_of(self.address)}: has no node left with room for a task")
        deadline = time.monotonic() + ANSWER_S
        return {name: self._answer(name, ref, deadline) for name, ref in asked.items()}

    def _answer(self, name: str, ref: Any, deadline: float) -> Any:
        ray = self._ray
        try:
            found = ray.get(ref, timeout=max(0.1, deadline - time.monotonic()))
        except ray.exceptions.GetTimeoutError as e:
            raise ClusterError(
                f"node {name} of {name_of(self.address)}: does not answer within {ANSWER_S:g} s; mend it, or remove it"
            ) from e
        except ray.exceptions.RayTaskError as e:
            raise ClusterError(
                f"node {name} of {name_of(self.address)}: cannot run reelmae ({_last_line(e)}); install reelmae[ray] "
                "there as it is here"
            ) from e
        except ray.exceptions.RayError as e:
            raise ClusterError(f"node {name} of {name_of(self.address)}: died when asked ({first_line(e)})") from e
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
                f"task {task} is lost ({first_line(e)}); look at the nodes, then run the same command again"
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
        if not is_client(self.address):  # it lives as long as the driver's own node
            node = ray.get_runtime_context().get_node_id()
            strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=True)
            here = {"scheduling_strategy": strategy}
        return ray.remote(Tracker).options(num_cpus=0, max_restarts=-1, max_task_retries=-1, **here).remote()

    # --- the cluster -------------------------------------------------------------------------------------------------

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
            f"{name_of(self.address)}: no node has what a task needs ({wanted}); there are {have or 'no nodes'}. Start larger ones, or ask for "
            "less (--workers of features is a task's cores)"
        )

    def count_room(self) -> int:
        """How many tasks the nodes have room for at a time, if nothing else runs there."""
        counts = (
            min(
                (int(node["Resources"].get(name, 0.0) / wanted) for name, wanted in self._needs.items() if wanted),
                default=1,
            )
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
        most = self._runner.workers if self._runner.address is not None else None  # of a local Ray: its cores
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


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
