"""What our code logs while a command runs: plain lines on stderr, beside a progress bar too, and nothing on stdout."""

from __future__ import annotations

import io
import json
import logging
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from reelmae.pipeline.storage.store import Store
from reelmae.tools.cli import log_to_stderr
from reelmae.tools.show import ClipProgress

REELMAE = [sys.executable, "-m", "reelmae.tools.cli"]
STORAGE = logging.getLogger("reelmae.storage")


def test_a_line_is_plain_and_comes_once(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.StreamHandler(sys.stderr)  # as a library may install one
    logging.getLogger().addHandler(root)
    try:
        with log_to_stderr():
            STORAGE.warning("waiting for %s since 12:00:00: %s", "s3://b/x\x1b[2J", "timed out")
            STORAGE.debug("not shown")
    finally:
        logging.getLogger().removeHandler(root)
    out, err = capsys.readouterr()
    assert (out, err) == ("", "reelmae: waiting for s3://b/x\\x1b[2J since 12:00:00: timed out\n")
    assert not logging.getLogger("reelmae").handlers and logging.getLogger("reelmae").propagate


def test_beside_a_bar_it_stands_above_it(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=100, legacy_windows=False)
    with log_to_stderr(), ClipProgress(console=console) as progress:
        progress(3, 10)
        STORAGE.warning("waiting for %s since 12:00:00: timed out", "s3://bucket/shards")
        progress(4, 10)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    lines = [line.rpartition("\r")[2] for line in text.split("\n")]  # what a terminal leaves of each
    assert lines.count("reelmae: waiting for s3://bucket/shards since 12:00:00: timed out") == 1, lines
    assert any("4/10" in line for line in lines)
    assert capsys.readouterr().err == ""


def test_a_command_that_waits_for_a_store_says_so_and_its_json_is_clean(
    tiny_run: Path, s3_server: Any, faulty: Any, tmp_path: Path
) -> None:
    store = Store(s3_server.url("log/shards"), s3_server.access())
    shards = tiny_run / "shards"
    for path in sorted(p for p in shards.rglob("*") if p.is_file()):
        store.publish(path, path.relative_to(shards).as_posix())
    proxy, file = faulty(), tmp_path / "options.json"
    file.write_text(json.dumps(proxy.s3.options()))
    proxy.down()
    back = threading.Timer(8.0, proxy.up)
    back.start()
    argv = [*REELMAE, "inspect", store.url(), "--storage-options", f"@{file}", "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    back.join()
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["finished"] is True
    first, last = done.stderr.splitlines()
    assert re.fullmatch(rf"reelmae: waiting for {store.url()}\S* since \d\d:\d\d:\d\d: .*refused.*", first), first
    assert re.fullmatch(rf"reelmae: {store.url()}\S* answers again after \d+ s", last), last


@pytest.mark.parametrize(
    ("command", "words"),
    [("inspect URL", "nothing of it is kept"), ("features RUN URL", "run the same command again to resume")],
)
def test_an_interrupted_command_says_whether_it_resumes(
    command: str, words: str, tiny_run: Path, faulty: Any, tmp_path: Path
) -> None:
    proxy, file = faulty(), tmp_path / "options.json"
    file.write_text(json.dumps(proxy.s3.options()))
    proxy.down()
    places = {"URL": proxy.s3.url("x"), "RUN": str(tiny_run / "train")}
    argv = [*REELMAE, *(places.get(word, word) for word in command.split()), "--storage-options", f"@{file}"]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as child:
        assert child.stderr is not None
        assert "waiting for" in child.stderr.readline()
        child.send_signal(signal.SIGINT)
        err = child.stderr.read()
    assert (child.returncode, err) == (130, f"reelmae: interrupted; {words}\n")
