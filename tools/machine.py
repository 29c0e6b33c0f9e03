"""The machine and the versions that a number was measured with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

from reelmae.pipeline.cores import usable_cores

REPORTED = (
    "reelmae",
    "torch",
    "torchvision",
    "timm",
    "av",
    "nvidia-dali-cuda130",
    "pyarrow",
    "numpy",
    "imageio-ffmpeg",
)


def machine() -> dict[str, object]:
    """Processor, usable cores, memory, GPU (null if there is none), system."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Python's and the packages' versions."""
    return {"python": platform.python_version()} | {name: _version(name) for name in REPORTED}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
