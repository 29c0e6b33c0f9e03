"""A Ray cluster on loopback whose nodes are started and killed by a test, and an ffmpeg that a test can hold."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fault_proxy import wait_until
from s3_jobs import descendants

from reelmae.tools.bench.seaweed import free_ports

LOOPBACK = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # needed before Ray is imported
# of jobs on it: tasks are many, and some have two shards
FLAGS = ("--short-side", "48", "--clip-seconds", "1", "--labels", "folder", "--sources-per-task", "2")
FLAGS += ("--shard-bytes", "20000")
OBJECTS_BYTES = 80 << 20
# a node that died is noticed in a second or two, and one that joins is trusted at once
SOON = {
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 300,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 4,
}


@dataclass(frozen=True)
class Node:
    """A node of a cluster: a raylet and what it has started."""

    raylet: int
    """Its process id."""
    id: str
    made: Any
    """Ray's own object; None where the node has a process of its own."""

    @property
    def shown(self) -> str:
        """The part of its name by which messages name it."""
        return f"id {self.id[:8]}"

    def workers(self, title: str = "ray::run_task") -> list[int]:
        """Its worker processes that do such work now."""
        return [pid for pid in descendants(self.raylet) if command(pid).startswith(title)]


class RayCluster:
    """A head without cores, on which drivers live, and nodes with cores. Use as a context.

    folder: each node's temporary files are below it, `tmp(node number)`. Ray's own are in `session`.
    client: start its server for drivers elsewhere.
    environment: of every node, beside this process's own. Keys of S3 are not in it.
    """

    def __init__(self, folder: Path, *, environment: dict[str, str] | None = None, client: bool = False) -> None:
        from ray.cluster_utils import Cluster

        self._ray = tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True)  # short: sockets
        self._environment = environment or {}
        self.tmp = folder / "tmp"
        self.tmp.mkdir(parents=True)
        self._cluster = Cluster(shutdown_at_exit=False)
        self._started: list[subprocess.Popen[bytes]] = []
        self._nodes: list[Node] = []
        quiet = {"include_dashboard": False, "no_monitor": True, "include_log_monitor": False}
        self._client_port = free_ports(1) if client else None
        self.add_node(0, _system_config=SOON, ray_client_server_port=self._client_port, **quiet)
        _forget_address(self.address)

    def __enter__(self) -> RayCluster:
        return self

    def __exit__(self, *_: object) -> None:
        pids = [pid for node in self._nodes for pid in descendants(node.raylet)]
        for process in self._started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for node in list(self._cluster.worker_nodes):
            self._cluster.remove_node(node, allow_graceful=False)
        self._cluster.remove_node(self._cluster.head_node, allow_graceful=False)
        for pid in pids:  # a worker whose raylet is gone ends by itself, but not at once
            if "ray" in command(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._ray.cleanup()

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return str(self._cluster.address)

    @property
    def client_address(self) -> str:
        """Of the server for drivers elsewhere; it must have been asked for."""
        assert self._client_port is not None
        return f"ray://127.0.0.1:{self._client_port}"

    @property
    def session(self) -> Path:
        """The folder of Ray's logs, sockets and state."""
        return Path(self._cluster.head_node.get_session_dir_path())

    def add_node(self, cores: int = 1, environment: dict[str, str] | None = None, **values: Any) -> Node:
        """Start a node and wait until the cluster knows it."""
        with _environment_without_keys(), warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # Ray leaves its files open
            node = self._cluster.add_node(
                num_cpus=cores,
                object_store_memory=OBJECTS_BYTES,
                node_ip_address="127.0.0.1",
                temp_dir=self._ray.name,
                env_vars={"TMPDIR": str(self.tmp), **self._environment, **(environment or {})},
                **values,
            )
        raylet = node.all_processes["raylet"][0].process.pid
        self._nodes.append(Node(raylet, node.node_id, node))
        return self._nodes[-1]

    def add_node_without(self, folder: Path) -> Node:
        """A node that sees an empty folder there: in its mount namespace something else lies over it."""
        before = self.alive()
        hide = 'mount -t tmpfs none "$0" && exec "$@"'
        process = subprocess.Popen(
            [
                "unshare",
                "--mount",
                *([] if os.geteuid() == 0 else ["--map-root-user"]),
                "sh",
                "-c",
                hide,
                str(folder),
                sys.executable,
                "-c",
                _NODE,
                self.address,
            ],
            env={**os.environ, "TMPDIR": str(self.tmp), **self._environment},
            start_new_session=True,
        )
        self._started.append(process)
        wait_until(lambda: process.poll() is not None or self.alive() - before, seconds=120, what="the node joins")
        assert process.poll() is None
        (name,) = self.alive() - before
        raylet = next(pid for pid in descendants(process.pid) if "raylet/raylet" in command(pid))
        self._nodes.append(Node(raylet, name, None))
        return self._nodes[-1]

    def alive(self) -> set[str]:
        """Ids of the nodes that the cluster holds for alive."""
        return {node["NodeID"] for node in self._cluster.global_state.node_table() if node["Alive"]}

    def kill(self, node: Node) -> None:
        """SIGKILL to its raylet, and wait until the cluster knows. Once is enough, twice is fine."""
        if node.made is None:
            kill(node.raylet)
        elif node.made in self._cluster.worker_nodes:  # reaped too: workers of a zombie would not end
            self._cluster.remove_node(node.made, allow_graceful=False)
        wait_until(lambda: node.id not in self.alive(), what="the node is known to be dead")

    def nodes(self) -> list[Node]:
        """Those that live, the head first."""
        alive = self.alive()
        return [node for node in self._nodes if node.id in alive]

    def raylets(self) -> list[int]:
        """Their process ids."""
        return [node.raylet for node in self.nodes()]

    def workers(self, title: str = "ray::run_task") -> list[int]:
        """Worker processes of all nodes that do such work now."""
        return [pid for node in self._nodes for pid in node.workers(title)]


_NODE = f"""
import sys, time
from ray._private.node import Node
from ray._private.parameter import RayParams
params = RayParams(gcs_address=sys.argv[1], redis_address=sys.argv[1], num_cpus=1, num_gpus=0, node_ip_address="127.0.0.1")
params.update_if_absent(object_store_memory={OBJECTS_BYTES}, min_worker_port=0, max_worker_port=0, node_manager_port=0)
params.update_if_absent(include_log_monitor=False)
params.dashboard_agent_listen_port = None
Node(params, head=False, shutdown_at_exit=True, spawn_reaper=True)
time.sleep(1e6)
"""  # as Cluster.add_node does it, in a process of its own


class HeldFfmpeg:
    """A program that is the real ffmpeg, for who asks its version too, and does what the files of a folder say.

    `hold` makes each encode wait; `poison` names a video at which it kills the process that started it.
    """

    def __init__(self, folder: Path) -> None:
        from reelmae.pipeline.ingest.ffmpeg import find_ffmpeg

        self._folder = folder
        (folder / "held").mkdir(parents=True)
        self.path = folder / "ffmpeg"
        self.path.write_text(_HELD.format(folder=folder, real=find_ffmpeg().path))
        self.path.chmod(0o755)

    def environment(self) -> dict[str, str]:
        """That makes reelmae take it."""
        return {"REELMAE_FFMPEG": str(self.path)}

    @contextlib.contextmanager
    def hold(self) -> Iterator[HeldFfmpeg]:
        """Encodes wait until the block's end, or until `release`."""
        (self._folder / "hold").touch()
        try:
            yield self
        finally:
            self.release()

    def release(self) -> None:
        """Let them go on."""
        (self._folder / "hold").unlink(missing_ok=True)

    def held(self) -> list[int]:
        """Processes, of whichever node, whose encode waits now."""
        waiting = [path for path in (self._folder / "held").iterdir() if "ffmpeg" in command(int(path.name))]
        return sorted(int(text) for path in waiting if (text := path.read_text()))

    def wait_for(self, n: int, job: subprocess.Popen[str]) -> list[int]:
        """The processes of so many encodes that wait, as soon as there are as many; AssertionError if the job ends."""
        wait_until(lambda: len(self.held()) >= n or job.poll() is not None, seconds=180, what=f"{n} encodes wait")
        assert job.poll() is None, job.communicate()[1][-3000:]
        return self.held()

    def poison(self, video: Path | None) -> None:
        """From now on, whoever encodes this video dies; None: nobody."""
        (self._folder / "poison").unlink(missing_ok=True)
        if video is not None:
            shutil.copyfile(video, self._folder / "poison")


_HELD = """#!/bin/sh
case "$*" in *file:*)
  for word in "$@"; do case "$word" in file:*) video=${{word#file:}} ;; esac; done
  if [ -e "{folder}/poison" ] && cmp -s "$video" "{folder}/poison"; then kill -9 $PPID; sleep 60; fi
  if [ -e "{folder}/hold" ]; then
    echo $PPID > "{folder}/held/$$"
    while [ -e "{folder}/hold" ]; do sleep 0.05; done
    rm -f "{folder}/held/$$"
  fi ;;
esac
exec "{real}" "$@"
"""


@contextlib.contextmanager
def _environment_without_keys() -> Iterator[None]:
    """Ray gives this process's environment to its own: meanwhile no keys of S3 are in it."""
    keys = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    for name in keys:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(keys)


def _forget_address(address: str) -> None:
    """Ray notes where the newest cluster is, for whoever joins `auto`: nobody is to join a test's."""
    from ray._private.utils import get_ray_address_file

    note = Path(get_ray_address_file(None))
    with contextlib.suppress(OSError):
        if note.read_text() == address:
            note.unlink()


def command(pid: int) -> str:
    """The command line of a process as it shows it now; "" where it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def kill(*pids: int) -> None:
    """SIGKILL; what has ended already is fine."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
