"""Services of docker/compose.yaml as processes of one machine without a container engine: what their containers would run.

They run in namespaces of their own (`unshare`), as much as one machine needs of what an engine gives: a network of
loopback addresses only, in which the services' names are known, the images' folder /opt/reelmae/docker, and an end
that leaves no process behind. What else a container has is not here: images, users, volumes, limits.

    unshare … python services.py FOLDER [NAME=VALUE …] [section.key=value …]

runs the demo in FOLDER, with more environment and settings of the pretraining, and writes FOLDER/result.json; see `isolated`.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from reelmae.tools.bench.seaweed import find_weed

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
COMPOSE = DOCKER / "compose.yaml"
IN_IMAGE = Path("/opt/reelmae/docker")
SHORT = Path("/opt/services")  # the path of a socket has 107 bytes at most
WEED_IN_IMAGE = "/usr/bin/weed"


def read_compose(path: Path = COMPOSE) -> dict[str, Any]:
    """A compose file, its anchors and merges resolved."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def isolated(*command: str) -> list[str]:
    """The command in network, mount and process namespaces of its own; where it ends, so does all that it started."""
    as_root = () if os.geteuid() == 0 else ("--map-root-user",)
    return ["unshare", *as_root, "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", *command]


@dataclass
class Process:
    """A service's process."""

    name: str
    argv: Sequence[str]
    environment: Mapping[str, str]
    folder: Path
    health: Sequence[str] = ()
    popen: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def start(self) -> None:
        """Start it."""
        self.folder.mkdir(parents=True)
        with Path(self.folder, "log").open("wb") as log:
            self.popen = subprocess.Popen(
                self.argv, env=self.environment, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def wait_until_healthy(self, seconds: float = 240.0) -> None:
        """Until its health check passes; RuntimeError with its log where it ends, or never does."""
        deadline = time.monotonic() + seconds
        while True:
            check = subprocess.run(
                self.health, env=self.environment, cwd=self.folder, capture_output=True, text=True, check=False
            )
            if check.returncode == 0:
                return
            if self.wait(0) is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} is not healthy: {check.stderr[-500:]}\n{self.tail()}")
            time.sleep(0.2)

    def wait(self, seconds: float | None) -> int | None:
        """Its exit status; None where it has not ended by then."""
        assert self.popen is not None
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def tail(self, n: int = 3000) -> str:
        """The end of what it said."""
        return Path(self.folder, "log").read_text(errors="replace")[-n:]


class Services:
    """The services of compose.yaml in `folder`. To be used inside of `isolated`."""

    def __init__(self, folder: Path, more_environment: Mapping[str, str]) -> None:
        self.folder = SHORT
        self.services: dict[str, Any] = read_compose()["services"]
        self.more_environment = more_environment
        self._addresses = [f"127.0.0.{i}" for i in range(2, 250)]
        self._ip = {name: self._addresses.pop(0) for name in self.services}
        _raise_loopback()
        self._mount(folder)

    def start(self, service: str, *arguments: str, replica: int = 0) -> Process:
        """Start one container's process of a service. A further replica of it has an address and a folder of its own."""
        about = self.services[service]
        name = f"{service}-{replica}" if replica else service
        folder, ip = self.folder / name, self._addresses.pop(0) if replica else self._ip[service]
        argv = [*about.get("entrypoint", [WEED_IN_IMAGE]), *about.get("command", []), *arguments]
        environment = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(folder)}
        environment |= {key: str(value) for key, value in about["environment"].items()}
        if argv[0] == WEED_IN_IMAGE:
            weed = find_weed()
            assert weed is not None, "SeaweedFS is not installed"
            argv = [weed, *(word.replace("=/data", f"={folder}") for word in argv[1:])]
            environment["GOMEMLIMIT"] = "400MiB"
        else:  # one machine: a folder for each node, and ports that others do not take; its container's name is an address
            ray = f"--temp-dir={folder}/ray --min-worker-port=0 --max-worker-port=0"
            environment |= {"NODE_IP": ip, "RAY_TMPDIR": str(folder)}
            environment["RAY_START_ARGS"] = f"{environment.get('RAY_START_ARGS', '')} {ray}"
        check = [word.replace("127.0.0.1", ip) for word in about["healthcheck"]["test"][1:]]
        process = Process(name, argv, environment | self.more_environment, folder, check)
        process.start()
        return process

    def _mount(self, folder: Path) -> None:
        """The services' names, the images' folder and a short name of `folder` for the processes of this namespace."""
        hosts = folder / "hosts"
        names = "".join(f"{ip} {name}\n" for name, ip in self._ip.items())
        hosts.write_text(f"127.0.0.1 localhost {socket.gethostname()}\n{names}")
        _run("mount", "--bind", str(hosts), "/etc/hosts")
        _run("mount", "-t", "tmpfs", "tmpfs", str(IN_IMAGE.parents[1]))
        for source, target in ((DOCKER, IN_IMAGE), (folder, SHORT)):
            target.mkdir(parents=True)
            _run("mount", "--bind", str(source), str(target))


def listening() -> dict[int, str]:
    """TCP ports that are listened on in this network, and the program of each."""
    said = _run("ss", "--no-header", "--listening", "--tcp", "--numeric", "--processes")
    found = {}
    for line in said.splitlines():
        program = re.search(r'\(\("([^"]+)"', line)
        found[int(line.split()[3].rpartition(":")[2])] = program.group(1) if program else "?"
    return found


def run_demo(folder: Path, more_environment: Mapping[str, str], *settings: str) -> dict[str, Any]:
    """All services as compose would start them, then the demo: what came of it."""
    services = Services(folder, more_environment)
    s3, head = services.start("s3"), services.start("ray-head")
    s3.wait_until_healthy()
    head.wait_until_healthy()
    replicas = services.services["ray-worker"]["deploy"]["replicas"]
    workers = [services.start("ray-worker", replica=replica) for replica in range(replicas)]
    for worker in workers:
        worker.wait_until_healthy()
    demo = services.start("demo", *settings)
    status = demo.wait(None)
    nodes = _run("ray", "status", "--address", demo.environment["RAY_ADDRESS"], environment=demo.environment)
    return {
        "status": status,
        "said": demo.tail(20_000),
        "nodes": nodes,
        "listening": listening(),
        "workers": [worker.wait(0) for worker in workers],
    }


def _raise_loopback() -> None:
    """What `ip link set lo up` does."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        up, set_flags = 0x1, 0x8914  # IFF_UP, SIOCSIFFLAGS
        fcntl.ioctl(s, set_flags, struct.pack("16sh14x", b"lo", up))


def _run(*argv: str, environment: Mapping[str, str] | None = None) -> str:
    return subprocess.run(argv, env=environment, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    where = Path(sys.argv[1])
    words = sys.argv[2:]
    settings = [word for word in words if "." in word.partition("=")[0]]
    more = dict(word.split("=", 1) for word in words if word not in settings)
    where.joinpath("result.json").write_text(json.dumps(run_demo(where, more, *settings), indent=1))
