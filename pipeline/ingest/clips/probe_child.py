"""The child that reads foreign video with PyAV: one JSON line in, one JSON line out, until stdin closes.

Run by path under the sandbox (`python -I probe_child.py`), so it imports PyAV and the standard library only.

Questions, in the order in which a source meets them, and the functions that answer:

    {"op": "probe", "path", "max_pixels"}               of a source             probe
    {"op": "borders", "path", "container", "stream"}    of a source             find_borders
    {"op": "keys", "path"}                              of an encoded file      list_keyframes
    {"op": "cut", "path", "clips", "rate"}              of an encoded file      cut_clips
    {"op": "verify", "paths"}                           of finished clips       verify_clip, each

If a source is at fault, the answer is {"reject": [reason, detail]}.

A container is recognised by its first bytes, never by a name. Only the one demuxer that belongs to those bytes may
open the file: playlists and scripts that name other files are text here, and text is no video.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.error
import av.logging

_MOV_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp", b"moof", b"sidx")
_STARTS = (
    ("matroska", b"\x1aE\xdf\xa3"),
    ("flv", b"FLV"),
    ("asf", bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")),
    ("ogg", b"OggS"),
    ("gif", b"GIF87a"),
    ("gif", b"GIF89a"),
    ("mxf", bytes.fromhex("060e2b34020501010d010201")),
    ("mpeg", b"\x00\x00\x01\xba"),
    ("mpegvideo", b"\x00\x00\x01\xb3"),
)
_SCHEME = re.compile(rb"sinf.{4}frma.{8}schm.{4}(cenc|cens|cbc1|cbcs)", re.DOTALL)
_STILL = (
    ("a JPEG", b"\xff\xd8\xff"),
    ("a PNG", b"\x89PNG"),
    ("an AppleDouble file", b"\x00\x05\x16\x07"),
    ("a ZIP", b"PK\x03\x04"),
)
MAX_PACKETS = 20_000_000  # a source with more is TOO_LONG
BORDER_PICTURES = 8  # keyframes that are searched for black borders
OPEN_CLIPS = 32  # clips that are written at the same time
BLACK = 32  # coded luma, of 255: black bars are 16, a little more after hard compression


def main() -> None:
    """Answer until stdin closes. Whatever a library prints to stdout goes to stderr, never into an answer."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    av.logging.set_level(av.logging.ERROR)
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")
        answers.flush()


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """The answer to one question."""
    if question["op"] == "probe":
        return probe(question["path"], question["max_pixels"])
    if question["op"] == "borders":
        return find_borders(question["path"], question["container"], question["stream"])
    if question["op"] == "keys":
        return list_keyframes(question["path"])
    if question["op"] == "cut":
        return cut_clips(question["path"], question["clips"], question["rate"])
    return {"clips": [verify_clip(path) for path in question["paths"]]}


# --- probe: facts of one source


def probe(path: str, max_pixels: int) -> dict[str, Any]:
    """Facts of one file: the header's, the first picture's, and those of all packets of its video stream."""
    with Path(path).open("rb") as f:
        head = f.read(4096)
    if not head:
        return {"reject": ["empty_file", "0 bytes"]}
    name = container_of(head)
    if name is None:
        return {"reject": ["not_a_video", _describe_bytes(head)]}
    encrypted = name == "mov" and _is_encrypted(path)
    try:
        container = av.open(f"file:{path}", format=name, container_options=_options(name), metadata_errors="replace")
    except (av.error.FFmpegError, ValueError, OSError) as e:
        return {"reject": ["encrypted" if encrypted else "unreadable", f"{name}: {_describe_error(e)}"]}
    with container:
        if encrypted:
            return {"reject": ["encrypted", "the container names a common-encryption scheme"]}
        streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not streams:
            kinds = ", ".join(s.type for s in container.streams) or "none"
            return {"reject": ["no_video_stream", f"{name}; streams: {kinds}"]}
        return _read_facts(container, streams[0], name, max_pixels)


def container_of(head: bytes) -> str | None:
    """Name of the demuxer for a file that begins with these (at least 1024) bytes; None if it is no video we take."""
    if head[4:8] in _MOV_BOXES:
        return "mov"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    for name, start in _STARTS:
        if head.startswith(start):
            return name
    for packet, first in ((188, 0), (192, 4), (204, 0)):
        syncs = head[first::packet][:5]
        if len(syncs) >= 4 and set(syncs) == {0x47}:
            return "mpegts"
    return None


def _describe_bytes(head: bytes) -> str:
    for name, magic in _STILL:
        if head.startswith(magic):
            return f"begins like {name}"
    text = head[:60]
    if all(b >= 32 or b in b"\t\r\n" for b in text):
        return f"text: {text.decode('utf-8', 'replace')!r}"
    return f"no known container; begins with {head[:16].hex()}"


def _describe_error(error: BaseException) -> str:
    """The error's own words, without the path."""
    return re.sub(r"'?file:\S+'?", "<file>", str(error)).replace("\n", " ")[:300]


def _options(name: str) -> dict[str, str]:
    """Options with which any file is opened: local files only, by the one demuxer."""
    return {"protocol_whitelist": "file,pipe", "format_whitelist": name, "max_streams": "64"}


def _is_encrypted(path: str) -> bool:
    """Whether a MOV/MP4 names a common-encryption scheme for a track; both ends of the file are searched."""
    with Path(path).open("rb") as f:
        head = f.read(1 << 22)
        f.seek(max(0, os.fstat(f.fileno()).st_size - (1 << 22)))
        return bool(_SCHEME.search(head) or _SCHEME.search(f.read()))


def _read_facts(container: Any, stream: Any, name: str, max_pixels: int) -> dict[str, Any]:
    context = stream.codec_context
    if context is None:
        return {"reject": ["unsupported_codec", f"{name}: no decoder for the first video stream"]}
    facts = _read_header(container, stream, name)
    context.thread_type = "NONE"
    context.options = {"max_pixels": str(max_pixels)}
    small = facts["width"] * facts["height"] <= max_pixels
    times: list[int] = []
    seen = discarded = 0
    reordered = False
    last = (-(1 << 63), 0)  # time and duration of the packet shown last
    frames: list[Any] = []
    try:
        for packet in container.demux(stream):
            if packet.size:
                seen += 1
                discarded += packet.is_discard
                at = packet.pts if packet.pts is not None else packet.dts
                if at is not None and not packet.is_discard:
                    reordered = reordered or bool(times and at < times[-1])
                    times.append(at)
                    last = max(last, (at, packet.duration or 0))
            if small and seen <= 300 and len(frames) < (6 if facts["interlaced"] else 1):
                frames += _decode(packet, facts)
                facts["interlaced"] = bool(frames and frames[0].interlaced_frame)
            if seen >= MAX_PACKETS:
                return {"reject": ["too_long", f"more than {MAX_PACKETS} packets"]}
    except av.error.FFmpegError as e:
        facts["error"] = _describe_error(e)
    facts["packets"] = seen - discarded
    facts["seen"] = seen
    facts["reordered"] = reordered
    facts["steady"] = len(times) > 1 and len({b - a for a, b in itertools.pairwise(times)}) == 1
    first = min(times, default=0) * float(stream.time_base or 0)
    facts["start_s"] = first - (container.start_time or 0) / av.time_base
    _add_rate(facts, times, last[1], float(stream.time_base or 0))
    if frames:
        _add_picture(facts, frames[0])
        _join_fields(facts, [f.time for f in frames if f.time is not None])
    return facts


def _read_header(container: Any, stream: Any, name: str) -> dict[str, Any]:
    """What the headers say; what is only known after decoding is filled with zeros."""
    context = stream.codec_context
    return {
        "container": name,
        "stream": stream.index,
        "video_streams": len(container.streams.video),
        "codec": context.codec.canonical_name,  # not the decoder's own name, such as libdav1d
        "width": context.width or 0,
        "height": context.height or 0,
        "pix_fmt": context.pix_fmt or "",
        "sar": float(stream.sample_aspect_ratio or context.sample_aspect_ratio or 1) or 1.0,
        "promised": stream.frames,
        "nominal": [str(r) for r in (stream.guessed_rate, stream.average_rate, stream.base_rate) if r],
        "rotation": 0,
        "decoded": False,
        "interlaced": False,
        "error": "",
        **dict.fromkeys(("color_range", "colorspace", "color_trc", "color_primaries"), 0),
    }


def _decode(packet: Any, facts: dict[str, Any]) -> list[Any]:
    """The frames of a packet; an error goes into the facts."""
    try:
        return packet.decode()
    except av.error.FFmpegError as e:
        facts["error"] = _describe_error(e)
        return []


def _join_fields(facts: dict[str, Any], times: list[float]) -> None:
    """Count pictures, not packets, if each packet is one field of an interlaced picture."""
    steps = sorted(b - a for a, b in itertools.pairwise(times))
    if facts["interlaced"] and facts["rate"] and steps and 1.7 < steps[len(steps) // 2] * facts["rate"] < 2.3:
        facts["packets"] //= 2
        facts["rate"] /= 2


def _add_rate(facts: dict[str, Any], times: list[int], last: int, time_base: float) -> None:
    """Average rate and shown duration from the packets' times; rate 0 if too few packets have a time.

    `last`: the duration that the packet shown last claims. It counts if it is close to the mean step, or in a GIF.
    """
    n = facts["packets"]
    facts["rate"], facts["duration_s"] = 0.0, 0.0
    span = (max(times) - min(times)) * time_base if times else 0.0
    if span > 0 and len(times) >= max(2, n / 2):
        mean = span / (len(times) - 1)
        tail = last * time_base
        longest = (10 if facts["container"] == "gif" else 1.5) * mean
        facts["duration_s"] = span + (tail if 0 < tail <= longest else mean)
        facts["rate"] = n / facts["duration_s"] if len(times) == n else 1 / mean
        return
    rates = [_parse_rate(r) for r in facts["nominal"]]
    rates = [r for r in rates if 0.1 <= r <= 120]
    if rates:
        facts["duration_s"] = n / rates[0]


def _parse_rate(text: str) -> float:
    numerator, _, denominator = text.partition("/")
    return int(numerator) / int(denominator or 1)


def _add_picture(facts: dict[str, Any], frame: Any) -> None:
    """Facts that only a decoded picture shows."""
    facts.update(
        decoded=True,
        width=frame.width,
        height=frame.height,
        pix_fmt=frame.format.name,
        rotation=int(frame.rotation) % 360,
        interlaced=bool(frame.interlaced_frame),
        color_range=int(frame.color_range),
        colorspace=int(frame.colorspace),
        color_trc=int(frame.color_trc),
        color_primaries=int(frame.color_primaries),
    )


# --- borders of one source


def find_borders(path: str, name: str, index: int) -> dict[str, Any]:
    """{"size": [width, height], "box": [left, top, right, bottom]} of the coded picture without its black borders.

    Rows and columns at an edge are border if they are black in every picture that is looked at: up to
    BORDER_PICTURES keyframes, spread over the file.
    """
    boxes, size = [], [0, 0]
    with av.open(f"file:{path}", format=name, container_options=_options(name)) as container:
        stream = container.streams[index]
        stream.codec_context.thread_type = "NONE"
        stream.codec_context.skip_frame = "NONKEY"
        length = container.duration or 0
        for i in range(BORDER_PICTURES):
            try:
                if length:
                    at = (container.start_time or 0) + length * i // BORDER_PICTURES
                    container.seek(at, backward=True)
                frame = next(container.decode(stream))
            except (av.error.FFmpegError, StopIteration, ValueError):
                break
            size = [frame.width, frame.height]
            boxes.append(_bright_box(frame.reformat(format="gray").planes[0], frame.width, frame.height))
            if not length:
                break
    edges = list(zip(*boxes, strict=True))  # of all boxes: lefts, tops, rights, bottoms
    return {"size": size, "box": [*map(min, edges[:2]), *map(max, edges[2:])]}


def _bright_box(plane: Any, width: int, height: int) -> tuple[int, int, int, int]:
    """Smallest box (left, top, right, bottom) that holds every pixel brighter than BLACK."""
    data, step = memoryview(plane).cast("B"), plane.line_size
    light = re.compile(b"[" + re.escape(bytes([BLACK + 1])) + b"-\xff]")
    left, top, right, bottom = width, height, 0, 0
    for y in range(height):
        row = bytes(data[y * step : y * step + width])
        found = light.search(row)
        if found is None:
            continue
        top, bottom, left = min(top, y), y + 1, min(left, found.start())
        last = light.search(row[::-1])
        right = max(right, width - last.start() if last else 0)
    return left, top, right, bottom


# --- keyframes, and clips cut out of one encoded file


def list_keyframes(path: str) -> dict[str, Any]:
    """{"packets": number of packets of an encoded file, "keys": numbers of its keyframes}."""
    with av.open(f"file:{path}", format="mov", container_options=_options("mov")) as container:
        flags = [bool(p.is_keyframe) for p in container.demux(container.streams.video[0]) if p.size]
    return {"packets": len(flags), "keys": [i for i, key in enumerate(flags) if key]}


def cut_clips(path: str, clips: list[tuple[int, int, str]], rate: str) -> dict[str, Any]:
    """Copy packets [start, end) of an encoded file (one packet a frame) to a file for each clip, without decoding.

    `clips`: start, end, file. The answer is {"frames": [packets of each clip], "packets": of the whole file}. Clips may
    overlap; packets beyond the end are missing. If a clip does not begin at a keyframe, it is {"error": …}.
    """
    step = 1 / Fraction(rate)
    written = [0] * len(clips)
    waiting = sorted(range(len(clips)), key=lambda i: clips[i])
    total = 0
    while waiting:  # once, unless more clips overlap than may be open at a time
        now, waiting = waiting, []
        open_: dict[int, Any] = {}
        with av.open(f"file:{path}", format="mov", container_options=_options("mov")) as container:
            stream = container.streams.video[0]
            for total, packet in enumerate(p for p in container.demux(stream) if p.size):
                for i in [i for i in open_ if clips[i][1] == total]:
                    open_.pop(i).container.close()
                while now and clips[now[0]][0] == total:
                    if not packet.is_keyframe:
                        return {"error": f"frame {total}, where a clip begins, is no keyframe"}
                    i = now.pop(0)
                    if len(open_) == OPEN_CLIPS:
                        waiting.append(i)
                    else:
                        open_[i] = _open_clip(Path(clips[i][2]), stream, step)
                data = bytes(packet) if open_ else b""
                for i, out in open_.items():
                    _write_packet(out, data, written[i], step, packet.is_keyframe)
                    written[i] += 1
        for out in open_.values():
            out.container.close()
    return {"frames": written, "packets": total + 1}


def _open_clip(path: Path, like: Any, step: Fraction) -> Any:
    """The one stream of a new MP4, coded as the stream `like`, with `step` seconds a frame."""
    file = av.open(str(path), "w", format="mp4", options={"movflags": "+faststart", "fflags": "+bitexact"})
    out = file.add_stream_from_template(like)
    out.time_base = step
    return out


def _write_packet(out: Any, data: bytes, number: int, step: Fraction, key: bool) -> None:
    packet = av.Packet(data)
    packet.stream, packet.time_base = out, step
    packet.pts = packet.dts = number
    packet.duration, packet.is_keyframe = 1, key
    out.container.mux(packet)


# --- finished clips


def verify_clip(path: str) -> dict[str, Any]:
    """What is seen when one finished clip is decoded whole: the fields of probe.VerifiedClip."""
    try:
        with av.open(f"file:{path}", format="mov", container_options=_options("mov")) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_type = "NONE"
            # the filter changes no picture's number, size or damage, and leaving it out is faster
            stream.codec_context.options = {"skip_loop_filter": "all"}
            frames, key, times, sizes = 0, False, [], set()
            for frame in container.decode(stream):
                key = key or (frames == 0 and bool(frame.key_frame))
                frames += 1
                times.append(frame.pts)
                sizes.add((frame.width, frame.height, frame.format.name, int(frame.color_range), frame.is_corrupt))
            steps = {b - a for a, b in itertools.pairwise(times)}
            return {
                "frames": frames,
                "key_first": key,
                "from_zero": bool(times) and times[0] == 0,
                "steps_s": sorted(float(s * stream.time_base) for s in steps),
                "pictures": sorted(map(list, sizes)),
                "codec": stream.codec_context.name,
                "others": len(container.streams) - 1,
            }
    except (av.error.FFmpegError, ValueError, IndexError, TypeError) as e:
        return {"error": _describe_error(e)}


if __name__ == "__main__":
    main()
