"""The ffmpeg in use: which program, which version, what its build can do."""

from __future__ import annotations

import functools
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg

from reelmae.pipeline.errors import ConfigError
from reelmae.pipeline.ingest.sandbox import Limits, Sandbox


@dataclass(frozen=True)
class Tool:
    """The ffmpeg in use: its path, its version line, and whether it has zscale and tonemap."""

    path: str
    version: str
    tonemaps: bool


@functools.cache
def find_ffmpeg() -> Tool:
    """REELMAE_FFMPEG, else imageio-ffmpeg's binary; ConfigError where it does not run."""
    path = os.environ.get("REELMAE_FFMPEG") or imageio_ffmpeg.get_ffmpeg_exe()
    found = shutil.which(path)
    if found is None:
        raise ConfigError(f"REELMAE_FFMPEG={path}: no such program; unset it to use the one that came with reelmae")
    filters = _output([found, "-hide_banner", "-filters"])
    version = _output([found, "-version"]).splitlines()
    if not version or "bwdif" not in filters:
        raise ConfigError(f"{found}: does not run as ffmpeg; set REELMAE_FFMPEG to a working one")
    return Tool(
        found,
        version[0].strip(),
        bool(re.search(r"\bzscale\b", filters) and re.search(r"\btonemap\b", filters)),
    )


def _output(argv: Sequence[str]) -> str:
    with tempfile.TemporaryDirectory(prefix="reelmae-") as folder:
        return Sandbox().output(argv, limits=Limits(wall_s=60), cwd=Path(folder))
