"""`reelmae bench presets SRC`: x264's presets compared at the settings of a training clip.

The first FRAMES frames of each usable video at SRC are decoded and scaled once, to a lossless file. Each preset encodes
those files. Measured are processor seconds of encoding (minus those of reading the lossless files), bytes, processor
seconds of decoding by ffmpeg, and mean SSIM against the lossless frames. One process with one thread at a time.
"""

from __future__ import annotations

import re
import resource
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from reelmae.pipeline.errors import InputError, ReelmaeError
from reelmae.pipeline.ingest import encoders
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.ffmpeg import find_ffmpeg
from reelmae.pipeline.storage.store import Store
from reelmae.tools.bench.config import BenchPresetsConfig
from reelmae.tools.machine import machine, versions

PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium")
FRAMES = 200


def bench_presets(config: BenchPresetsConfig) -> dict[str, Any]:
    """Measure; raises InputError if no video at SRC, a local folder, can be decoded."""
    settings = ShardConfig()
    with tempfile.TemporaryDirectory(prefix="reelmae-bench-") as folder:
        lossless = list(_lossless(Path(Store(config.src).root), Path(folder), settings.short_side))
        if not lossless:
            raise InputError(f"{config.src}: holds no video that can be decoded; give a local folder of videos")
        reading = sum(_seconds(["-i", str(f), "-f", "null", "-"]) for f in lossless)
        rows = [_preset(preset, lossless, settings, reading) for preset in PRESETS]
    return {
        "presets": rows,
        "videos": len(lossless),
        "crf": settings.quality,
        "gop": settings.gop,
        "short_side": settings.short_side,
        "frames_at_most": FRAMES,
        "ffmpeg": find_ffmpeg().version,
        "machine": machine(),
        "versions": versions(),
    }


def _lossless(src: Path, folder: Path, short_side: int) -> Any:
    scale = f"scale=w='if(gt(iw,ih),-16,{short_side})':h='if(gt(iw,ih),{short_side},-16)':flags=bicubic"
    for number, path in enumerate(sorted(p for p in src.rglob("*") if p.is_file())):
        out = folder / f"{number}.mkv"
        options = ["-frames:v", str(FRAMES), "-an", "-pix_fmt", "yuv420p", "-c:v", "ffv1", str(out)]
        argv = [find_ffmpeg().path, "-nostdin", "-v", "error", "-i", f"file:{path}", "-vf", scale, *options]
        if subprocess.run(argv, capture_output=True).returncode == 0:
            yield out


def _preset(preset: str, lossless: list[Path], settings: ShardConfig, reading: float) -> dict[str, Any]:
    options = encoders.options(settings, "x264", scenes=False) | {"preset": preset}
    words = [word for name, value in options.items() for word in (f"-{name}", str(value))]
    encoding = decoding = similarity = 0.0
    size = 0
    for source in lossless:
        out = source.with_suffix(f".{preset}.mp4")
        encoding += _seconds(["-i", str(source), *words, str(out)])
        decoding += _seconds(["-threads", "1", "-i", str(out), "-f", "null", "-"])
        size += out.stat().st_size
        said = _run(["-i", str(out), "-i", str(source), "-lavfi", "ssim", "-f", "null", "-"], level="info")
        similarity += float(re.findall(r"All:([\d.]+)", said)[-1])
        out.unlink()
    return {
        "preset": preset,
        "encode_cpu_s": round(encoding - reading, 3),
        "bytes": size,
        "decode_cpu_s": round(decoding, 3),
        "ssim": round(similarity / len(lossless), 5),
    }


def _seconds(words: list[str]) -> float:
    """Processor seconds of one ffmpeg process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    _run(words)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _run(words: list[str], level: str = "error") -> str:
    done = subprocess.run(
        [find_ffmpeg().path, "-nostdin", "-hide_banner", "-v", level, *words],
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode:
        raise ReelmaeError(f"ffmpeg {' '.join(words[:4])} …: {done.stderr.strip()[-300:]}")
    return done.stderr
