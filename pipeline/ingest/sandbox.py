"""Runs children under limits: the only place of the ingest that starts a process.

What holds for every child:
- address space, CPU seconds, size of any file it writes, open files: limited (`prlimit`); no core files;
- no network: an empty network namespace of its own (`unshare -n`);
- its own session and process group; past its wall-clock limit the whole group gets SIGKILL;
- an environment of PATH and LANG only: no credentials, no proxies, no LD_*;
- an argument list, never a shell; standard input closed (or a pipe of ours);
- it dies when the thread that started it dies, even by SIGKILL (`setpriv --pdeathsig`).

Limits that the machine does not allow are left out; `capabilities()` says which hold. A full disk is not the fault of
the video: `is_full` recognises it in a child's stderr. Nor is a kill from outside (the system's, for want of memory, or
anybody's): ChildKilledError is raised for SIGKILL and SIGTERM that neither we nor a limit sent.

A Sandbox costs nothing to make: take one per worker, or share one between threads. What the machine allows is tried
once per process, for all of them.
"""

from __future__ import annotations

import functools
import os
import selectors
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TypeVar

from reelmae.pipeline.errors import ChildCrashedError, ChildError, ChildKilledError, ChildTimeoutError

_HEAD_BYTES = 1 << 16  # of stderr that are kept; lines after them are only counted
TRIES = 3  # of a short child of ours that is killed from outside
_END_S = 2.0  # a child that has closed its output may take so long to end
_FULL = ("No space left on device", "Disk quota exceeded", "Errno 28")


T = TypeVar("T")
_KILLS = (-signal.SIGKILL, -signal.SIGTERM)


@dataclass(frozen=True)
class Limits:
    """What one child may use: seconds, bytes, open files."""

    wall_s: float = 600.0
    cpu_s: int = 600
    memory_bytes: int = 4 << 30
    file_bytes: int = 4 << 30
    open_files: int = 64


@dataclass(frozen=True)
class Finished:
    """A child that ended by itself."""

    returncode: int
    stderr: str
    """Its first 64 KiB."""
    stderr_lines: int
    """Lines in all of it."""
    seconds: float


@dataclass(frozen=True)
class Capabilities:
    """What this machine can enforce on a child."""

    limits: bool
    """prlimit works."""
    no_network: bool
    """unshare -n, or -rn, works."""
    dies_with_parent: bool
    """setpriv --pdeathsig works."""

    def as_dict(self) -> dict[str, bool]:
        """For reports."""
        return asdict(self)


def _can_run(argv: Sequence[str]) -> bool:
    """Whether this wrapper can run a program."""
    true = shutil.which("true")
    if shutil.which(argv[0]) is None or true is None:
        return False

    def run() -> bool:
        command = [*argv, true]
        done = subprocess.run(command, env=_environment(), stdin=subprocess.DEVNULL, capture_output=True, timeout=30)
        if done.returncode in _KILLS:
            raise ChildKilledError(f"{argv[0]}: a trial was killed: {_describe_end(done.returncode)}")
        return done.returncode == 0

    return try_again(run)


@functools.cache
def _wrappers() -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    """Wrappers: one without network, one that dies with its parent (each () if refused); and whether prlimit works."""
    network: tuple[str, ...] = ()
    for candidate in (("unshare", "-n", "--"), ("unshare", "-rn", "--")):
        if _can_run(candidate):
            network = candidate
            break
    death = ("setpriv", "--pdeathsig", "KILL", "--")
    return network, (death if _can_run(death) else ()), _can_run(("prlimit", "--core=0", "--"))


def capabilities() -> Capabilities:
    """What is enforced on this machine; tried once per process."""
    network, death, limits = _wrappers()
    return Capabilities(limits=limits, no_network=bool(network), dies_with_parent=bool(death))


def _environment() -> dict[str, str]:
    return {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8"}


def wrap(argv: Sequence[str], limits: Limits) -> list[str]:
    """The command line that runs `argv` under these limits."""
    network, death, prlimit = _wrappers()
    bounds = (
        "prlimit",
        f"--as={limits.memory_bytes}",
        f"--cpu={max(1, limits.cpu_s)}",
        f"--fsize={limits.file_bytes}",
        f"--nofile={limits.open_files}",
        "--core=0",
        "--",
    )
    return [*network, *death, *(bounds if prlimit else ()), *argv]


def try_again(call: Callable[[], T]) -> T:
    """What a call gives whose child may be killed from outside: it is called up to TRIES times."""
    for _ in range(TRIES - 1):
        try:
            return call()
        except ChildKilledError:
            continue
    return call()


def is_full(stderr: str) -> bool:
    """Whether a child's stderr says that the disk is full."""
    return any(words in stderr for words in _FULL)


class Child:
    """A long-lived child that answers one line on stdout for each line on stdin."""

    def __init__(self, sandbox: Sandbox, process: subprocess.Popen[bytes], limits: Limits) -> None:
        self._sandbox = sandbox
        self._process = process
        self._limits = limits
        self._buffer = b""

    @property
    def pid(self) -> int:
        """Number of the child's process, and of its process group."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the child still runs."""
        return self._process.poll() is None

    def ask(self, line: bytes, *, wall_s: float, max_answer: int = 1 << 26) -> bytes:
        """Send one line, return the answer's line. After any error the child is dead and must be replaced."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        deadline = time.monotonic() + wall_s
        try:
            stdin.write(line + b"\n")
            stdin.flush()
        except (BrokenPipeError, ValueError) as e:
            raise self._end_crashed() from e
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                left = deadline - time.monotonic()
                if left <= 0 or len(self._buffer) > max_answer:
                    self.close()
                    raise ChildTimeoutError(f"no answer within {wall_s:g} s; killed")
                if selector.select(left):
                    block = os.read(stdout.fileno(), 1 << 16)
                    if not block:
                        raise self._end_crashed()
                    self._buffer += block
        answer, self._buffer = self._buffer.split(b"\n", 1)
        return answer

    def _end_crashed(self) -> ChildCrashedError:
        """Clean up after a child that died; the error to raise."""
        code, cpu_s = _wait_end(self._process, time.monotonic() + _END_S)
        self.close()
        if code is None:
            return ChildCrashedError("the child closed its output and went on; killed")
        kind = self._sandbox._kind_of_crash(code, cpu_s, self._limits)
        return kind(f"the child died: {_describe_end(code)}", returncode=code)

    def close(self) -> None:
        """Kill the child's group and reap the child; harmless if it is gone already."""
        self._sandbox._end(self._process)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:  # bytes that a dead child never read
                    continue


class Sandbox:
    """Starts children and knows which are alive, so that all can be killed at once. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._alive: set[subprocess.Popen[bytes]] = set()
        self._closed = False

    def run(self, argv: Sequence[str], *, limits: Limits, cwd: Path) -> Finished:
        """Run to the end.

        ChildTimeoutError past the wall clock, ChildCrashedError on death by a signal, ChildKilledError (one of these)
        where somebody else sent it.
        """
        begin = time.monotonic()
        process = self._start(
            argv, limits, cwd, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            assert process.stderr is not None
            head, lines = _drain(process.stderr, begin + limits.wall_s)
            code, cpu_s = _wait_end(process, max(begin + limits.wall_s, time.monotonic() + 0.1))
            if code is None:
                raise TimeoutError
        except TimeoutError as e:
            raise ChildTimeoutError(f"ran past {limits.wall_s:g} s; killed") from e
        finally:
            self._end(process)
            if process.stderr is not None:
                process.stderr.close()
        if code < 0:
            kind = self._kind_of_crash(code, cpu_s, limits)
            raise kind(f"died of {_describe_end(code)}: {head[-300:].strip()}", returncode=code, stderr=head)
        return Finished(code, head, lines, time.monotonic() - begin)

    def output(self, argv: Sequence[str], *, limits: Limits, cwd: Path) -> str:
        """What a short program of ours prints to stdout; "" if it fails or cannot be started.

        ChildKilledError where it was killed from outside.
        """
        try:
            process = self._start(
                argv, limits, cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        except ChildError:
            return ""
        try:
            out, _ = process.communicate(timeout=limits.wall_s)
        except subprocess.TimeoutExpired:
            return ""
        finally:
            self._end(process)
            if process.stdout is not None:
                process.stdout.close()
        if self._kind_of_crash(process.returncode, 0.0, limits) is ChildKilledError:
            raise ChildKilledError(f"{argv[0]}: {_describe_end(process.returncode)}", returncode=process.returncode)
        return out.decode("utf-8", "replace") if process.returncode == 0 else ""

    def start(self, argv: Sequence[str], *, limits: Limits, cwd: Path) -> Child:
        """Start a long-lived child. The wall clock of its limits is not used: each question has its own."""
        process = self._start(
            argv, limits, cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        return Child(self, process, limits)

    def _start(
        self, argv: Sequence[str], limits: Limits, cwd: Path, *, stdin: int, stdout: int, stderr: int
    ) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._closed:
                raise ChildError("the job is being stopped; no new children")
            try:
                process = subprocess.Popen(
                    wrap(argv, limits),
                    cwd=cwd,
                    env=_environment(),
                    stdin=stdin,
                    stdout=stdout,
                    stderr=stderr,
                    start_new_session=True,
                    close_fds=True,
                )
            except OSError as e:
                raise ChildError(f"{argv[0]}: cannot be started: {e}") from e
            self._alive.add(process)
            return process

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """SIGKILL to the whole group (the group may outlive its leader), then reap."""
        with self._lock:
            if process not in self._alive:
                return
            self._alive.discard(process)
        _kill_group(process.pid)
        process.wait()

    def _kind_of_crash(self, code: int, cpu_s: float, limits: Limits) -> type[ChildCrashedError]:
        """Whether a child with this end was killed from outside: not by `kill_all`, not for its processor time."""
        with self._lock:
            ours = self._closed
        by_limit = code == -signal.SIGKILL and cpu_s >= limits.cpu_s - 1
        return ChildKilledError if code in _KILLS and not (ours or by_limit) else ChildCrashedError

    def kill_all(self) -> None:
        """Kill every child and refuse new ones: the job is being stopped. Any thread may call it, more than once."""
        with self._lock:
            self._closed = True
            alive = list(self._alive)
        for process in alive:
            _kill_group(process.pid)


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # all gone, or only zombies left
        return


def _wait_end(process: subprocess.Popen[bytes], deadline: float) -> tuple[int | None, float]:
    """A child's exit status, None where it has not ended by then, and the processor time that it used, in seconds."""
    if process.returncode is not None:  # reaped before
        return process.returncode, 0.0
    pause = 0.0005
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() >= deadline:
            return None, 0.0
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_bytes().rpartition(b")")[2].split()
        cpu_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):  # a system without /proc
        cpu_s = 0.0
    return process.wait(), cpu_s


def _drain(pipe: IO[bytes], deadline: float) -> tuple[str, int]:
    """Read a pipe to its end: its first 64 KiB as text, and the number of lines in all of it."""
    head, lines = b"", 0
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            if not selector.select(left):
                continue
            block = os.read(pipe.fileno(), 1 << 16)
            if not block:
                return head.decode("utf-8", "replace"), lines
            lines += block.count(b"\n")
            if len(head) < _HEAD_BYTES:
                head += block[: _HEAD_BYTES - len(head)]


def _describe_end(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
