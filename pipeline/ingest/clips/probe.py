"""Facts of one file, by content never by name, and the full decode of finished clips, both in a warm child.

The child (probe_child.py) runs in the sandbox and is replaced when it crashed, ran out of time, or has served
REQUESTS files. Its answer is as foreign as the file: every value is checked here before it is used.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reelmae.pipeline.errors import ChildCrashedError, ChildTimeoutError
from reelmae.pipeline.ingest.clips import probe_child
from reelmae.pipeline.ingest.sandbox import Child, Limits, Sandbox
from reelmae.pipeline.schema import Reason

CONTAINERS = ("mov", "matroska", "avi", "mpegts", "mpeg", "mpegvideo", "flv", "asf", "ogg", "gif", "mxf")
REQUESTS = 500
_LIMITS = Limits(cpu_s=24 * 3600)


class Probe(BaseModel):
    """What a file holds: of its first video stream that is no attached picture.

    `packets` counts coded frames that are shown (fields counted as half), `seen` all packets; `rate` (1/s) and `duration_s` are measured over all of them,
    0 where they carry no times; `promised` is the container's own count, 0 where it names none. `rotation` in
    degrees, counter-clockwise; `sar` the pixel aspect. Colour values are ffmpeg's numbers. `start_s`: the first
    packet's time after the container's begin; `reordered`: packets do not come in the order of their times;
    `steady`: all steps between packets are equal.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    container: str = Field(pattern="^(" + "|".join(CONTAINERS) + ")$")
    stream: int = Field(ge=0, le=1000)
    video_streams: int = Field(ge=1)
    codec: str
    width: int = Field(ge=0, le=1 << 20)
    height: int = Field(ge=0, le=1 << 20)
    pix_fmt: str
    sar: float = Field(gt=0, le=1e4)
    promised: int
    nominal: tuple[Fraction, ...]
    packets: int = Field(ge=0)
    seen: int = Field(ge=0)
    rate: float = Field(ge=0, allow_inf_nan=False)
    duration_s: float = Field(ge=0, allow_inf_nan=False)
    decoded: bool
    interlaced: bool
    rotation: int
    color_range: int
    colorspace: int
    color_trc: int
    color_primaries: int
    error: str
    start_s: float = Field(allow_inf_nan=False)
    reordered: bool
    steady: bool


class VerifiedClip(BaseModel):
    """What the full decode of a finished clip gave."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    frames: int = 0
    key_first: bool = False
    from_zero: bool = False
    steps_s: tuple[float, ...] = ()
    pictures: tuple[tuple[int, int, str, int, bool], ...] = ()  # distinct (width, height, format, range, corrupt)
    codec: str = ""
    others: int = 0  # streams beside the video
    error: str = ""

    def fault(self, *, frames: int, fps: Fraction, width: int, height: int, codec: str, untagged: bool = False) -> str:
        """What differs from what was asked; "" = nothing. `untagged`: the range may be left unsaid."""
        if self.error:
            return self.error
        said = self.pictures[0][3] if untagged and self.pictures and self.pictures[0][3] == 0 else 1
        found = {
            "frames": (self.frames, frames),
            "pictures": (self.pictures, ((width, height, "yuv420p", said, False),)),
            "codec": (self.codec, codec),
            "keyframe first": (self.key_first, True),
            "starts at 0": (self.from_zero, True),
            "constant rate": (all(abs(s * fps - 1) < 1e-3 for s in self.steps_s), True),
            "streams beside the video": (self.others, 0),
        }
        return "; ".join(f"{name}: {got}, wanted {wanted}" for name, (got, wanted) in found.items() if got != wanted)


class Prober:
    """One warm child, started at the first question. Not shared by threads; close it at the end."""

    def __init__(self, sandbox: Sandbox, folder: Path) -> None:
        self._sandbox = sandbox
        self._folder = folder
        self._child: Child | None = None
        self._served = 0

    def probe(self, path: Path, *, max_pixels: int, wall_s: float) -> Probe | tuple[Reason, str]:
        """Facts of the file, or why it is no usable video."""
        answer = self._ask({"op": "probe", "path": str(path), "max_pixels": max_pixels}, wall_s)
        try:
            if "reject" in answer:
                reason, detail = answer["reject"]
                return Reason(reason), str(detail)
            return Probe(**answer)
        except (ValidationError, ValueError, TypeError, ZeroDivisionError) as e:
            return Reason.UNREADABLE, f"impossible facts in the header: {str(e).splitlines()[0]}"

    def verify(self, paths: Sequence[Path], *, wall_s: float) -> list[VerifiedClip]:
        """Decode these clips whole."""
        answer = self._ask({"op": "verify", "paths": [str(p) for p in paths]}, wall_s)
        return [VerifiedClip(**clip) for clip in answer["clips"]]

    def borders(self, path: Path, probe: Probe, *, wall_s: float) -> tuple[int, int, int, int] | None:
        """The picture within black borders as coded: left, top, width, height; None where there are none, or all is black."""
        question = {"op": "borders", "path": str(path), "container": probe.container, "stream": probe.stream}
        answer = self._ask(question, wall_s)
        if len(answer["box"]) != 4 or answer["size"] != [probe.width, probe.height]:
            return None
        left, top, right, bottom = (int(n) for n in answer["box"])
        if not (0 <= left < right <= probe.width and 0 <= top < bottom <= probe.height):
            return None
        box = (left, top, right - left, bottom - top)
        return None if box == (0, 0, probe.width, probe.height) else box

    def keys(self, path: Path, *, wall_s: float) -> tuple[int, list[int]]:
        """Packets of an encoded file, and the numbers of its keyframes."""
        answer = self._ask({"op": "keys", "path": str(path)}, wall_s)
        return answer["packets"], answer["keys"]

    def cut(
        self, path: Path, spans: Sequence[tuple[int, int]], rate: Fraction, folder: Path, *, wall_s: float
    ) -> tuple[list[int], int] | str:
        """Copy spans of packets to folder/00000.mp4, …: packets of each (0: no file) and of all; or what is wrong."""
        question = {"op": "cut", "path": str(path), "spans": spans, "rate": str(rate), "folder": str(folder)}
        answer = self._ask(question, wall_s)
        return str(answer["error"]) if "error" in answer else (answer["frames"], answer["packets"])

    def _ask(self, question: dict[str, Any], wall_s: float) -> dict[str, Any]:
        if self._child is not None and (self._served >= REQUESTS or not self._child.alive):
            self.close()  # one that died idle is no fault of the next file
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
