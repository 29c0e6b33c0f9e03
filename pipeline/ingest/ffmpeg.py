"""The ffmpeg of this machine: which program, which version, what its build can do."""

from __future__ import annotations

import functools
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg

from reelmae.pipeline.errors import ChildError, ConfigError
from reelmae.pipeline.ingest.sandbox import Limits, Sandbox, try_again


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
    """REELMAE_FFMPEG, else imageio-ffmpeg's binary; looked for once per process.

    ConfigError if there is none or it does not run, ChildError if it was killed while it was tried.
    """
    given = os.environ.get("REELMAE_FFMPEG")
    found = shutil.which(given) if given else _find_bundled()
    if found is None and given:
        raise ConfigError(f"REELMAE_FFMPEG={given}: no such program; unset it to use the one that came with reelmae")
    if found is None:
        raise ConfigError("no ffmpeg found; install imageio-ffmpeg, or set REELMAE_FFMPEG to one")
    filters = _output([found, "-hide_banner", "-filters"])
    version = _output([found, "-version"]).splitlines()
    if not version or "bwdif" not in filters:
        raise ConfigError(f"{found}: does not run as ffmpeg; set REELMAE_FFMPEG to a working one")
    tonemaps = all(re.search(rf"\b{name}\b", filters) for name in ("zscale", "tonemap"))
    return Tool(found, version[0].strip(), tonemaps)


def _find_bundled() -> str | None:
    """The ffmpeg that imageio-ffmpeg would take, or None.

    Its own search is not used: it runs each candidate with our whole environment, and there may be keys in that.
    """
    if given := os.environ.get("IMAGEIO_FFMPEG_EXE"):
        return shutil.which(given)
    bundled = sorted((Path(imageio_ffmpeg.__file__).parent / "binaries").glob("ffmpeg*"))
    candidates = [*map(str, bundled), str(Path(sys.prefix, "bin", "ffmpeg")), "ffmpeg"]
    return next(filter(None, map(shutil.which, candidates)), None)


def _output(argv: Sequence[str]) -> str:
    try:
        return try_again(lambda: Sandbox().output(argv, limits=Limits(wall_s=60), cwd=Path("/")))
    except ChildError as e:
        raise ChildError(f"{argv[0]}: was killed while it was tried ({e}); run again") from e
