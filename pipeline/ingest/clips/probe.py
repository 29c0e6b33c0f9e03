"""What is read from video files, all of it in one warm child: facts of a source, keyframes, clips cut and verified.

A file is known by its content, never by its name. The child (probe_child.py) runs in the sandbox. It is replaced
when it crashed, ran out of time, or has answered REQUESTS questions. Facts of a foreign file are trusted no more
than the file: every value is checked here before it is used.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reelmae.pipeline.errors import ChildCrashedError, ChildTimeoutError
from reelmae.pipeline.ingest.clips import probe_child
from reelmae.pipeline.ingest.clips.outcome import Rejected
from reelmae.pipeline.ingest.sandbox import Child, Limits, Sandbox
from reelmae.pipeline.schema import Reason

CONTAINERS = ("mov", "matroska", "avi", "mpegts", "mpeg", "mpegvideo", "flv", "asf", "ogg", "gif", "mxf")
REQUESTS = 500  # questions to one child; then it is replaced
_LIMITS = Limits(cpu_s=24 * 3600)


class Probe(BaseModel):
    """Facts of a file's first video stream that is no attached picture. Colour values are ffmpeg's numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    container: str = Field(pattern="^(" + "|".join(CONTAINERS) + ")$")
    stream: int = Field(ge=0, le=1000)
    video_streams: int = Field(ge=1)
    """Video streams of the file, attached pictures included."""
    codec: str
    width: int = Field(ge=0, le=1 << 20)
    height: int = Field(ge=0, le=1 << 20)
    """Sides as coded: before rotation and pixel aspect."""
    pix_fmt: str
    sar: float = Field(gt=0, le=1e4)
    """Width of a pixel over its height."""
    promised: int
    """Frames by the container's own table; 0 if it has none."""
    nominal: tuple[Fraction, ...]
    """Frame rates that the headers name."""
    packets: int = Field(ge=0)
    """Coded frames that are shown; two fields count as one."""
    seen: int = Field(ge=0)
    """All packets."""
    rate: float = Field(ge=0, allow_inf_nan=False)
    """Frames a second, measured over all packets; 0 if they carry no times."""
    duration_s: float = Field(ge=0, allow_inf_nan=False)
    """Measured over all packets; if they carry no times, from a nominal rate, else 0."""
    decoded: bool
    """Whether a first picture could be decoded."""
    interlaced: bool
    rotation: int
    """Degrees, counter-clockwise."""
    color_range: int
    colorspace: int
    color_trc: int
    color_primaries: int
    error: str
    """The last error of demuxer or decoder; "" if there was none."""
    start_s: float = Field(allow_inf_nan=False)
    """The first packet's time, after the container's begin."""
    reordered: bool
    """Packets do not come in the order of their times."""
    steady: bool
    """All steps between packets are equal."""


class VerifiedClip(BaseModel):
    """What was seen when a finished clip was decoded whole."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    frames: int = 0
    key_first: bool = False
    """The first frame is a keyframe."""
    from_zero: bool = False
    """The first frame has time 0."""
    steps_s: tuple[float, ...] = ()
    """Distinct seconds between frames."""
    pictures: tuple[tuple[int, int, str, int, bool], ...] = ()
    """Distinct (width, height, pixel format, colour range, corrupt)."""
    codec: str = ""
    others: int = 0
    """Streams beside the video."""
    error: str = ""

    def fault(self, *, frames: int, fps: Fraction, width: int, height: int, codec: str, untagged: bool = False) -> str:
        """What differs from these values; "" if nothing does. `untagged`: the colour range may be missing."""
        if self.error:
            return self.error
        no_range = untagged and bool(self.pictures) and self.pictures[0][3] == 0
        color_range = 0 if no_range else 1
        found = {
            "frames": (self.frames, frames),
            "pictures": (self.pictures, ((width, height, "yuv420p", color_range, False),)),
            "codec": (self.codec, codec),
            "keyframe first": (self.key_first, True),
            "starts at 0": (self.from_zero, True),
            "constant rate": (all(abs(s * fps - 1) < 1e-3 for s in self.steps_s), True),
            "streams beside the video": (self.others, 0),
        }
        return "; ".join(f"{name}: {got}, wanted {wanted}" for name, (got, wanted) in found.items() if got != wanted)


@dataclass(frozen=True)
class CutFiles:
    """Clips cut from one encoded file."""

    files: list[Path]
    """One for each span; a span of 0 frames has no file."""
    frames: list[int]
    """Frames of each."""
    total: int
    """Frames of the whole encoded file."""


class Prober:
    """One warm child, started at the first question. Not shared by threads; close it at the end.

    Every question raises ChildTimeoutError past `wall_s`, and ChildCrashedError if the child dies.
    """

    def __init__(self, sandbox: Sandbox, folder: Path) -> None:
        self._sandbox = sandbox
        self._folder = folder
        self._child: Child | None = None
        self._served = 0

    def probe(self, path: Path, *, max_pixels: int, wall_s: float) -> Probe | Rejected:
        """Facts of the file, or why it is no usable video."""
        answer = self._ask({"op": "probe", "path": str(path), "max_pixels": max_pixels}, wall_s)
        try:
            if "reject" in answer:
                reason, detail = answer["reject"]
                return Rejected(Reason(reason), str(detail))
            return Probe(**answer)
        except (ValidationError, ValueError, TypeError, ZeroDivisionError) as e:
            return Rejected(Reason.UNREADABLE, f"impossible facts in the header: {str(e).splitlines()[0]}")

    def verify(self, paths: Sequence[Path], *, wall_s: float) -> list[VerifiedClip]:
        """Decode these clips whole; one answer for each."""
        answer = self._ask({"op": "verify", "paths": [str(p) for p in paths]}, wall_s)
        return [VerifiedClip(**clip) for clip in answer["clips"]]

    def find_borders(self, path: Path, probe: Probe, *, wall_s: float) -> tuple[int, int, int, int] | None:
        """The coded picture without its black borders: left, top, width, height.

        None if there are no borders, if all is black, or if the answer does not fit the probed size.
        """
        question = {"op": "borders", "path": str(path), "container": probe.container, "stream": probe.stream}
        answer = self._ask(question, wall_s)
        if len(answer["box"]) != 4 or answer["size"] != [probe.width, probe.height]:
            return None
        left, top, right, bottom = (int(n) for n in answer["box"])
        if not (0 <= left < right <= probe.width and 0 <= top < bottom <= probe.height):
            return None
        box = (left, top, right - left, bottom - top)
        return None if box == (0, 0, probe.width, probe.height) else box

    def list_keyframes(self, path: Path, *, wall_s: float) -> tuple[int, list[int]]:
        """How many packets an encoded file has, and which of them are keyframes."""
        answer = self._ask({"op": "keys", "path": str(path)}, wall_s)
        return answer["packets"], answer["keys"]

    def cut_clips(
        self, path: Path, spans: Sequence[tuple[int, int]], rate: Fraction, folder: Path, *, wall_s: float
    ) -> CutFiles | Rejected:
        """Copy spans of packets of an encoded file to files in `folder`. VERIFY_FAILED if one begins at no keyframe."""
        files = [folder / f"{i:05d}.mp4" for i in range(len(spans))]
        question = {
            "op": "cut",
            "path": str(path),
            "clips": [(start, end, str(file)) for (start, end), file in zip(spans, files, strict=True)],
            "rate": str(rate),
        }
        answer = self._ask(question, wall_s)
        if "error" in answer:
            return Rejected(Reason.VERIFY_FAILED, str(answer["error"]))
        return CutFiles(files, answer["frames"], answer["packets"])

    def _ask(self, question: dict[str, Any], wall_s: float) -> dict[str, Any]:
        if self._child is not None and (self._served >= REQUESTS or not self._child.alive):
            self.close()  # a child that died between files is replaced: the next file is not blamed for it
        if self._child is None:
            argv = [sys.executable, "-I", str(Path(probe_child.__file__))]
            self._child = self._sandbox.start(argv, limits=_LIMITS, cwd=self._folder)
        self._served += 1
        try:
            return json.loads(self._child.ask(json.dumps(question).encode(), wall_s=wall_s))
        except (ChildTimeoutError, ChildCrashedError):
            self.close()
            raise

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.close()
        self._child, self._served = None, 0
