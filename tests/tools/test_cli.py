"""What a person meets at the command line: exit statuses, one-line errors, one JSON object."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import reelmae.tools.cli
from reelmae.model.config import OBJECTIVES, preset_name
from reelmae.tools.bench.config import BenchStepConfig
from reelmae.train.precision import Precision

REELMAE = [sys.executable, "-m", "reelmae.tools.cli"]
BENCHES = ("step", "load", "loaders", "shard", "plan", "index", "presets", "storage", "chart")
COMMANDS = (
    *("demo", "shard", "verify", "pretrain", "reconstruct", "import-weights", "export", "features"),
    *("report", "inspect", "doctor"),
    *(f"bench {name}" for name in BENCHES),
)


def run(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*REELMAE, *map(str, args)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )


def assert_user_error(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit status 2 and one line that names the value and the remedy."""
    assert result.returncode == 2, result
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0], (word, lines[0])


def test_help_lists_every_command_without_importing_torch() -> None:
    code = (
        "import sys\n"
        "from reelmae.tools import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit as e:\n    assert e.code == 0\n"
        "assert 'torch' not in sys.modules and 'nvidia.dali' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    for command in ("demo", "shard", "verify", "pretrain", "reconstruct", "bench", "report", "doctor"):
        assert command in result.stdout


def test_help_of_each_command_explains_every_flag_without_importing_torch() -> None:
    code = (
        "import sys\n"
        "from reelmae.tools import cli\n"
        f"for command in {COMMANDS!r}:\n"
        "    print(f'=== {command}')\n"
        "    try:\n        cli.main([*command.split(), '--help'])\n    except SystemExit as e:\n        assert e.code == 0\n"
        "assert not {'torch', 'nvidia.dali', 'matplotlib', 'pyarrow'} & set(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    pages = result.stdout.split("=== ")[1:]
    assert [page.split("\n")[0] for page in pages] == list(COMMANDS)
    for page in pages:
        flags = re.split(r"│ (?=--[a-z])", page)[1:]
        assert any(flag.startswith("--json") for flag in flags), page
        for flag in flags:  # the name, what it takes, what it means, its default
            text = " ".join(flag.replace("│", " ").split())
            assert re.search(r"[A-Za-z]{3,}.* [a-z]{2,}.*\(default: ", text), text


def test_the_command_line_starts_as_a_file_too(tmp_path: Path) -> None:
    """Python puts the file's folder first on its path: a module there must not hide one of the standard library."""
    cli = Path(reelmae.tools.cli.__file__)
    result = subprocess.run([sys.executable, cli, "doctor", "--json"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["ffmpeg"]["path"]


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    """`reelmae shard --help | head -1`"""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        result = subprocess.run([*REELMAE, "shard", "--help"], stdout=stdout, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_benchmarks_offer_every_objective_and_precision() -> None:
    """The names are the model's and the trainer's own types, which are read without torch."""
    hints = get_type_hints(BenchStepConfig)
    assert set(get_args(hints["objective"])) == set(OBJECTIVES)
    assert get_args(hints["precision"]) == get_args(Precision)
    assert preset_name(BenchStepConfig().model) == "B"


def test_no_command_is_wrong_usage() -> None:
    result = run()
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def test_unknown_flag_is_named_with_the_nearest() -> None:
    result = run("shard", "a", "b", "--short-sides", "256")
    assert result.returncode == 2
    assert "--short-sides" in result.stderr + result.stdout
    assert "--short-side" in result.stderr + result.stdout


def test_missing_source_is_named(tmp_path: Path) -> None:
    assert_user_error(run("shard", tmp_path / "nowhere", tmp_path / "out"), "nowhere", "check")
    assert not (tmp_path / "out").exists()


def test_empty_bucket_is_named(tmp_path: Path) -> None:
    (tmp_path / "bucket").mkdir()
    assert_user_error(run("shard", tmp_path / "bucket", tmp_path / "out"), "bucket")


def test_value_out_of_range_is_named(tmp_path: Path) -> None:
    assert_user_error(run("shard", tmp_path, tmp_path / "out", "--short-side", "20"), "--short-side", "20")


def test_unknown_filesystem_is_named(tmp_path: Path) -> None:
    assert_user_error(run("shard", "nosuch://bucket", tmp_path / "out"), "nosuch")


def test_typo_in_a_recipe_key_is_answered_with_the_right_one(tmp_path: Path) -> None:
    assert_user_error(run("pretrain", "demo", "optim.blrr=1e-3", f"data.url={tmp_path}"), "optim.blrr", "optim.blr")


def test_unknown_recipe_is_answered_with_the_known_ones() -> None:
    assert_user_error(run("pretrain", "dmeo"), "dmeo", "mae_st_vit_b")


def test_pretraining_on_no_dataset_is_a_message(tmp_path: Path) -> None:
    result = run("pretrain", "demo", f"data.url={tmp_path / 'nothing'}", f"run.out={tmp_path / 'run'}")
    assert_user_error(result, "nothing")


def test_only_broken_files_is_a_failure_that_says_why(tmp_path: Path) -> None:
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    (bucket / "notes.mp4").write_text("this is not a video\n" * 50)
    (bucket / "empty.mp4").touch()
    result = run("shard", bucket, tmp_path / "out", "--json")
    assert result.returncode == 1
    answer = json.loads(result.stdout)
    assert answer["exit_status"] == 1
    assert "not_a_video" in answer["error"]
    assert "Traceback" not in result.stderr


def test_a_place_that_cannot_be_written_to_is_named(tiny_run: Path, raw_bucket: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    nowhere = tmp_path / "file" / "out"
    assert_user_error(run("report", tiny_run, "--out", nowhere / "page.html"), str(tmp_path / "file"), "check")
    shards = tiny_run / "shards"
    assert_user_error(run("reconstruct", tiny_run / "train", shards, "--out", nowhere), "file", "check")
    result = run("shard", raw_bucket, nowhere)
    assert (result.returncode, result.stderr.count("Traceback")) == (2, 0), result.stderr
    assert str(tmp_path / "file") in result.stderr.splitlines()[-1]


def test_a_video_given_as_a_checkpoint_is_a_message(tiny_run: Path, raw_bucket: Path) -> None:
    video = next(p for p in raw_bucket.rglob("*.mp4") if p.stat().st_size > 10_000)
    assert_user_error(run("reconstruct", video, tiny_run / "shards"), video.name, "not a checkpoint")


@pytest.mark.parametrize("command", ["verify", "report"])
def test_a_folder_without_a_dataset_is_a_message(command: str, tmp_path: Path) -> None:
    result = run(command, tmp_path / "nothing")
    assert_user_error(result, "nothing")


def test_doctor_answers_as_json() -> None:
    answer = json.loads(run("doctor", "--json").stdout)
    assert answer["ffmpeg"]["path"]
    assert set(answer["sandbox"]) == {"limits", "no_network", "dies_with_parent"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--profile", "copy", "--cut", "scenes"],
            "profile copy cuts at the source's own keyframes; take cut windows",
        ),
        (["--crf", "60"], "crf 60 is above 51, the highest of this profile's encoder"),
        (["--encoder", "x265"], "encoder x265 makes no h264; take auto or x264 or nvenc"),
        (["--near-bits", "40"], "--near-bits 40: Input should be less than or equal to 11"),
    ],
)
def test_values_that_do_not_go_together_are_answered_in_one_line(flags: list[str], words: str, tmp_path: Path) -> None:
    result = run("shard", tmp_path, tmp_path / "dst", *flags)
    assert_user_error(result)
    assert result.stderr == f"reelmae: {words}\n"
