"""One sandboxed ffmpeg per source: one decode, one encode, all its clips cut by the segment muxer.

A clip: H.264 (or VP9) in MP4, yuv420p 8-bit, limited range, constant frame rate from time 0, one stream, no
B-frames, closed GOPs with a keyframe at every clip's start and every `gop` frames after, moov before mdat, no
metadata. Bytes are deterministic: one thread, bit-exact scaling and muxing.

Picture: deinterlaced where the source says so (bwdif, one frame per frame), turned as its display matrix says,
scaled by the one factor that covers the target box and centre-cropped to it (at most 15 pixels of the longer
side and 15 of the shorter are lost), pixels square. A picture that changes size in mid-stream is fitted anew.
Colour: converted to the BT.601 matrix (a source that names none is taken as BT.709 where it is more than 576
lines high, else as BT.601), full range to limited, tagged smpte170m. Primaries of SDR sources are not converted
(BT.709 against SMPTE 170M: a few levels at most). PQ and HLG are tone-mapped (Hable, after scaling) where the
binary has zscale and tonemap; alpha is flattened on black.

Damage: strict. Whatever the decoder or demuxer reports at level `error` rejects the whole source with
DECODE_ERRORS and its first words: silent concealment would train on grey macroblocks. Fewer than 90 % of the
frames its packets promise: TRUNCATED. Output is capped at the planned number of frames, so timestamps cannot
expand a file.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ffmpeg
import imageio_ffmpeg

from reelmae.pipeline.errors import ChildCrashedError, ChildTimeoutError, ConfigError, StorageFullError
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.probe import Probe
from reelmae.pipeline.ingest.sandbox import Limits, Sandbox, is_full
from reelmae.pipeline.ingest.screen import Kept, Rejected
from reelmae.pipeline.schema import Reason

ENOUGH = 0.9
_HDR = {16: "smpte2084", 18: "arib-std-b67"}  # ffmpeg's numbers of PQ and HLG
_MATRIX = {1: "bt709", 4: "fcc", 5: "bt470bg", 6: "smpte170m", 7: "smpte240m", 9: "bt2020nc", 10: "bt2020nc"}
_BT601 = "range=tv:color_primaries=smpte170m:color_trc=smpte170m:colorspace=smpte170m"
_ALPHA = re.compile(r"^(yuva|rgba|bgra|argb|abgr|gbrap|ya\d|pal8|ayuv|vuya)")


@dataclass(frozen=True)
class Tool:
    """The ffmpeg in use: its path, its version line, and whether it can tone-map."""

    path: str
    version: str
    tonemaps: bool


@functools.cache
def find_ffmpeg() -> Tool:
    """REELMAE_FFMPEG, else imageio-ffmpeg's binary; ConfigError where it does not run."""
    path = os.environ.get("REELMAE_FFMPEG") or imageio_ffmpeg.get_ffmpeg_exe()
    found = shutil.which(path)
    if found is None:
        raise ConfigError(
            f"REELMAE_FFMPEG={path}: no such program; unset it to use the one that came with reelmae"
        )
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


def filters(probe: Probe, kept: Kept, *, tonemaps: bool) -> str:
    """The filter chain of one source, for ffmpeg's -vf."""
    W, H = kept.width, kept.height
    # of the picture as it comes (it may change in mid-stream), shown square: the factor that covers W x H
    cover = f"max({W}/(iw*sar)\\,{H}/ih)"
    even = "2*ceil(({0})/2-0.01)"
    matrix = _MATRIX.get(probe.colorspace) or (
        "bt709" if min(probe.width, probe.height) > 576 else "smpte170m"
    )
    hdr = _HDR.get(probe.color_trc) if tonemaps else None
    scale = [
        f"scale=w='max({W}\\,{even.format(f'iw*sar*{cover}')})'",
        f"h='max({H}\\,{even.format(f'ih*{cover}')})'",
        "flags=bicubic+accurate_rnd+bitexact+full_chroma_int",
        f"in_color_matrix={matrix}",
        *(() if hdr else ("out_color_matrix=smpte170m", "out_range=tv")),
    ]
    chain = [
        "bwdif=mode=send_frame:deint=interlaced" if probe.interlaced else "",
        f"fps={kept.fps}",
        # a picture on nothing: black
        "format=gbrap,premultiply=inplace=1,format=gbrp" if _ALPHA.match(probe.pix_fmt) else "",
        # primaries and curve are kept as they are; but the scaler refuses values nobody defined
        "" if hdr else "setparams=color_primaries=bt709:color_trc=bt709",
        ":".join(scale),
        f"crop={W}:{H}",
        "setsar=1",
        _tonemapped(hdr, probe) if hdr else "",
        "format=yuv420p",
        f"setparams={_BT601}",
    ]
    return ",".join(step for step in chain if step)


def _tonemapped(transfer: str, probe: Probe) -> str:
    range_ = "full" if probe.color_range == 2 else "limited"
    return (
        f"zscale=tin={transfer}:min=2020_ncl:pin=2020:rin={range_}:t=linear:npl=100,format=gbrpf32le,"
        "zscale=p=bt709,tonemap=tonemap=hable:desat=0,zscale=t=bt709:m=170m:r=limited"
    )


def encoder(config: ShardConfig, *, cuts: bool) -> dict[str, Any]:
    """ffmpeg's options of the profile; `cuts`: whether there is more than one clip."""
    common: dict[str, Any] = {
        "g": config.gop,
        "keyint_min": config.gop,
        "crf": config.quality,
        "pix_fmt": "yuv420p",
    }
    if config.profile == "vp9":
        # no hidden reference frames: each packet is one picture, as CPU decoders of the loaders expect
        vp9 = {
            "auto-alt-ref": 0,
            "lag-in-frames": 0,
            "deadline": "good",
            "cpu-used": 4,
            "row-mt": 0,
            "b:v": 0,
        }
        return {
            "c:v": "libvpx-vp9",
            **common,
            **vp9,
            "tag:v": "vp09",
            **({"g": 9999, "keyint_min": 0} if cuts else {}),
        }
    tune = {"tune": "fastdecode"} if config.profile == "fast-decode" else {}
    # veryfast for the processor's sake; what it costs against medium in bytes and quality is yet to be measured
    return {"c:v": "libx264", "preset": "veryfast", **tune, **common, "bf": 0, "sc_threshold": 0}


def command(
    tool: Tool, source: Path, probe: Probe, kept: Kept, spans: Sequence[tuple[int, int]], config: ShardConfig
) -> list[str]:
    """The argument list; clips are written to the working folder as 00000.mp4, 00001.mp4, …

    All spans but the last have one length (see cut.py).
    """
    name = probe.container
    inputs: dict[str, Any] = {
        "f": name,
        "threads": 1,
        "protocol_whitelist": "file,pipe",
        "format_whitelist": name,
        "max_streams": 64,
        "max_pixels": config.max_pixels,
    }
    cuts = [start for start, _ in spans[1:]]
    segment: dict[str, Any] = {
        "f": "segment",
        "reset_timestamps": 1,
        "segment_format": "mp4",
        "segment_format_options": "movflags=+faststart",
        # with no cut to make, one that never comes: else segments of two seconds are the default
        "segment_frames": ",".join(map(str, cuts)) or str(kept.frames + 1),
    }
    if cuts:
        segment["force_key_frames"] = f"expr:not(mod(n,{cuts[0]}))*lte(n,{cuts[-1]})"
    if cuts and config.profile == "vp9":  # libvpx counts on through a forced keyframe: place them all
        last, gop = cuts[-1], config.gop
        segment["force_key_frames"] = f"expr:not(mod(if(lt(n,{last}),mod(n,{cuts[0]}),n-{last}),{gop}))"
    outputs: dict[str, Any] = {
        "map": f"0:{probe.stream}",
        "map_metadata": -1,
        "map_chapters": -1,
        "vf": filters(probe, kept, tonemaps=tool.tonemaps),
        "fps_mode": "passthrough",
        "frames:v": spans[-1][1],
        # frames are numbered: whatever the source's times did, the clips' are constant and begin at 0
        "bsf:v": "setts=pts=N:dts=N:duration=1",
        "threads": 1,
        "flags:v": "+bitexact+cgop",
        "fflags": "+bitexact",
        **encoder(config, cuts=bool(cuts)),
        **segment,
    }
    stream = ffmpeg.output(ffmpeg.input(f"file:{source}", **inputs), "%05d.mp4", **outputs)
    stream = stream.global_args(
        "-nostdin", "-hide_banner", "-v", "error", "-filter_threads", "1", "-an", "-sn", "-dn"
    )
    return stream.compile(cmd=tool.path)


def transcode(
    sandbox: Sandbox,
    tool: Tool,
    source: Path,
    folder: Path,
    probe: Probe,
    kept: Kept,
    spans: Sequence[tuple[int, int]],
    config: ShardConfig,
) -> list[Path] | Rejected:
    """Encode the spans into an empty `folder`; the clips in order, or why there are none.

    The last clips may be shorter or missing where the decoder gives fewer frames than the packets promise;
    the caller counts. StorageFullError where the disk is full.
    """
    argv = command(tool, source, probe, kept, spans, config)
    seconds = int(300 + 20 * probe.duration_s)
    try:
        done = sandbox.run(argv, limits=Limits(wall_s=seconds, cpu_s=seconds), cwd=folder)
    except ChildTimeoutError as e:
        return Rejected(Reason.TIMEOUT, f"ffmpeg {e}")
    except ChildCrashedError as e:
        if is_full(e.stderr):
            raise _full(folder) from e
        return Rejected(Reason.CRASHED, f"ffmpeg {e}")
    words = _words(done.stderr)
    if is_full(done.stderr):
        raise _full(folder)
    if re.search(
        r"Decoder \S+ not found|no decoder|Decoding requested, but no decoder", words, re.IGNORECASE
    ):
        return Rejected(Reason.UNSUPPORTED_CODEC, words)
    if done.returncode or done.stderr_lines:
        return Rejected(Reason.DECODE_ERRORS, f"{done.stderr_lines} lines of errors: {words}")
    clips = sorted(folder.glob("*.mp4"))
    return clips or Rejected(Reason.NO_FRAMES, "ffmpeg wrote no picture and no word")


def _full(folder: Path) -> StorageFullError:
    return StorageFullError(
        f"{folder.parent}: no space left for temporary files; free some, or set TMPDIR, and run again"
    )


def _words(stderr: str) -> str:
    """The first lines, without addresses and the names of our own files."""
    text = re.sub(r" @ 0x[0-9a-f]+", "", stderr)
    text = re.sub(r"file:/\S*", "<file>", text)
    return " | ".join(line.strip() for line in text.splitlines()[:3])[:400]
