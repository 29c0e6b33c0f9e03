"""Which encoder makes the clips, and ffmpeg's options for it.

Every encoder gives no B-frames, closed GOPs of `gop` frames, and a keyframe wherever one is forced. It runs in one
thread, so that equal input gives equal bytes; NVENC's bytes are equal only on the same GPU and driver. Whether the
machine has NVENC is found out by encoding a few frames in the sandbox. A job keeps the encoder it began with.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from reelmae.pipeline.errors import ChildError, ConfigError
from reelmae.pipeline.ingest.config import ENCODERS, ShardConfig
from reelmae.pipeline.ingest.sandbox import Limits, Sandbox, try_again

NVENC_BYTES = 1 << 42  # address space of a child with NVENC: CUDA reserves far more than it uses
_NVENC = {"h264": "h264_nvenc", "hevc": "hevc_nvenc"}


def choose(config: ShardConfig, ffmpeg: str) -> str:
    """The encoder of a new job: x264, x265, vpx or nvenc.

    ConfigError if the configured one does not run here, ChildError if its trial was killed.
    """
    able = ENCODERS[config.codec]
    if config.encoder == "auto":
        return "nvenc" if "nvenc" in able and has_nvenc(ffmpeg, config.codec) else able[0]
    if config.encoder == "nvenc" and not has_nvenc(ffmpeg, config.codec):
        raise ConfigError(
            f"encoder nvenc: {ffmpeg} cannot encode {config.codec} with NVENC on this machine; "
            f"take auto or {able[0]}, or set REELMAE_FFMPEG"
        )
    return config.encoder


@functools.cache
def has_nvenc(ffmpeg: str, codec: str) -> bool:
    """Whether this ffmpeg can encode a few frames with NVENC on this machine; tried once per process.

    ChildError where the trial was killed or hung: that says nothing about the encoder, and a job must not begin with
    another one for it.
    """
    source = ["-f", "lavfi", "-i", "color=s=256x256:d=0.2:r=10"]
    argv = [ffmpeg, "-nostdin", "-v", "error", *source, "-c:v", _NVENC[codec], "-f", "null", "-"]
    limits = Limits(wall_s=60, cpu_s=60, memory_bytes=NVENC_BYTES)
    try:
        return try_again(lambda: Sandbox().run(argv, limits=limits, cwd=Path("/"))).returncode == 0
    except ChildError as e:
        raise ChildError(
            f"the trial of NVENC: {ffmpeg} {e}; run again, or choose another encoder with --encoder",
            returncode=e.returncode,
            stderr=e.stderr,
        ) from e


def options(config: ShardConfig, encoder: str, *, scenes: bool) -> dict[str, Any]:
    """ffmpeg's options. `scenes`: the encoder itself places keyframes at scene cuts, if it can."""
    common: dict[str, Any] = {"g": config.gop, "pix_fmt": "yuv420p", "threads": 1}
    if encoder == "nvenc":
        rate = {"rc": "vbr", "cq": config.quality, "b:v": 0}
        keys = {"bf": 0, "forced-idr": 1, "no-scenecut": int(not scenes), "strict_gop": 1}
        tag = {"tag:v": "hvc1"} if config.codec == "hevc" else {}
        return {"c:v": _NVENC[config.codec], "preset": "p4", **rate, **keys, **tag, **common}
    if encoder == "vpx":
        # no hidden reference frames: each packet is one picture, as the loader's CPU decoders expect
        plain = {"auto-alt-ref": 0, "lag-in-frames": 0, "row-mt": 0, "tag:v": "vp09"}
        speed = {"deadline": "good", "cpu-used": 4, "b:v": 0, "crf": config.quality}
        return {"c:v": "libvpx-vp9", **speed, **plain, **common, "keyint_min": 0}
    keys = {"keyint_min": 1 if scenes else config.gop, "sc_threshold": 40 if scenes else 0, "bf": 0}
    if encoder == "x265":
        cuts = "scenecut=40:min-keyint=1" if scenes else f"scenecut=0:min-keyint={config.gop}"
        params = f"log-level=error:pools=none:frame-threads=1:bframes=0:open-gop=0:info=0:{cuts}"
        speed = {"preset": "veryfast", "forced-idr": 1, "crf": config.quality}
        return {"c:v": "libx265", **speed, "x265-params": params, "tag:v": "hvc1", **common}
    tune = {"tune": "fastdecode"} if config.profile == "fast-decode" else {}
    # veryfast saves processor time; its size and quality against medium: tools/bench/results/presets_cpu.json
    return {"c:v": "libx264", "preset": "veryfast", **tune, "crf": config.quality, **keys, **common}
