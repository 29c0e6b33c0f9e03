"""The trial of an encoder: what was killed says nothing about the encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from reelmae.pipeline.errors import ChildError
from reelmae.pipeline.ingest import encoders
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.sandbox import TRIES

Program = Callable[[str], str]


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    encoders.has_nvenc.cache_clear()
    yield
    encoders.has_nvenc.cache_clear()


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """program(lines of shell) → its path. Each run adds a line to `runs`."""

    def write(lines: str) -> str:
        path = tmp_path / "ffmpeg"
        path.write_text(f"#!/bin/sh\necho run >> {tmp_path}/runs\n{lines}\n")
        path.chmod(0o700)
        return str(path)

    return write


def _runs(folder: Path) -> int:
    return len((folder / "runs").read_text().splitlines())


def test_an_encoder_that_does_not_run_is_none(program: Program) -> None:
    assert encoders.choose(ShardConfig(), program("exit 1")) == "x264"
    encoders.has_nvenc.cache_clear()
    assert encoders.choose(ShardConfig(), program("exit 0")) == "nvenc"


def test_a_trial_that_is_killed_now_and_then_is_repeated(program: Program, tmp_path: Path) -> None:
    line = f"[ $(wc -l < {tmp_path}/runs) -lt {TRIES} ] && kill -9 $$; exit 0"
    assert encoders.choose(ShardConfig(), program(line)) == "nvenc"


def test_a_killed_trial_says_so_and_chooses_no_other_encoder(program: Program, tmp_path: Path) -> None:
    with pytest.raises(ChildError, match=r"the trial of NVENC: .*died of SIGKILL.*; run again, or choose another"):
        encoders.choose(ShardConfig(), program("kill -9 $$"))
    assert _runs(tmp_path) == TRIES
    encoders.has_nvenc.cache_clear()
    assert encoders.choose(ShardConfig(), program("exit 1")) == "x264"  # it was not remembered
