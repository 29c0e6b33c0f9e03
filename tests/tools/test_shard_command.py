"""`reelmae shard`: how its two stores are reached, and what its summary says of retries and of another job."""

from __future__ import annotations

import functools
import http.server
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reelmae.pipeline.storage.claim import Claim
from reelmae.pipeline.storage.store import Store
from reelmae.tools.cli import main, parse
from reelmae.tools.commands.data import Shard

Make = Callable[..., Path]
SECRET = "hunter2-very-secret"


def test_src_and_dst_have_their_own_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr("reelmae.pipeline.ingest.estimate.estimate", lambda *_, **values: given.append(values) or {})
    (tmp_path / "dst.json").write_text(json.dumps({"key": "theirs", "secret": SECRET}))
    flags = ["--src-storage-options", '{"key": "mine"}', "--dst-storage-options", f"@{tmp_path}/dst.json"]
    command = parse(["shard", "s3://a/raw", "s3://b/out", "--dry-run", "--patience", "2", *flags])
    assert isinstance(command, Shard)
    command.run()
    src, dst = given[0]["src_access"], given[0]["dst_access"]
    assert (src.options, src.patience_s) == ({"key": "mine"}, 120)
    assert (dst.options, dst.patience_s) == ({"key": "theirs", "secret": SECRET}, 120)


def test_a_wrong_option_is_one_line_that_does_not_show_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for flag in ("--src-storage-options", "--dst-storage-options"):
        assert main(["shard", str(tmp_path), str(tmp_path / "out"), flag, f'{{"secret": "{SECRET}"']) == 2
        told = capsys.readouterr().err
        assert flag in told
        assert SECRET not in told
        assert "Traceback" not in told
    assert not (tmp_path / "out").exists()


def test_another_job_is_told_in_one_line(capsys: pytest.CaptureFixture[str], make_video: Make, tmp_path: Path) -> None:
    make_video(tmp_path / "src" / "a.mp4", frames=5)
    argv = ["shard", str(tmp_path / "src"), str(tmp_path / "dst"), "--short-side", "64"]
    with Claim(Store(str(tmp_path / "dst"))):
        assert main(argv) == 1
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        assert "another job writes to it" in line
        assert main([*argv, "--dry-run"]) == 0
        assert main([*argv, "--takeover"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize("wrong", [0, 1])
def test_the_summary_shows_retries_where_there_were_some(
    wrong: int, capsys: pytest.CaptureFixture[str], make_video: Make, tmp_path: Path
) -> None:
    make_video(tmp_path / "www" / "a.mp4", frames=5)
    answers = iter([503] * wrong)

    class Web(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if status := next(answers, None):
                self.send_error(status)
            else:
                super().do_GET()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Web, directory=str(tmp_path / "www"))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        (tmp_path / "list.csv").write_text(f"url\nhttp://127.0.0.1:{server.server_port}/a.mp4\n")
        assert main(["shard", str(tmp_path / "list.csv"), str(tmp_path / "dst"), "--short-side", "64"]) == 0
        server.shutdown()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("retries")]
    assert lines == (["retries: 1 (1 x 503)"] if wrong else [])
