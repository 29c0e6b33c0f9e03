"""`reelmae doctor`: what this machine can do, and a warning for each thing that it cannot."""

from __future__ import annotations

import importlib.util
import subprocess
from dataclasses import asdict
from typing import Any

from reelmae.pipeline.errors import ChildError
from reelmae.pipeline.ingest import encoders, sandbox
from reelmae.pipeline.ingest.ffmpeg import find_ffmpeg
from reelmae.tools.machine import machine, versions

LIBRARIES = {"x264": "libx264", "x265": "libx265", "vp9": "libvpx-vp9"}
MEANING = {
    "limits": "child processes that read foreign video run without limits on memory, processor time and file size: install util-linux (prlimit)",
    "no_network": "child processes that read foreign video can reach the network: allow user namespaces (unshare -rn)",
    "dies_with_parent": "child processes may outlive a job that is killed: install util-linux (setpriv)",
    "x264": "this ffmpeg has no libx264: profiles default, fast-decode and copy cannot encode without NVENC; set REELMAE_FFMPEG",
    "x265": "this ffmpeg has no libx265: profile small cannot encode without NVENC; set REELMAE_FFMPEG",
    "vp9": "this ffmpeg has no libvpx-vp9: profile vp9 cannot encode; set REELMAE_FFMPEG",
    "nvenc_h264": "no NVENC for H.264 (it needs an NVIDIA GPU with NVENC and an ffmpeg with h264_nvenc): clips are encoded on the CPU",
    "nvenc_hevc": "no NVENC for HEVC (it needs an NVIDIA GPU with NVENC and an ffmpeg with hevc_nvenc): profile small is encoded on the CPU",
    "tonemaps": "this ffmpeg has no zscale and tonemap: HDR and wide gamut sources are rejected as unsupported_colour; set REELMAE_FFMPEG",
    "scenes": "PySceneDetect is not installed: --cut scenes is refused; install reelmae[curate]",
    "gpu": "torch sees no GPU: clips are decoded and models trained on the CPU",
}


def doctor() -> dict[str, Any]:
    """ffmpeg and its encoders, scene detection, the sandbox's limits, machine and versions, and a warning for each thing
    that is missing."""
    import torch

    tool, can = find_ffmpeg(), sandbox.capabilities().as_dict()
    encoding = _encoders(tool.path)
    scenes = importlib.util.find_spec("scenedetect") is not None
    has = can | encoding | {"tonemaps": tool.tonemaps, "scenes": scenes, "gpu": torch.cuda.is_available()}
    return {
        "ffmpeg": asdict(tool),
        "encoders": encoding,
        "scenes": scenes,
        "sandbox": can,
        "machine": machine(),
        "versions": versions(),
        "warnings": [MEANING[name] for name, there in has.items() if not there],
    }


def _encoders(ffmpeg: str) -> dict[str, bool]:
    """Whether ffmpeg was built with each encoder; for NVENC, whether it encoded a few frames."""
    argv = [ffmpeg, "-hide_banner", "-encoders"]
    listed = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60).stdout
    names = {line.split()[1] for line in listed.splitlines() if len(line.split()) > 1}
    built = {name: library in names for name, library in LIBRARIES.items()}
    return built | {f"nvenc_{codec}": _nvenc(ffmpeg, codec) for codec in ("h264", "hevc")}


def _nvenc(ffmpeg: str, codec: str) -> bool:
    try:
        return encoders.has_nvenc(ffmpeg, codec)
    except ChildError:  # it hung, or died
        return False
