"""Keys given as storage options stay in the process: no file, no log, no child has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import s3_jobs
from fault_proxy import wait_until
from s3_servers import S3Server
from watched import SECRET, watch

DEBUG = (
    "import logging, sys\n"
    "logging.basicConfig(level=logging.DEBUG)\n"
    "from reelmae.tools.cli import main\n"
    "code = main()\n"
    "sys.exit(code)"
)


def _secrets_in(folder: Path) -> list[str]:
    return [str(p) for p in folder.rglob("*") if p.is_file() and SECRET in p.read_bytes()]


@pytest.fixture
def options(s3_server: S3Server, tmp_path: Path) -> str:
    """@FILE of the server's options."""
    path = tmp_path / "options.json"
    path.write_text(json.dumps(s3_server.options()))
    return f"@{path}"


def test_keys_given_as_options_are_in_no_file_no_log_and_no_child(
    undisturbed: Any, s3_server: S3Server, options: str, tmp_path: Path
) -> None:
    """Of a job, its checks, its report, a run of training and the states that it saves."""
    dst, work = s3_server.url("secret/shards"), tmp_path / "work"
    work.mkdir()
    either = ["--src-storage-options", options, "--dst-storage-options", options]
    of_url = ["--storage-options", options]
    train = ["run.steps=2", "run.checkpoint_every=1", "model.depth=1", "model.decoder_depth=1", "loader.batch_videos=2"]
    train += ["loader.workers=1", f"run.out={work / 'run'}", f"data.url={dst}", f"data.storage_options={options}"]
    commands = [
        ["shard", undisturbed.src, dst, *s3_jobs.FLAGS, *either],
        ["verify", dst, "--deep", *of_url],
        ["inspect", dst, *of_url],
        ["report", dst, "--out", str(work / "dataset.html"), *of_url],
        ["pretrain", "demo", *train],
        ["report", str(work / "run")],
    ]
    seen: set[str] = set()
    for args in commands:
        process = s3_jobs.start(args, None, program=DEBUG, tmpdir=work)
        with watch(process.pid) as watched:
            wait_until(Path(f"/proc/{process.pid}/environ").read_bytes, what="it shows its environment")
            own = b"".join(Path(f"/proc/{process.pid}/{name}").read_bytes() for name in ("cmdline", "environ"))
            done = s3_jobs.end(process)
        assert done.status == 0, done
        assert "DEBUG" in done.err or args[0] == "report"
        assert SECRET not in own
        assert watched.with_secret() == []
        assert SECRET.decode() not in done.out + done.err
        seen |= watched.programs()
    assert any(name.startswith("ffmpeg") for name in seen), seen
    assert any(name.startswith("python") for name in seen), seen
    files = s3_jobs.files_at(s3_server, "secret/shards")
    assert files == undisturbed.files
    assert [name for name, data in files.items() if SECRET in data] == []
    assert list(work.glob("run/**/*.pt*")) or list(work.glob("run/**/*.safetensors")), list(work.rglob("*"))
    assert _secrets_in(work) == []


def test_inline_options_reach_no_child_either(undisturbed: Any, s3_server: S3Server, tmp_path: Path) -> None:
    text = json.dumps(s3_server.options())
    flags = ["--src-storage-options", text, "--dst-storage-options", text]
    dst = s3_server.url("secret/inline")
    process = s3_jobs.start(["shard", undisturbed.src, dst, *s3_jobs.FLAGS, *flags], None, program=DEBUG)
    with watch(process.pid) as watched:
        done = s3_jobs.end(process)
    assert done.status == 0, done
    assert watched.commands
    assert watched.with_secret() == []
    assert SECRET.decode() not in done.out + done.err
    assert s3_jobs.files_at(s3_server, "secret/inline") == undisturbed.files


def test_keys_in_the_environment_do_not_reach_the_programs_of_a_job(undisturbed: Any, s3_server: S3Server) -> None:
    dst = s3_server.url("secret/environment")
    process = s3_jobs.start(["shard", undisturbed.src, dst, *s3_jobs.FLAGS], s3_server)
    with watch(process.pid) as watched:
        done = s3_jobs.end(process)
    assert done.status == 0, done
    assert any(name.startswith("ffmpeg") for name in watched.programs()), watched.programs()
    assert watched.with_secret() == []


@pytest.mark.parametrize("text", ['{"key": "reelmae", "secret": "reelmae-secret"', '["reelmae-secret"]'])
def test_options_that_are_no_json_are_refused_without_being_shown(text: str, tmp_path: Path) -> None:
    (tmp_path / "options").write_text(text)
    for flag in (text, f"@{tmp_path / 'options'}"):
        done = s3_jobs.run(["shard", "s3://b/raw", str(tmp_path / "dst"), "--src-storage-options", flag], None)
        assert done.status == 2, done
        assert "JSON" in done.told
        assert SECRET.decode() not in done.out + done.err


def test_wrong_options_are_refused_without_being_shown(undisturbed: Any, s3_server: S3Server, tmp_path: Path) -> None:
    wrong = s3_server.options() | {"no_such_option": "reelmae-secret"}
    wrong_kind = s3_server.options() | {"config_kwargs": {"no_such": "reelmae-secret"}}
    for options in (wrong, wrong_kind):
        flags = ["--src-storage-options", json.dumps(options)]
        done = s3_jobs.shard(undisturbed.src, str(tmp_path / "dst"), None, *flags)
        assert done.status in (1, 2), done
        assert SECRET.decode() not in done.out + done.err
        assert done.told
