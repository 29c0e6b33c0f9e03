"""Ceph's S3 gateway on loopback, over one monitor and one object store in memory: a second, independent S3.

From Debian: apt-get install --no-install-recommends radosgw ceph-mon ceph-osd ceph-mgr
"""

from __future__ import annotations

import shutil
import subprocess
import time
import uuid
from pathlib import Path

import pytest
from s3_servers import S3Server, kill_group, wait_for_answer

from reelmae.tools.bench.seaweed import free_ports

DAEMONS = ("ceph-mon", "ceph-osd", "ceph-mgr", "radosgw")
TOOLS = ("ceph", "ceph-authtool", "monmaptool", "radosgw-admin")
PORTS = 20  # the monitor's, the gateway's, then those that osd and mgr take as they like
STEP_S = 60.0
CONF = """[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{mon_port}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind port min = {first_port}
ms bind port max = {last_port}
keyring = {folder}/keyring
mon data = {folder}/mon
osd data = {folder}/osd
mgr data = {folder}/mgr
rgw data = {folder}/rgw
run dir = {folder}
crash dir = {folder}
admin socket =
log file = {folder}/$name.log
osd objectstore = memstore
memstore device bytes = 2147483648
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon warn on pool no redundancy = false
mon data avail crit = 0
auth allow insecure global id reclaim = false
"""


class CephServer:
    """Four Ceph processes with their own folder and ports; nothing of it lives on after `kill`."""

    def __init__(self, folder: Path) -> None:
        if missing := [name for name in (*DAEMONS, *TOOLS) if shutil.which(name) is None]:
            pytest.skip(f"Ceph is not installed (no {', '.join(missing)})")
        self._folder = folder
        self._conf = folder / "ceph.conf"
        self._fsid = str(uuid.uuid4())
        self._port = free_ports(PORTS)
        self._processes: list[subprocess.Popen[bytes]] = []
        self.s3 = S3Server(f"http://127.0.0.1:{self._port + 1}")

    def start(self) -> None:
        """Make the cluster, start it and wait until it takes objects: about 15 seconds."""
        for name in ("mon", "osd", "mgr", "rgw"):
            (self._folder / name).mkdir()
        ports = {"mon_port": self._port, "first_port": self._port + 2, "last_port": self._port + PORTS - 1}
        self._conf.write_text(CONF.format(fsid=self._fsid, folder=self._folder, **ports))
        self._make_keyring()
        monitors = self._folder / "monmap"
        address = f"[v2:127.0.0.1:{self._port}]"
        self._run("monmaptool", "--create", "--fsid", self._fsid, "--addv", "a", address, str(monitors))
        self._run("ceph-mon", "-i", "a", "--mkfs", "--monmap", str(monitors), "--keyring", f"{self._folder}/keyring")
        self._start("ceph-mon", "-i", "a")
        store = str(uuid.uuid4())
        self._run("ceph", "osd", "new", store)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", store)
        self._start("ceph-osd", "-i", "0")
        self._start("ceph-mgr", "-i", "x")
        user = ("--uid", "test", "--display-name", "test", "--access-key", self.s3.key, "--secret-key", self.s3.secret)
        self._run("radosgw-admin", "user", "create", *user)
        frontend = f"beast endpoint=127.0.0.1:{self._port + 1}"
        self._start("radosgw", "-n", "client.admin", "--rgw-frontends", frontend)
        wait_for_answer(self.s3.endpoint, self._processes, self._tail)
        self.s3.make_bucket()

    def kill(self) -> None:
        """End all of it with SIGKILL."""
        for process in reversed(self._processes):
            kill_group(process)
        self._processes.clear()

    def _make_keyring(self) -> None:
        caps = [word for service in ("mon", "osd", "mgr") for word in ("--cap", service, "allow *")]
        for i, name in enumerate(("mon.", "client.admin", "osd.0", "mgr.x")):
            create = ("--create-keyring",) if i == 0 else ()
            self._run("ceph-authtool", *create, f"{self._folder}/keyring", "--gen-key", "-n", name, *caps)

    def _run(self, tool: str, *args: str) -> None:
        """One of Ceph's tools; it waits for the monitor itself."""
        conf = () if tool in ("monmaptool", "ceph-authtool") else ("-c", str(self._conf))
        begin = time.monotonic()
        try:
            done = subprocess.run(
                [tool, *conf, *args], capture_output=True, text=True, cwd=self._folder, timeout=STEP_S, check=False
            )
        except subprocess.TimeoutExpired as e:
            raise RuntimeError(f"{tool} takes more than {STEP_S:.0f} s: {self._tail()}") from e
        if done.returncode:
            raise RuntimeError(f"{tool} failed after {time.monotonic() - begin:.0f} s: {done.stderr[-500:]}")

    def _start(self, daemon: str, *args: str) -> None:
        argv = [daemon, "-c", str(self._conf), "-f", *args]
        with (self._folder / f"{daemon}.out").open("wb") as out:
            self._processes.append(
                subprocess.Popen(argv, stdout=out, stderr=out, cwd=self._folder, start_new_session=True)
            )

    def _tail(self) -> str:
        outs = [p.read_text(errors="replace")[-300:] for p in sorted(self._folder.glob("*.out"))]
        return " | ".join(out for out in outs if out)
