"""The ffmpeg of this machine: which program, which version, what its build can do."""

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
    """An ffmpeg that runs on this machine.

    It is found on each machine by itself (`find_ffmpeg`) and is never sent to another: `path` means nothing there. A
    plan holds `version` only. Clips are equal byte for byte only if they were made by equal versions, so whoever runs
    a plan's task compares them first.
    """

    path: str
    """Absolute path of the program."""
    version: str
    """First line of `ffmpeg -version`: its version and build."""
    tonemaps: bool
    """Whether the build has the filters zscale and tonemap, which HDR and wide gamut need."""


@functools.cache
def find_ffmpeg() -> Tool:
    """REELMAE_FFMPEG, else imageio-ffmpeg's binary; looked for once per process. ConfigError if it does not run."""
    path = os.environ.get("REELMAE_FFMPEG") or imageio_ffmpeg.get_ffmpeg_exe()
    found = shutil.which(path)
    if found is None:
        raise ConfigError(f"REELMAE_FFMPEG={path}: no such program; unset it to use the one that came with reelmae")
    filters = _output([found, "-hide_banner", "-filters"])
    version = _output([found, "-version"]).splitlines()
    if not version or "bwdif" not in filters:
        raise ConfigError(f"{found}: does not run as ffmpeg; set REELMAE_FFMPEG to a working one")
    tonemaps = all(re.search(rf"\b{name}\b", filters) for name in ("zscale", "tonemap"))
    return Tool(found, version[0].strip(), tonemaps)


def _output(argv: Sequence[str]) -> str:
    with tempfile.TemporaryDirectory(prefix="reelmae-") as folder:
        return Sandbox().output(argv, limits=Limits(wall_s=60), cwd=Path(folder))
