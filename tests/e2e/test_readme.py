"""The README's three journeys, each command as it is written, in order. Slow: it shards, benches and trains for real."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from reelmae.tools.synth.bucket import make_bucket

README = Path(__file__).resolve().parents[2] / "README.md"
JOURNEYS = ("I have a bucket", "I want to know what limits me", "I want to pretrain")
REELMAE = [sys.executable, "-m", "reelmae.tools.cli"]


def commands_of(heading: str) -> list[str]:
    """The `$ reelmae …` lines of the first console block under a heading, without their comments."""
    section = README.read_text(encoding="utf-8").split(f"## {heading}\n")[1]
    block = re.search(r"```console\n(.*?)```", section, re.DOTALL)
    assert block is not None
    return [line.removeprefix("$ ").split(" #")[0].strip() for line in block[1].splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the demo has been: a small bucket in runs/demo/bucket."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "runs" / "demo").mkdir(parents=True)
    make_bucket(folder / "runs" / "demo" / "bucket", videos=14, seconds=2.5, seed=1)
    return folder


@pytest.mark.slow
def test_each_command_of_the_journeys_runs_as_written(folder: Path) -> None:
    for heading in JOURNEYS:
        commands = commands_of(heading)
        assert commands
        for command in commands:
            name, *arguments = shlex.split(command)
            assert name == "reelmae", command
            done = subprocess.run([*REELMAE, *arguments], cwd=folder, capture_output=True, text=True)
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    for made in ("shards/report.html", "runs/mine/pictures/reconstruction.png", "runs/mine/features.parquet"):
        assert (folder / made).stat().st_size > 0, made
    assert (folder / "runs" / "mine" / "checkpoints" / "step_000040.pt").is_file()
    assert (folder / "runs" / "mine" / "encoder.safetensors").is_file()
