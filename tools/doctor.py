"""`reelmae doctor`: what this machine can do, and what it cannot."""

from __future__ import annotations

from typing import Any

from reelmae.pipeline.ingest import sandbox
from reelmae.tools.machine import machine, versions


def doctor() -> dict[str, Any]:
    """ffmpeg, the limits a sandboxed child can be put under, backends of the loader, machine, versions."""
    return {
        "sandbox": sandbox.capabilities(),
        "machine": machine(),
        "versions": versions(),
    }
