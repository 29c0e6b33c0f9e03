"""Writes one generated video in one of many ways: container, codec, rate, size, rotation, sound.

Properties that hold: the same VideoSpec gives the same bytes (one thread, bit-exact muxing), and a file appears under
its name whole or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from reelmae.pipeline.storage.store import whole_file
from reelmae.tools.synth.scene import make_scene, render

TICKS = 90_000  # per second: the time base of videos with an uneven rate


@dataclass(frozen=True)
class Encoding:
    """How a video is written: container, codec, rate, size, rotation, sound."""

    suffix: str
    codec: str
    fps: str | None = "25"
    """None: an uneven rate."""
    width: int = 320
    height: int = 240
    audio: str | None = None
    pix_fmt: str = "yuv420p"
    rotation: int = 0
    """Degrees by which a player must turn the picture."""
    aspect: str = "1"
    """Width over height of one pixel."""
    options: tuple[tuple[str, str], ...] = ()
    bit_rate: int | None = None


# without mbtree: with it, this x264 sometimes gives other bytes, even on one thread
_X264 = (("preset", "veryfast"), ("crf", "20"), ("x264-params", "mbtree=0"))
_X265 = (("preset", "ultrafast"), ("x265-params", "log-level=none:pools=none:frame-threads=1"))
_VPX = (("deadline", "realtime"), ("cpu-used", "8"), ("crf", "16"))
_AV1 = (("preset", "12"), ("crf", "32"), ("svtav1-params", "lp=1"))

ENCODINGS: tuple[Encoding, ...] = (
    Encoding("mp4", "libx264", "30", 426, 240, "aac", options=_X264),
    Encoding("webm", "libvpx-vp9", "24", 320, 240, "libopus", options=_VPX, bit_rate=900_000),
    Encoding("mov", "libx264", "30000/1001", 320, 240, "pcm_s16le", options=_X264, rotation=90),
    Encoding("avi", "mpeg4", "25", 320, 256, "libmp3lame", bit_rate=1_500_000),
    Encoding("mkv", "libx265", "24000/1001", 320, 240, "libopus", options=_X265),
    Encoding("ts", "mpeg2video", "25", 352, 288, "mp2", bit_rate=2_000_000),
    Encoding("mp4", "libx264", None, 320, 240, None, options=_X264),
    Encoding("webm", "libvpx", "15", 240, 320, None, options=_VPX, bit_rate=900_000),
    Encoding("mp4", "libx264", "50", 320, 240, "aac", options=(*_X264, ("g", "250"), ("bf", "3"))),
    Encoding("mov", "mjpeg", "12", 320, 240, None, pix_fmt="yuvj420p", bit_rate=4_000_000),
    Encoding("flv", "flv", "25", 320, 240, "libmp3lame", bit_rate=1_500_000),
    Encoding("mp4", "libx264", "30", 240, 426, "aac", options=_X264, rotation=270),
    Encoding("gif", "gif", "10", 256, 192, None, pix_fmt="rgb8"),
    Encoding("3gp", "h263", "30000/1001", 352, 288, None, bit_rate=1_500_000),
    Encoding("mkv", "libx264", "24", 321, 243, "libopus", pix_fmt="yuv444p", options=_X264),
    Encoding("mp4", "libsvtav1", "25", 320, 240, "aac", options=_AV1),
    Encoding("mpg", "mpeg1video", "30", 320, 240, "mp2", bit_rate=1_800_000),
    Encoding("mp4", "mpeg4", "30", 320, 240, "aac", bit_rate=1_500_000, rotation=180),
    Encoding("mkv", "libvpx-vp9", None, 333, 251, None, options=_VPX, bit_rate=900_000),
    Encoding("wmv", "wmv2", "25", 320, 240, None, bit_rate=1_500_000),
    Encoding("mp4", "libx264", "25", 240, 240, "aac", options=_X264, aspect="16/11"),
    Encoding("mov", "libx265", "30", 320, 240, None, pix_fmt="yuv420p10le", options=_X265),
    Encoding("m4v", "libx264", "15", 480, 270, "aac", options=(*_X264, ("g", "300"))),
    Encoding("avi", "mjpeg", "24", 320, 180, "pcm_s16le", pix_fmt="yuvj420p", bit_rate=4_000_000),
)


@dataclass(frozen=True)
class VideoSpec:
    """One video: everything that decides its bytes."""

    path: str
    motion: str
    encoding: Encoding
    seconds: float
    cuts: int
    seed: tuple[int, ...]
    """Seed of numpy's generator: a path of integers."""


def frame_times(encoding: Encoding, seconds: float) -> list[Fraction]:
    """When each frame is shown, in seconds: at the encoding's rate, or at uneven steps of 1/60 … 1/12 s."""
    if encoding.fps is not None:
        rate = Fraction(encoding.fps)
        return [Fraction(i) / rate for i in range(max(2, round(seconds * rate)))]
    times, t, i = [Fraction(0)], Fraction(0), 0
    while t < seconds:
        # a phone in changing light: the rate wanders between 12 and 60 a second
        t += Fraction(round(TICKS / (33 + 26 * math.sin(0.35 * i))), TICKS)
        times.append(t)
        i += 1
    return times


def _frames(spec: VideoSpec) -> Iterator[tuple[int, av.VideoFrame]]:
    """(timestamp in the stream's time base, RGB frame as stored: turned back where a player must turn it)."""
    encoding = spec.encoding
    width, height = (encoding.height, encoding.width) if encoding.rotation % 180 else (encoding.width, encoding.height)
    shown = round(width * Fraction(encoding.aspect))  # rendered as seen, then squeezed into the stored pixels
    generator = np.random.default_rng(spec.seed)
    shots = make_scene(spec.motion, generator, width=shown, height=height, seconds=spec.seconds, cuts=spec.cuts)
    for i, t in enumerate(frame_times(encoding, spec.seconds)):
        picture = render(shots, float(t), width=shown, height=height)
        picture = np.ascontiguousarray(np.rot90(picture, -encoding.rotation // 90))
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        if shown != width:
            frame = frame.reformat(width=encoding.width, height=encoding.height)
        yield (i if encoding.fps is not None else int(t * TICKS)), frame


def _sound(spec: VideoSpec, rate: int) -> NDArray[np.int16]:
    """A slow chord that beats, mono int16 [1, samples]."""
    t = np.arange(int(spec.seconds * rate)) / rate
    root = 110.0 * 2 ** (spec.seed[-1] % 12 / 12)
    wave = sum(np.sin(2 * math.pi * root * k * t) / k for k in (1, 1.5, 2.02))
    return (wave * (3000 + 2000 * np.sin(2 * math.pi * 1.5 * t))).astype(np.int16)[None]


def _add_sound(container: av.container.OutputContainer, stream: av.AudioStream, spec: VideoSpec) -> None:
    frame = av.AudioFrame.from_ndarray(_sound(spec, stream.rate), format="s16", layout="mono")
    frame.sample_rate = stream.rate
    frame.pts = 0
    fifo = av.AudioFifo()
    resampler = av.AudioResampler(format=stream.format, layout="mono", rate=stream.rate)
    for part in resampler.resample(frame) + resampler.resample(None):
        fifo.write(part)
    size = stream.codec_context.frame_size or 1024
    while (piece := fifo.read(size)) is not None:
        container.mux(stream.encode(piece))
    if (rest := fifo.read()) is not None:
        container.mux(stream.encode(rest))
    container.mux(stream.encode(None))


def write_video(spec: VideoSpec) -> str:
    """Render, encode and mux one video; returns its path."""
    encoding = spec.encoding
    with (
        whole_file(Path(spec.path)) as part,
        av.open(str(part), "w", format=_muxer(encoding), options={"fflags": "+bitexact"}) as container,
    ):
        rate = Fraction(encoding.fps) if encoding.fps is not None else Fraction(30)
        base = 1 / rate if encoding.fps is not None else Fraction(1, TICKS)
        video = container.add_stream(encoding.codec, rate=rate, options=dict(encoding.options))
        video.width, video.height, video.pix_fmt = encoding.width, encoding.height, encoding.pix_fmt
        video.codec_context.time_base = base
        video.codec_context.sample_aspect_ratio = Fraction(encoding.aspect)
        video.codec_context.thread_count = 1
        video.codec_context.flags |= av.codec.context.Flags.bitexact
        if encoding.rotation:
            video.set_display_rotation(encoding.rotation)
        if encoding.bit_rate is not None:
            video.bit_rate = encoding.bit_rate
        audio = None
        if encoding.audio:
            samples_per_s = 48_000 if encoding.audio == "libopus" else 44_100
            audio = container.add_stream(encoding.audio, rate=samples_per_s, layout="mono")
        for pts, frame in _frames(spec):
            frame.pts, frame.time_base = pts, base
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio is not None:
            _add_sound(container, audio, spec)
    return spec.path


def _muxer(encoding: Encoding) -> str:
    names = {"ts": "mpegts", "mkv": "matroska", "m4v": "mp4", "wmv": "asf", "mpg": "mpeg"}
    return names.get(encoding.suffix, encoding.suffix)
