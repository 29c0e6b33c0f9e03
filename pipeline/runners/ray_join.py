"""Joins a Ray cluster, or makes one of this machine alone: on loopback, without reports and a dashboard, and silent."""

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
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from reelmae.pipeline.cores import usable_cores
from reelmae.pipeline.errors import ClusterError, ConfigError
from reelmae.pipeline.runners.runner import TICK_S
from reelmae.pipeline.storage.scratch import Scratch

CONNECT_S = 10.0  # for the first answer of a cluster's address
JOIN_S = 30.0  # for a trial process to join it
CLIENT_S = 90.0  # the same by ray://, where the cluster starts a process for it first
END_S = 10.0  # for the processes of a local Ray to end
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


def import_ray() -> Any:
    """The module ray, with what is used of it; ConfigError where it is not installed."""
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as e:
        raise ConfigError(f"--runner ray: Ray is not installed ({e}); pip install 'reelmae[ray]'") from e
    return ray


@contextlib.contextmanager
def join(ray: Any, address: str | None, cores: int | None) -> Iterator[None]:
    """Join the cluster at an address, and leave it at the end; without an address, a local Ray of so many cores, default all.

    ClusterError where it cannot be joined, ConfigError where the address is none.
    """
    quiet: dict[str, Any] = {"logging_level": logging.CRITICAL, "log_to_driver": False, "configure_logging": True}
    before = signal.getsignal(signal.SIGTERM) if threading.current_thread() is threading.main_thread() else None
    with contextlib.ExitStack() as stack:
        make: dict[str, Any] = {"address": address}
        environment: dict[str, str] = {}
        if address is None:
            folder, temporary = stack.enter_context(_folders())
            make = {"address": "local", "num_cpus": cores or usable_cores(), "include_dashboard": False}
            make |= {"object_store_memory": _OBJECTS_BYTES, "_temp_dir": folder}
            environment = _LOCAL | {"TMPDIR": temporary}
            stack.enter_context(_loopback())
        else:
            _refuse_silent(address)
        stack.enter_context(_silence())
        stack.callback(ray.shutdown)
        try:
            with _environment(environment):
                ray.init(**make, **({"log_to_driver": False} if is_client(address) else quiet))
        except Exception as e:
            raise ClusterError(f"{name_of(address)}: cannot be joined ({first_line(e)})") from e
        finally:
            if before is not None:
                signal.signal(signal.SIGTERM, before)
        yield


def name_of(address: str | None) -> str:
    """The cluster at an address, for people."""
    return "the local Ray" if address is None else f"Ray at {address}"


def is_client(address: str | None) -> bool:
    """Whether the driver is outside of the cluster, by Ray's client."""
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
    patience_s = CLIENT_S if is_client(address) else JOIN_S
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
        deadline = time.monotonic() + END_S
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

    def is_shown(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.CRITICAL or record.name.partition(".")[0] != "ray"

    handlers = list(logging.getLogger("ray").handlers)  # they may be those of others too
    before, worker._worker_logs_enabled = worker._worker_logs_enabled, False
    for handler in handlers:  # its loggers have levels of their own, which Ray sets
        handler.addFilter(is_shown)
    try:
        yield
    finally:
        worker._worker_logs_enabled = before
        for handler in handlers:
            handler.removeFilter(is_shown)


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


def first_line(error: BaseException) -> str:
    """An error's first line of words, else its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
