"""One clip's bytes and draws → its samples, with PyAV on one core. Imports no torch: workers start with it.

Properties that hold:
- what is decoded follows from `passes`: each frame at most once however many samples share it, and only runs of frames
  that hold a wanted one;
- frames are known by their number, which travels through the decoder as a timestamp: a wanted frame that does not
  come is an error, never its neighbour;
- only wanted frames are converted, and of them only the drawn box: one step of swscale crops, resizes and converts
  from YUV 4:2:0 to planar RGB, the layout of the batch;
- resizing is the triangle filter, widened where it shrinks (antialiased), as in the DALI backends.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from reelmae.pipeline.errors import BadClipError
from reelmae.pipeline.loading.decode.mp4 import Track, read_track
from reelmae.pipeline.loading.decode.passes import DecodePolicy, decode_passes
from reelmae.pipeline.loading.order.draws import Draw, frame_indices
from reelmae.pipeline.loading.tasks import ClipTask, Cost

_SCALING = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_RGB_PLANES = (2, 0, 1)  # of FFmpeg's gbrp


class AvDecoder:
    """Decodes clips into samples of `frames` pictures of `size`×`size`."""

    def __init__(self, *, frames: int, size: int, policy: DecodePolicy = "auto") -> None:
        self.frames = frames
        self.size = size
        self.policy: DecodePolicy = policy

    def decode(self, task: ClipTask, data: bytes, out_RCTHW: np.ndarray) -> Cost:
        """Write the task's R samples into `out_RCTHW`, uint8; BadClipError where the clip cannot be decoded."""
        started = time.perf_counter()
        cost = Cost(bytes_read=len(data))
        wanted_RT = np.stack([frame_indices(draw, self.frames, task.frames) for draw in task.draws])
        boxes = [_Box(draw, self.size) for draw in task.draws]
        places = [_places(wanted_T.tolist()) for wanted_T in wanted_RT]
        try:
            for samples, n, frame in self._frames(data, wanted_RT, cost):
                began = time.perf_counter()
                for r in samples:
                    if n in places[r]:
                        first, *again = places[r][n]
                        boxes[r].write(frame, out_RCTHW[r, :, first])
                        for t in again:  # the padding of a short clip
                            out_RCTHW[r, :, t] = out_RCTHW[r, :, first]
                cost.resize_s += time.perf_counter() - began
        except (av.FFmpegError, ValueError, EOFError) as e:
            raise BadClipError(task.key, f"does not decode: {e}") from e
        cost.decode_s = time.perf_counter() - started - cost.resize_s
        return cost

    def _frames(
        self, data: bytes, wanted_RT: np.ndarray, cost: Cost
    ) -> Iterator[tuple[tuple[int, ...], int, av.VideoFrame]]:
        """(samples, number, frame) of every wanted frame of an mp4 held in memory; counts what it decodes.

        Raises ValueError or av.FFmpegError where one of them cannot be had.
        """
        track = read_track(data)
        context = av.CodecContext.create(track.codec, "r")
        context.extradata = track.extradata or None
        context.thread_count = 1
        context.options = {"err_detect": "explode"}
        # a keyframe's place is its number too: groups of pictures are closed
        for p in decode_passes(wanted_RT, track.keyframes.tolist(), self.policy):
            frames = _decode(context, track, data, p.start)
            for n in p.wanted:
                yield p.samples, n, _next(frames, n, cost)
            context.flush_buffers()


def _places(wanted: list[int]) -> dict[int, list[int]]:
    """Frame number → the times of a sample that show it."""
    places: dict[int, list[int]] = {}
    for t, n in enumerate(wanted):
        places.setdefault(n, []).append(t)
    return places


def _decode(context: Any, track: Track, data: bytes, start: int) -> Iterator[av.VideoFrame]:
    """The frames from a keyframe on; `pts` is the frame's number."""
    whole = memoryview(data)
    for i in range(start, len(track)):
        offset, size = int(track.offsets[i]), int(track.sizes[i])
        packet = av.Packet(whole[offset : offset + size])
        packet.pts = int(track.numbers[i])
        yield from context.decode(packet)
    yield from context.decode(None)


def _next(frames: Iterator[av.VideoFrame], wanted: int, cost: Cost) -> av.VideoFrame:
    """The frame of this number; those before it are passed over."""
    for frame in frames:
        cost.frames_decoded += 1
        if frame.is_corrupt:
            raise ValueError(f"frame {frame.pts} is damaged")
        if frame.pts == wanted:
            return frame
        if frame.pts > wanted:
            raise ValueError(f"frame {wanted} is missing, {frame.pts} came in its place")
    raise ValueError(f"ends before frame {wanted}")


class _Box:
    """One sample's crop, resize, conversion and flip; frames of one size share what swscale has worked out."""

    def __init__(self, draw: Draw, size: int) -> None:
        self._draw = draw
        self._size = size
        self._cut = av.VideoFrame(draw.width, draw.height, "yuv420p")
        self._scale = VideoReformatter()

    def write(self, frame: av.VideoFrame, out_CHW: np.ndarray) -> None:
        """Write one picture."""
        draw, size = self._draw, self._size
        if (draw.top + draw.height > frame.height) or (draw.left + draw.width > frame.width):
            raise ValueError(f"is {frame.width}×{frame.height}, smaller than its index says")
        if frame.format.name not in ("yuv420p", "yuvj420p"):
            frame = frame.reformat(format="yuv420p", threads=1)
        for i, (plane, cut) in enumerate(zip(frame.planes, self._cut.planes, strict=True)):
            step = 2 if i else 1  # boxes lie on even pixels
            rows = slice(draw.top // step, (draw.top + draw.height) // step)
            columns = slice(draw.left // step, (draw.left + draw.width) // step)
            _pixels(cut)[:, : draw.width // step] = _pixels(plane)[rows, columns]
        self._cut.colorspace, self._cut.color_range = frame.colorspace, frame.color_range
        rgb = self._scale.reformat(self._cut, width=size, height=size, format="gbrp", interpolation=_SCALING, threads=1)
        for c, at in enumerate(_RGB_PLANES):
            picture = _pixels(rgb.planes[at])[:, :size]
            if not draw.flip:
                out_CHW[c] = picture
            elif size % 8:
                out_CHW[c] = picture[:, ::-1]
            else:  # eight bytes at a time, each eight turned round by the change of byte order: five times as fast
                out_CHW[c].view("<u8")[:] = picture.view(">u8")[:, ::-1]


def _pixels(plane: Any) -> np.ndarray:
    """A frame's plane as uint8 [rows, bytes of a line with its padding], without a copy."""
    return np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
