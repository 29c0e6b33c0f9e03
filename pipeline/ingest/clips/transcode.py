"""One sandboxed ffmpeg per source: one decode, one encode of all that is wanted, and small frames for the screens.

It writes `video.mp4`, from which the clips are copied packet by packet (probe_child.cut), `small.gray` (64x64, about
four a second, for scores and hashes) and, where scenes are looked for, `scenes.bgr` (48x32, every frame).
A clip: H.264, HEVC or VP9 in MP4, yuv420p 8-bit, limited range, constant frame rate from time 0, one stream, no
B-frames, closed GOPs with a keyframe at every clip's start, moov before mdat, no metadata. Bytes are
deterministic: one thread, bit-exact scaling and muxing.

Picture: deinterlaced where the source says so (bwdif, one frame per frame), turned as its display matrix says,
borders cropped where asked for, scaled by the one factor that covers the target box and centre-cropped to it (at
most 15 pixels of the longer side and 15 of the shorter are lost), pixels square. A picture that changes size in
mid-stream is fitted anew. Colour: see colour.py.

Only frames that a span needs are encoded. Where the first span begins far into an MP4 or Matroska file, decoding
begins a little before it; where that gives errors, it begins at the start.

Damage: strict. Whatever the decoder or demuxer reports at level `error` rejects the whole source with
DECODE_ERRORS and its first words: silent concealment would train on grey macroblocks. Output is capped at the
planned number of frames, so timestamps cannot expand a file.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import ffmpeg

from reelmae.pipeline.errors import ChildCrashedError, ChildTimeoutError, StorageFullError
from reelmae.pipeline.ingest import encoders
from reelmae.pipeline.ingest.clips.colour import Colour
from reelmae.pipeline.ingest.clips.cut import Span, place, runs
from reelmae.pipeline.ingest.clips.outcome import Rejected
from reelmae.pipeline.ingest.clips.probe import Probe
from reelmae.pipeline.ingest.clips.scores import SIDE
from reelmae.pipeline.ingest.clips.screen import Kept
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.ffmpeg import Tool
from reelmae.pipeline.ingest.sandbox import Limits, Sandbox, is_full
from reelmae.pipeline.schema import Reason

VIDEO, SMALL, SCENES = "video.mp4", "small.gray", "scenes.bgr"
SCENE_W, SCENE_H = 48, 32
SMALL_FPS = 4  # about
FAR_S = 20.0  # a first span that begins later is worth a seek
BEFORE_S = 2.0  # decoding begins this much before it, so that the grid of frames has settled
MAX_RUNS = 50  # stretches told to ffmpeg; with more, all between the first and the last is encoded
_BT601 = "range=tv:color_primaries=smpte170m:color_trc=smpte170m:colorspace=smpte170m"
_SCALER = "accurate_rnd+bitexact+full_chroma_int"


@dataclass(frozen=True)
class Plan:
    """What one ffmpeg is to do with a source. `encoder` "copy": nothing is encoded, only small frames are made."""

    kept: Kept
    colour: Colour
    spans: tuple[Span, ...]
    encoder: str
    scenes: bool = False

    @property
    def stretches(self) -> list[tuple[int, int]]:
        """The frames of the source that are encoded, one stretch after the other."""
        found = runs(self.spans)
        return found if len(found) <= MAX_RUNS else [(found[0][0], found[-1][1])]

    @property
    def frames(self) -> int:
        """How many they are."""
        return sum(end - start for start, end in self.stretches)

    @property
    def every(self) -> int:
        """Every how manieth of them has a small frame: four a second, more where a span would get fewer than four."""
        shortest = min(span.end - span.start for span in self.spans)
        return max(1, min(round(self.kept.fps / SMALL_FPS), shortest // 4))

    def placed(self, span: Span) -> tuple[int, int]:
        """[start, end) of a span among the encoded frames."""
        return place(span.start, self.stretches), place(span.end, self.stretches)


def main_filters(probe: Probe, plan: Plan, *, skipped: int = 0) -> str:
    """Filters from the decoder to the encoder. `skipped`: frames seeked over."""
    kept, colour = plan.kept, plan.colour
    W, H = kept.width, kept.height
    # of the picture as it comes (it may change in mid-stream), shown square: the factor that covers W x H
    cover = f"max({W}/(iw*sar)\\,{H}/ih)"
    even = "2*ceil(({0})/2-0.01)"
    scale = [
        f"scale=w='max({W}\\,{even.format(f'iw*sar*{cover}')})'",
        f"h='max({H}\\,{even.format(f'ih*{cover}')})'",
        f"flags=bicubic+{_SCALER}",
        *colour.scaler,
    ]
    chain = [
        "bwdif=mode=send_frame:deint=interlaced" if probe.interlaced else "",
        f"fps={kept.fps}" + (":start_time=0" if skipped else ""),
        _selected(plan, _first_pts(probe, plan, skipped)),
        "crop={2}:{3}:{0}:{1}:exact=1".format(*kept.crop) if kept.crop else "",
        colour.before,
        ":".join(scale),
        f"crop={W}:{H}",
        "setsar=1",
        colour.behind,
        "format=yuv420p",
        f"setparams={_BT601}",
    ]
    return ",".join(filter(None, chain))


def filters(probe: Probe, plan: Plan, *, skipped: int = 0) -> str:
    """The filter graph of one source: [video], [small] and, for scenes, [scenes]."""
    names = [*(("video",) if plan.encoder != "copy" else ()), "small", *(("scenes",) if plan.scenes else ())]
    main = f"[0:{probe.stream}]{main_filters(probe, plan, skipped=skipped)}"
    ends = {
        "small": f"framestep={plan.every},scale={SIDE}:{SIDE}:flags=area+{_SCALER}:out_range=pc,format=gray",
        "scenes": f"scale={SCENE_W}:{SCENE_H}:flags=area+{_SCALER},format=bgr24",
    }
    split = f",split={len(names)}" if len(names) > 1 else ""
    graph = [main + split + "".join(f"[{n}0]" if n in ends else f"[{n}]" for n in names)]
    return ";".join([*graph, *(f"[{n}0]{ends[n]}[{n}]" for n in names if n in ends)])


def _first_pts(probe: Probe, plan: Plan, skipped: int) -> int:
    """Time of frame 0 behind the fps filter, in frames: the video may begin after the file does, or have been seeked into.

    Frames are known by their times, not their numbers: where a picture changes its size, the filters begin anew.
    """
    return -skipped if skipped else round(Fraction(probe.start_s) * plan.kept.fps)


def _selected(plan: Plan, first: int) -> str:
    stretches = plan.stretches
    if stretches == [(0, plan.kept.frames)]:
        return ""
    asked = "+".join(f"between(pts\\,{first + start}\\,{first + end - 1})" for start, end in stretches)
    return f"select='{asked}'"


def seekable(probe: Probe, plan: Plan) -> int:
    """Frames that may be seeked over: 0 unless the first span is far into a file whose times begin with its frames."""
    first = plan.stretches[0][0]
    if first < FAR_S * plan.kept.fps or probe.container not in ("mov", "matroska"):
        return 0
    if abs(probe.start_s) * plan.kept.fps > Fraction(1, 2) or probe.seen != probe.packets:
        return 0
    return first - math.ceil(BEFORE_S * plan.kept.fps)


def command(tool: Tool, source: Path, probe: Probe, plan: Plan, config: ShardConfig, *, skipped: int = 0) -> list[str]:
    """The argument list; it writes VIDEO, SMALL and SCENES into the working folder."""
    name = probe.container
    inputs: dict[str, Any] = {
        "f": name,
        "threads": 1,
        "protocol_whitelist": "file,pipe",
        "format_whitelist": name,
        "max_streams": 64,
        "max_pixels": config.max_pixels,
        **({"ss": f"{float(skipped / plan.kept.fps):.6f}"} if skipped else {}),
    }
    # frames are numbered: whatever the source's times did, the clips' are constant and begin at 0
    numbered = "setts=pts=N:dts=N:duration=1"
    video: dict[str, Any] = {
        "map": "[video]",
        "map_metadata": -1,
        "map_chapters": -1,
        "fps_mode": "passthrough",
        "frames:v": plan.frames,
        "bsf:v": numbered,
        "flags:v": "+bitexact+cgop",
        "fflags": "+bitexact",
        **encoders.options(config, plan.encoder, scenes=plan.scenes),
        **_forced(plan, config, _first_pts(probe, plan, skipped)),
    }
    raw: dict[str, Any] = {"f": "rawvideo", "fps_mode": "passthrough", "bsf:v": numbered}
    given = ffmpeg.input(f"file:{source}", **inputs)
    small = {**raw, "map": "[small]", "frames:v": -(-plan.frames // plan.every)}
    outputs = [ffmpeg.output(given, SMALL, **small)]
    if plan.encoder != "copy":
        outputs.insert(0, ffmpeg.output(given, VIDEO, **video))
    if plan.scenes:
        outputs.append(ffmpeg.output(given, SCENES, **raw, **{"map": "[scenes]", "frames:v": plan.frames}))
    graph = filters(probe, plan, skipped=skipped)
    stream = ffmpeg.merge_outputs(*outputs).global_args(
        "-nostdin", "-hide_banner", "-v", "error", "-filter_complex_threads", "1", "-filter_complex", graph
    )
    return stream.compile(cmd=tool.path)


def _forced(plan: Plan, config: ShardConfig, first: int) -> dict[str, Any]:
    """Keyframes at the starts of clips: by rule for windows of one length, else by their times."""
    if plan.scenes:
        return {}
    starts = sorted({span.start for span in plan.spans})
    step = starts[1] - starts[0] if len(starts) > 1 else 0
    if not step:
        return {}
    if starts == list(range(0, starts[-1] + 1, step)):
        last = starts[-1]
        if plan.encoder == "vpx":  # it counts on through a forced keyframe: place them all
            rule = f"not(mod(if(lt(n,{last}),mod(n,{step}),n-{last}),{config.gop}))"
            return {"force_key_frames": f"expr:{rule}", "g": 9999}
        return {"force_key_frames": f"expr:not(mod(n,{step}))*lte(n,{last})"}
    half = Fraction(1, 2) / plan.kept.fps  # a keyframe comes with the first frame at or after its time
    return {"force_key_frames": ",".join(f"{float((first + n) / plan.kept.fps - half):.5f}" for n in starts[1:])}


def transcode(
    sandbox: Sandbox, tool: Tool, source: Path, folder: Path, probe: Probe, plan: Plan, config: ShardConfig
) -> Rejected | None:
    """Write VIDEO, SMALL and SCENES into an empty `folder`; why there are none. StorageFullError on a full disk.

    The video may hold fewer frames than were planned, where the decoder gives fewer than the packets promise.
    """
    skipped = seekable(probe, plan)
    given = _run(sandbox, command(tool, source, probe, plan, config, skipped=skipped), folder, probe, plan)
    if given is not None and skipped:
        for left in folder.iterdir():
            left.unlink()
        given = _run(sandbox, command(tool, source, probe, plan, config), folder, probe, plan)
    return given


def _run(sandbox: Sandbox, argv: list[str], folder: Path, probe: Probe, plan: Plan) -> Rejected | None:
    seconds = int(300 + 20 * probe.duration_s)
    memory = {"memory_bytes": encoders.NVENC_BYTES} if plan.encoder == "nvenc" else {}
    try:
        done = sandbox.run(argv, limits=Limits(wall_s=seconds, cpu_s=seconds, **memory), cwd=folder)
    except ChildTimeoutError as e:
        return Rejected(Reason.TIMEOUT, f"ffmpeg {e}")
    except ChildCrashedError as e:
        if is_full(e.stderr):
            raise _full(folder) from e
        return Rejected(Reason.CRASHED, f"ffmpeg {e}")
    words = _words(done.stderr)
    if is_full(done.stderr):
        raise _full(folder)
    if re.search(r"Decoder \S+ not found|no decoder|Decoding requested, but no decoder", words, re.IGNORECASE):
        return Rejected(Reason.UNSUPPORTED_CODEC, words)
    if done.returncode or done.stderr_lines:
        return Rejected(Reason.DECODE_ERRORS, f"{_count(done.stderr_lines, 'line')} of errors: {words}")
    if not (folder / SMALL).is_file() or not (folder / SMALL).stat().st_size:
        return Rejected(Reason.NO_FRAMES, "ffmpeg wrote no picture and no word")
    return None


def _count(n: int, word: str) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def _full(folder: Path) -> StorageFullError:
    return StorageFullError(
        f"{folder.parent}: no space left for temporary files; free some, or set TMPDIR, and run again"
    )


def _words(stderr: str) -> str:
    """The first lines, without addresses and the names of our own files."""
    text = re.sub(r" @ 0x[0-9a-f]+", "", stderr)
    text = re.sub(r"file:/\S*", "<file>", text)
    return " | ".join(line.strip() for line in text.splitlines()[:3])[:400]
