"""What a child may not do. Each limit is tried by a child that breaks it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from reelmae.pipeline.errors import ChildCrashedError, ChildError, ChildKilledError, ChildTimeoutError
from reelmae.pipeline.ingest.sandbox import Child, Finished, Limits, Sandbox, capabilities, is_full


def _python(code: str, folder: Path, **limits: float) -> Finished:
    values = {"wall_s": 30.0, **limits}
    return Sandbox().run([sys.executable, "-I", "-c", code], limits=Limits(**values), cwd=folder)  # type: ignore[arg-type]


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def _until_gone(pid: int) -> bool:
    for _ in range(100):
        if not _alive(pid):
            return True
        time.sleep(0.05)
    return False


def test_stderr_and_exit_status_come_back(tmp_path: Path) -> None:
    done = _python("import sys; sys.stderr.write('one\\ntwo\\n'); sys.exit(3)", tmp_path)
    assert (done.returncode, done.stderr, done.stderr_lines) == (3, "one\ntwo\n", 2)


def test_endless_stderr_is_counted_not_kept(tmp_path: Path) -> None:
    done = _python("import sys\nfor _ in range(40000): sys.stderr.write('x' * 49 + '\\n')", tmp_path)
    assert done.stderr_lines == 40000
    assert len(done.stderr) == 1 << 16


def test_timeout_kills_the_whole_group(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, signal, time, pathlib\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "pathlib.Path('pid').write_text(str(p.pid))\n"
        "time.sleep(60)"
    )
    begin = time.monotonic()
    with pytest.raises(ChildTimeoutError, match="2 s"):
        _python(code, tmp_path, wall_s=2)
    assert time.monotonic() - begin < 15
    assert _until_gone(int((tmp_path / "pid").read_text()))


def test_environment_holds_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    done = _python("import os, sys; sys.stderr.write(','.join(sorted(os.environ)))", tmp_path)
    assert set(done.stderr.split(",")) <= {"PATH", "LANG", "LC_CTYPE", "PWD", "SHLVL", "_"}


@pytest.mark.skipif(not capabilities().no_network, reason="this machine refuses network namespaces")
def test_child_cannot_reach_a_loopback_listener(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        code = f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=5)"
        plain = subprocess.run([sys.executable, "-c", code], check=False)
        assert plain.returncode == 0  # the listener does listen
        listener.accept()[0].close()
        assert _python(code, tmp_path).returncode != 0
        listener.settimeout(0.2)
        with pytest.raises(TimeoutError):
            listener.accept()


@pytest.mark.skipif(not capabilities().limits, reason="this machine has no prlimit")
def test_limits_on_file_size_memory_cpu_and_files(tmp_path: Path) -> None:
    write = "open('big', 'wb').write(bytes(4 << 20))"
    assert _python(write, tmp_path, file_bytes=1 << 20).returncode != 0
    assert (tmp_path / "big").stat().st_size <= 1 << 20
    assert "MemoryError" in _python("bytearray(1 << 30)", tmp_path, memory_bytes=512 << 20).stderr
    with pytest.raises(ChildCrashedError) as crashed:
        _python("while True: pass", tmp_path, cpu_s=1)
    assert type(crashed.value) is ChildCrashedError  # by our limit, not by somebody else
    assert _python("f = [open('/dev/null') for _ in range(100)]", tmp_path).returncode != 0


@pytest.mark.skipif(not capabilities().dies_with_parent, reason="this machine has no setpriv --pdeathsig")
def test_children_die_with_a_killed_parent(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\n"
        "from reelmae.pipeline.ingest.sandbox import Sandbox, Limits\n"
        "child = Sandbox().start(['sleep', '60'], limits=Limits(), cwd=pathlib.Path('.'))\n"
        "print(child.pid, flush=True)\n"
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        time.sleep(0.3)  # past the wrappers' own start
        assert _alive(child)
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    assert _until_gone(child)


def test_a_warm_child_answers_and_its_death_is_told(tmp_path: Path) -> None:
    code = (
        "import sys, os, time\n"
        "for line in sys.stdin:\n"
        "    if line.strip() == 'die': os.kill(os.getpid(), 9)\n"
        "    if line.strip() == 'hang': time.sleep(60)\n"
        "    print(line.strip().upper(), flush=True)"
    )
    argv = [sys.executable, "-I", "-c", code]
    sandbox = Sandbox()
    child = sandbox.start(argv, limits=Limits(), cwd=tmp_path)
    assert child.ask(b"a", wall_s=20) == b"A"
    assert child.ask(b"b", wall_s=20) == b"B"
    with pytest.raises(ChildCrashedError, match="SIGKILL"):
        child.ask(b"die", wall_s=20)
    child = sandbox.start(argv, limits=Limits(), cwd=tmp_path)
    with pytest.raises(ChildTimeoutError):
        child.ask(b"hang", wall_s=0.5)
    assert _until_gone(child.pid)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_a_kill_from_outside_is_told_from_a_crash(name: str, tmp_path: Path) -> None:
    kill = f"import os, signal; os.kill(os.getpid(), signal.{name})"
    with pytest.raises(ChildKilledError, match=f"died of {name}"):
        _python(kill, tmp_path)
    with pytest.raises(ChildKilledError, match=name):
        Sandbox().output([sys.executable, "-I", "-c", kill], limits=Limits(), cwd=tmp_path)
    child = Sandbox().start(["cat"], limits=Limits(), cwd=tmp_path)
    os.kill(child.pid, getattr(signal, name))
    with pytest.raises(ChildKilledError, match=f"the child died: {name}"):
        child.ask(b"x", wall_s=20)
    with pytest.raises(ChildCrashedError) as crashed:
        _python("import os; os.abort()", tmp_path)
    assert type(crashed.value) is ChildCrashedError


def test_a_kill_by_ourselves_is_none_from_outside(tmp_path: Path) -> None:
    sandbox = Sandbox()
    threading.Timer(0.5, sandbox.kill_all).start()
    with pytest.raises(ChildCrashedError) as crashed:
        sandbox.run(["sleep", "60"], limits=Limits(), cwd=tmp_path)
    assert type(crashed.value) is ChildCrashedError


def test_a_child_that_fails_by_itself_is_told_by_its_exit_status(tmp_path: Path) -> None:
    """It closes its output a moment before it ends: it must not be killed in that moment."""
    code = "import os, sys, time; sys.stdin.readline(); os.close(1); time.sleep(0.3); os._exit(7)"
    child = Sandbox().start([sys.executable, "-I", "-c", code], limits=Limits(), cwd=tmp_path)
    with pytest.raises(ChildCrashedError, match="the child died: exit status 7") as crashed:
        child.ask(b"x", wall_s=20)
    assert (type(crashed.value), crashed.value.returncode) == (ChildCrashedError, 7)


def test_a_child_that_closes_its_output_and_goes_on_is_killed(tmp_path: Path) -> None:
    code = "import os, sys, time; sys.stdin.readline(); os.close(1); time.sleep(60)"
    child = Sandbox().start([sys.executable, "-I", "-c", code], limits=Limits(), cwd=tmp_path)
    with pytest.raises(ChildCrashedError, match="closed its output and went on; killed") as crashed:
        child.ask(b"x", wall_s=20)
    assert type(crashed.value) is ChildCrashedError
    assert _until_gone(child.pid)


def test_after_kill_all_nothing_starts(tmp_path: Path) -> None:
    sandbox = Sandbox()
    child = sandbox.start(["sleep", "60"], limits=Limits(), cwd=tmp_path)
    sandbox.kill_all()
    child.close()
    assert _until_gone(child.pid)
    with pytest.raises(ChildError, match="being stopped"):
        sandbox.run(["true"], limits=Limits(), cwd=tmp_path)


def test_kill_all_of_one_sandbox_leaves_another_alone(tmp_path: Path) -> None:
    one, other = Sandbox(), Sandbox()
    first = one.start(["sleep", "60"], limits=Limits(), cwd=tmp_path)
    second = other.start(["cat"], limits=Limits(), cwd=tmp_path)
    one.kill_all()
    assert _until_gone(first.pid)
    assert second.ask(b"still here", wall_s=20) == b"still here"
    assert other.run(["true"], limits=Limits(), cwd=tmp_path).returncode == 0
    first.close()
    second.close()


def test_threads_may_start_children_while_all_are_killed(tmp_path: Path) -> None:
    sandbox = Sandbox()
    children: list[Child] = []

    def start_many() -> None:
        with contextlib.suppress(ChildError):
            while True:
                children.append(sandbox.start(["sleep", "60"], limits=Limits(), cwd=tmp_path))

    threads = [threading.Thread(target=start_many) for _ in range(4)]
    for thread in threads:
        thread.start()
    while len(children) < 8:
        time.sleep(0.01)
    sandbox.kill_all()
    for thread in threads:
        thread.join()
    for child in children:
        assert _until_gone(child.pid)
        child.close()


def test_a_full_disk_is_told_from_bad_video() -> None:
    assert is_full("av_interleaved_write_frame(): No space left on device")
    assert not is_full("Invalid data found when processing input")
