"""One sandboxed ffmpeg per source: one decode, one encode of all wanted frames, and small frames for the screens.

It writes up to three files. VIDEO: the clips are later copied out of it, packet by packet (probe_child.cut_clips).
SMALL: grey frames of 64x64, about four a second, for scores and hashes. SCENES, for cutting at scenes: every frame,
in colour, at 48x32.

A clip is H.264, HEVC or VP9 in MP4: yuv420p 8-bit, limited range, constant frame rate from time 0, one stream, no
B-frames, closed GOPs with a keyframe at every clip's start, moov before mdat, no metadata. Its bytes are
deterministic: one thread, bit-exact scaling and muxing.

Picture: deinterlaced if the source is interlaced (bwdif, one frame per frame), turned by its display matrix, cropped
to what is inside its borders if asked for, scaled by the one factor that covers the target box, and centre-cropped to
that box (at most 15 pixels of each side are lost). Pixels are square. A picture that changes its size in mid-stream is
fitted anew. Colour: see colour.py.

Only the frames that a span needs are encoded. If the first span begins far into an MP4 or Matroska file, decoding
begins a little before it; if that gives errors, it is done again from the start.

Damage: any message of the decoder or demuxer at level `error` rejects the whole source with DECODE_ERRORS and the first
messages. A decoder that conceals damage would give grey macroblocks to train on. Output is capped at the planned number
of frames, so timestamps cannot expand a file.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import ffmpeg

from reelmae.pipeline.errors import ChildCrashedError, ChildKilledError, ChildTimeoutError, StorageFullError
from reelmae.pipeline.ingest import encoders
from reelmae.pipeline.ingest.clips.colour import Colour
from reelmae.pipeline.ingest.clips.cut import Span, locate_frame, merge_spans
from reelmae.pipeline.ingest.clips.outcome import Rejected
from reelmae.pipeline.ingest.clips.probe import Probe
from reelmae.pipeline.ingest.clips.scenes import SCENE_H, SCENE_W
from reelmae.pipeline.ingest.clips.scores import SIDE
from reelmae.pipeline.ingest.clips.screen import Kept, source_rate
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.ffmpeg import Tool
from reelmae.pipeline.ingest.sandbox import Limits, Sandbox, is_full
from reelmae.pipeline.schema import Reason

VIDEO, SMALL, SCENES = "video.mp4", "small.gray", "scenes.bgr"
SMALL_FPS = 4  # small frames a second, about
FAR_S = 20.0  # if the first span begins later than this, the file is opened at a later place
BEFORE_S = 2.0  # decoding begins this long before the first span, so that the grid of frames has settled
MAX_STRETCHES = 50  # in ffmpeg's command line; with more, all between the first and the last frame is encoded
_BT601 = "range=tv:color_primaries=smpte170m:color_trc=smpte170m:colorspace=smpte170m"
_BY_SIGNAL = 255  # ffmpeg's exit status when it ends for SIGTERM, which it catches; and for EPERM
_EPERM = "Operation not permitted"
_SCALER = "accurate_rnd+bitexact+full_chroma_int"


@dataclass(frozen=True)
class EncodePlan:
    """What ffmpeg has to do with one source."""

    kept: Kept
    colour: Colour
    spans: tuple[Span, ...]
    encoder: str
    """A name of encoders.py; "copy": nothing is encoded, only small frames are made."""
    scenes: bool = False
    """The clips are scenes: they are found after the encoding, in its small colour frames."""

    @property
    def copies(self) -> bool:
        """Whether the clips are copied out of the source without encoding."""
        return self.encoder == "copy"

    @property
    def stretches(self) -> list[tuple[int, int]]:
        """The frames of the source that are encoded, one stretch after the other."""
        found = merge_spans(self.spans)
        return found if len(found) <= MAX_STRETCHES else [(found[0][0], found[-1][1])]

    @property
    def frames(self) -> int:
        """Number of encoded frames."""
        return sum(end - start for start, end in self.stretches)

    @property
    def small_stride(self) -> int:
        """Stride of the small frames: about four a second, and at least four in the shortest span if it has as many."""
        shortest = min(span.end - span.start for span in self.spans)
        return max(1, min(round(self.kept.fps / SMALL_FPS), shortest // 4))

    def locate(self, span: Span) -> tuple[int, int]:
        """[start, end) of a span among the encoded frames."""
        return locate_frame(span.start, self.stretches), locate_frame(span.end, self.stretches)


def can_copy(probe: Probe, plan: EncodePlan) -> bool:
    """Whether the source's packets already are what a clip's packets must be."""
    kept = plan.kept
    return (
        (probe.container, probe.codec, probe.pix_fmt, probe.video_streams) == ("mov", "h264", "yuv420p", 1)
        and (probe.width, probe.height) == (kept.width, kept.height)
        and (probe.sar, probe.rotation, probe.interlaced, kept.crop) == (1.0, 0, False, None)
        and (probe.steady, probe.reordered, plan.colour.rule) == (True, False, "none")
        and probe.seen == probe.packets
        and kept.fps == source_rate(probe)
        and abs(probe.start_s) * kept.fps < 1 / 2
    )


def main_filters(probe: Probe, plan: EncodePlan, *, skipped: int = 0) -> str:
    """Filters from the decoder to the encoder. `skipped`: frames of the source that are not decoded."""
    kept, colour = plan.kept, plan.colour
    W, H = kept.width, kept.height
    # the factor by which the picture, shown with square pixels, covers W x H; its size may change in mid-stream
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
        _select_filter(plan, _first_pts(probe, plan, skipped)),
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


def filters(probe: Probe, plan: EncodePlan, *, skipped: int = 0) -> str:
    """The filter graph of one source: [video], [small] and, for scenes, [scenes]."""
    names = ["small"]
    if not plan.copies:
        names.insert(0, "video")
    if plan.scenes:
        names.append("scenes")
    main = f"[0:{probe.stream}]{main_filters(probe, plan, skipped=skipped)}"
    ends = {
        "small": f"framestep={plan.small_stride},scale={SIDE}:{SIDE}:flags=area+{_SCALER}:out_range=pc,format=gray",
        "scenes": f"scale={SCENE_W}:{SCENE_H}:flags=area+{_SCALER},format=bgr24",
    }
    split = f",split={len(names)}" if len(names) > 1 else ""
    graph = [main + split + "".join(f"[{n}0]" if n in ends else f"[{n}]" for n in names)]
    return ";".join([*graph, *(f"[{n}0]{ends[n]}[{n}]" for n in names if n in ends)])


def _first_pts(probe: Probe, plan: EncodePlan, skipped: int) -> int:
    """Time of frame 0 after the fps filter, in frames. It is not 0 if the video begins after the file, or after a seek.

    Filters name frames by their times, not their numbers: when a picture changes its size, the numbers begin anew.
    """
    return -skipped if skipped else round(Fraction(probe.start_s) * plan.kept.fps)


def _select_filter(plan: EncodePlan, first: int) -> str:
    """The filter that lets only the frames to be encoded through; "" if that is all of them."""
    stretches = plan.stretches
    if stretches == [(0, plan.kept.frames)]:
        return ""
    wanted = "+".join(f"between(pts\\,{first + start}\\,{first + end - 1})" for start, end in stretches)
    return f"select='{wanted}'"


def frames_to_skip(probe: Probe, plan: EncodePlan) -> int:
    """Frames before the first span that need no decoding.

    0 unless the span begins far into an MP4 or Matroska file whose video begins with the file.
    """
    first = plan.stretches[0][0]
    if first < FAR_S * plan.kept.fps or probe.container not in ("mov", "matroska"):
        return 0
    if abs(probe.start_s) * plan.kept.fps > Fraction(1, 2) or probe.seen != probe.packets:
        return 0
    return first - math.ceil(BEFORE_S * plan.kept.fps)


def command(
    tool: Tool, source: Path, probe: Probe, plan: EncodePlan, config: ShardConfig, *, skipped: int = 0
) -> list[str]:
    """ffmpeg's argument list. It writes VIDEO, SMALL and SCENES into the working folder."""
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
    # each frame's time is its number: a clip's times are constant and begin at 0, whatever the source's were
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
        **_keyframe_options(plan, config, _first_pts(probe, plan, skipped)),
    }
    raw: dict[str, Any] = {"f": "rawvideo", "fps_mode": "passthrough", "bsf:v": numbered}
    given = ffmpeg.input(f"file:{source}", **inputs)
    small = {**raw, "map": "[small]", "frames:v": -(-plan.frames // plan.small_stride)}
    outputs = [ffmpeg.output(given, SMALL, **small)]
    if not plan.copies:
        outputs.insert(0, ffmpeg.output(given, VIDEO, **video))
    if plan.scenes:
        outputs.append(ffmpeg.output(given, SCENES, **raw, **{"map": "[scenes]", "frames:v": plan.frames}))
    graph = filters(probe, plan, skipped=skipped)
    stream = ffmpeg.merge_outputs(*outputs).global_args(
        "-nostdin", "-hide_banner", "-v", "error", "-filter_complex_threads", "1", "-filter_complex", graph
    )
    return stream.compile(cmd=tool.path)


def _keyframe_options(plan: EncodePlan, config: ShardConfig, first: int) -> dict[str, Any]:
    """Keyframes at the starts of clips: by a rule for windows of one length, else by a list of times."""
    if plan.scenes:
        return {}
    starts = sorted({span.start for span in plan.spans})
    step = starts[1] - starts[0] if len(starts) > 1 else 0
    if not step:
        return {}
    if starts == list(range(0, starts[-1] + 1, step)):
        last = starts[-1]
        if plan.encoder == "vpx":  # libvpx does not restart its GOP at a forced keyframe: force every one
            rule = f"not(mod(if(lt(n,{last}),mod(n,{step}),n-{last}),{config.gop}))"
            return {"force_key_frames": f"expr:{rule}", "g": 9999}
        return {"force_key_frames": f"expr:not(mod(n,{step}))*lte(n,{last})"}
    half = Fraction(1, 2) / plan.kept.fps  # ffmpeg forces the first frame at or after a time
    return {"force_key_frames": ",".join(f"{float((first + n) / plan.kept.fps - half):.5f}" for n in starts[1:])}


def transcode(
    sandbox: Sandbox, tool: Tool, source: Path, folder: Path, probe: Probe, plan: EncodePlan, config: ShardConfig
) -> Rejected | None:
    """Write VIDEO, SMALL and SCENES into an empty `folder`; or return why not.

    StorageFullError on a full disk, ChildKilledError where somebody else killed ffmpeg. The video may hold fewer frames than planned: the decoder may give fewer than there are packets.
    """
    skipped = frames_to_skip(probe, plan)
    failure = _run_ffmpeg(sandbox, command(tool, source, probe, plan, config, skipped=skipped), folder, probe, plan)
    if failure is not None and skipped:
        for left in folder.iterdir():
            left.unlink()
        failure = _run_ffmpeg(sandbox, command(tool, source, probe, plan, config), folder, probe, plan)
    return failure


def _run_ffmpeg(sandbox: Sandbox, argv: list[str], folder: Path, probe: Probe, plan: EncodePlan) -> Rejected | None:
    seconds = int(300 + 20 * probe.duration_s)
    memory = {"memory_bytes": encoders.NVENC_BYTES} if plan.encoder == "nvenc" else {}
    try:
        done = sandbox.run(argv, limits=Limits(wall_s=seconds, cpu_s=seconds, **memory), cwd=folder)
    except ChildTimeoutError as e:
        return Rejected(Reason.TIMEOUT, f"ffmpeg {e}")
    except ChildCrashedError as e:
        if is_full(e.stderr):
            raise _disk_full(folder) from e
        if isinstance(e, ChildKilledError):
            raise
        return Rejected(Reason.CRASHED, f"ffmpeg {e}")
    words = _first_lines(done.stderr)
    if is_full(done.stderr):
        raise _disk_full(folder)
    if re.search(r"Decoder \S+ not found|no decoder|Decoding requested, but no decoder", words, re.IGNORECASE):
        return Rejected(Reason.UNSUPPORTED_CODEC, words)
    if done.returncode == _BY_SIGNAL and _EPERM not in done.stderr:  # whatever it said: its reading was cut short
        raise ChildKilledError("ffmpeg ended by SIGTERM", returncode=done.returncode, stderr=done.stderr)
    if done.returncode or done.stderr_lines:
        return Rejected(Reason.DECODE_ERRORS, f"{_count(done.stderr_lines, 'line')} of errors: {words}")
    if not (folder / SMALL).is_file() or not (folder / SMALL).stat().st_size:
        return Rejected(Reason.NO_FRAMES, "ffmpeg wrote no picture and no word")
    return None


def _count(n: int, word: str) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def _disk_full(folder: Path) -> StorageFullError:
    return StorageFullError(
        f"{folder.parent}: no space left for temporary files; free some, or set TMPDIR, and run again"
    )


def _first_lines(stderr: str) -> str:
    """The first three lines, without addresses and the names of our own files."""
    text = re.sub(r" @ 0x[0-9a-f]+", "", stderr)
    text = re.sub(r"file:/\S*", "<file>", text)
    return " | ".join(line.strip() for line in text.splitlines()[:3])[:400]
