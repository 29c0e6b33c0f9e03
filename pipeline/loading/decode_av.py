"""One clip's bytes and draws → its samples, with PyAV on one core. Imports no torch: workers start with it.

Properties that hold:
- the samples' wanted frames are decoded in one pass, however many samples share the clip; the pass jumps to
  the keyframe before a wanted frame wherever that skips anything;
- frames are known by their timestamp (clips have a constant rate): a wanted frame that does not come is an
  error, never its neighbour;
- only wanted frames are cropped, resized and converted. Resizing is done on the Y, U and V planes, conversion
  to RGB after it, so that only what is trained on is converted; a test bounds what that changes;
- resizing is the triangle filter, widened where it shrinks (antialiased), as in the DALI backends.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image

from reelmae.pipeline.errors import BadClipError
from reelmae.pipeline.loading.draws import Draw, frame_indices
from reelmae.pipeline.loading.fetch import fetch
from reelmae.pipeline.loading.tasks import ClipTask, Cost
from reelmae.pipeline.storage import Store

# where swscale takes chroma samples to lie, in chroma pixels to the right of a luma pair's centre
_CHROMA_SHIFT = {"h264": 0.25, "hevc": 0.25}
_EXACT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND


class AvDecoder:
    """Decodes clips of one store into samples of `frames` pictures of `size`×`size`."""

    def __init__(self, store: Store, *, frames: int, size: int) -> None:
        self.store = store
        self.frames = frames
        self.size = size
        self._to_rgb = VideoReformatter()
        self._planar = av.VideoFrame(size, size, "yuv444p")

    def decode(self, task: ClipTask, out_RTHWC: np.ndarray) -> Cost:
        """Write the task's R samples into `out_RTHWC`, uint8; BadClipError where the clip cannot be decoded."""
        started = time.perf_counter()
        data = fetch(self.store, key=task.key, shard=task.shard, offset=task.offset, size=task.size)
        uses: dict[int, list[tuple[int, int]]] = {}  # frame number → the (repeat, time) places it goes to
        for r, draw in enumerate(task.draws):
            for t, n in enumerate(frame_indices(draw, self.frames, task.frames).tolist()):
                uses.setdefault(n, []).append((r, t))
        shift = _CHROMA_SHIFT.get(task.codec, 0.0)
        cost = Cost(bytes_read=len(data))
        try:
            for n, frame in wanted_frames(data, sorted(uses), task.fps, cost):
                done: dict[int, int] = {}  # a repeat's padding is one frame at several times: resize it once
                for r, t in uses[n]:
                    if r in done:
                        out_RTHWC[r, t] = out_RTHWC[r, done[r]]
                    else:
                        self._sample(frame, task.draws[r], shift, out_RTHWC[r, t])
                        done[r] = t
        except (av.FFmpegError, ValueError, EOFError) as e:
            raise BadClipError(task.key, f"does not decode: {e}") from e
        cost.decode_s = time.perf_counter() - started
        return cost

    def _sample(self, frame: av.VideoFrame, draw: Draw, chroma_shift: float, out_HWC: np.ndarray) -> None:
        """Crop, resize, convert and flip one picture."""
        if (draw.top + draw.height > frame.height) or (draw.left + draw.width > frame.width):
            raise ValueError(f"is {frame.width}×{frame.height}, smaller than its index says")
        if frame.format.name not in ("yuv420p", "yuvj420p"):
            frame = frame.reformat(format="yuv420p", threads=1)
        size = self.size
        box = (draw.left, draw.top, draw.left + draw.width, draw.top + draw.height)
        for i, plane in enumerate(frame.planes):
            image = Image.frombuffer("L", (plane.width, plane.height), plane, "raw", "L", plane.line_size, 1)
            if i:
                x0, x1 = (min(x / 2 + chroma_shift, plane.width) for x in (box[0], box[2]))
                resized = image.resize(
                    (size, size), Image.Resampling.BILINEAR, box=(x0, box[1] / 2, x1, box[3] / 2)
                )
            else:
                resized = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
            _plane(self._planar.planes[i])[:, :size] = resized
        self._planar.colorspace, self._planar.color_range = frame.colorspace, frame.color_range
        rgb = self._to_rgb.reformat(self._planar, format="rgb24", interpolation=_EXACT, threads=1)
        picture = _plane(rgb.planes[0])[:, : 3 * size].reshape(size, size, 3)
        out_HWC[:] = picture[:, ::-1] if draw.flip else picture


def _plane(plane: Any) -> np.ndarray:
    """A frame's plane as uint8 [rows, bytes of a line with its padding], without a copy."""
    return np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)


def wanted_frames(
    data: bytes, wanted: list[int], fps: float, cost: Cost
) -> Iterator[tuple[int, av.VideoFrame]]:
    """The frames with these numbers (ascending, distinct) of an mp4 held in memory; counts what it decodes.

    Raises ValueError or av.FFmpegError where one of them cannot be had.
    """
    # the demuxer is named, so that no content can make FFmpeg take it for a playlist that opens other files
    with av.open(io.BytesIO(data), format="mp4") as container:
        if not container.streams.video:
            raise ValueError("no video stream")
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"err_detect": "explode"}
        to_number = float(stream.time_base) * fps
        first = stream.start_time or 0
        keyframes = [
            (round((e.timestamp - first) * to_number), e.timestamp)
            for e in stream.index_entries
            if e.is_keyframe
        ]
        frames = container.decode(stream)
        position = 0  # number of the next frame to come
        for n in wanted:
            start, timestamp = max((k for k in keyframes if k[0] <= n), default=(0, first))
            if start > position:
                container.seek(timestamp, stream=stream)
                frames = container.decode(stream)
                position = start
            for frame in frames:
                cost.frames_decoded += 1
                got = round((frame.pts - first) * to_number)
                position = got + 1
                if frame.is_corrupt:
                    raise ValueError(f"frame {got} is damaged")
                if got >= n:
                    break
            else:
                raise ValueError(f"ends before frame {n}")
            if got != n:
                raise ValueError(f"frame {n} is missing, {got} came in its place")
            yield n, frame
