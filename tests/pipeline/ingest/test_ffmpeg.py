"""Finding ffmpeg runs nothing with our environment: there may be keys in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import imageio_ffmpeg
import pytest

from reelmae.pipeline.errors import ChildError, ConfigError
from reelmae.pipeline.ingest.ffmpeg import find_ffmpeg


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    find_ffmpeg.cache_clear()
    yield
    find_ffmpeg.cache_clear()


def _program(path: Path, lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o700)
    return path


def test_it_is_the_one_that_imageio_ffmpeg_finds() -> None:
    assert find_ffmpeg().path == imageio_ffmpeg.get_ffmpeg_exe()


def test_no_program_that_is_tried_sees_our_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each program notes its environment and then is no ffmpeg."""
    seen = tmp_path / "seen"
    note = f"env >> {seen}; exit 1"
    bundled = _program(tmp_path / "imageio" / "binaries" / "ffmpeg-linux", note)
    monkeypatch.setattr(imageio_ffmpeg, "__file__", str(bundled.parents[1] / "__init__.py"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t")
    with pytest.raises(ConfigError, match="does not run as ffmpeg"):
        find_ffmpeg()
    bundled.unlink()
    monkeypatch.setattr("sys.prefix", str(tmp_path / "prefix"))
    monkeypatch.setenv("PATH", f"{tmp_path}/path:{os.environ['PATH']}")
    for place in ("prefix/bin", "path"):
        _program(tmp_path / place / "ffmpeg", note)
        with pytest.raises(ConfigError, match=f"{place}/ffmpeg: does not run"):
            find_ffmpeg()
        (tmp_path / place / "ffmpeg").unlink()
    text = seen.read_text()
    assert text.count("PATH=") >= 3
    assert "s3cr3t" not in text


def test_one_that_is_killed_while_it_is_tried_is_not_called_unusable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REELMAE_FFMPEG", str(_program(tmp_path / "ffmpeg", "kill -9 $$")))
    with pytest.raises(ChildError, match=r"ffmpeg: was killed while it was tried.*SIGKILL"):
        find_ffmpeg()


def test_a_missing_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REELMAE_FFMPEG", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="none: no such program"):
        find_ffmpeg()
