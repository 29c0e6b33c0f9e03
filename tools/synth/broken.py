"""The broken and hostile files of the generated bucket. Each kind has been seen in a real bucket.

Properties that hold: each file is a pure function of the seed; no file reaches outside the bucket by itself. Several
ask a careless reader to do so (a playlist, a script for the concatenating demuxer): a test shows that ours does not.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from reelmae.tools.synth.encode import Encoding, VideoSpec, write_video
from reelmae.tools.synth.scene import make_scene, render

_OPTIONS = (("preset", "veryfast"), ("crf", "23"), ("x264-params", "mbtree=0"))


def _good_video(folder: Path, seed: int, *, front: bool) -> bytes:
    """A good H.264 mp4 as bytes, its index (moov) in front or at the end."""
    path = folder / ".good.mp4"
    encoding = Encoding("mp4", "libx264", "25", 320, 240, options=_OPTIONS)
    write_video(VideoSpec(str(path), "bounce", encoding, 3.0, 0, (seed, 9001)))
    if front:
        moved = folder / ".front.mp4"
        options = {"movflags": "+faststart", "fflags": "+bitexact"}
        with av.open(str(path)) as source, av.open(str(moved), "w", options=options) as sink:
            stream = sink.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    sink.mux(packet)
        path.unlink()
        path = moved
    data = path.read_bytes()
    path.unlink()
    return data


def _empty(path: Path, seed: int) -> None:
    path.write_bytes(b"")


def _text(path: Path, seed: int) -> None:
    path.write_text("This is a note about a video, not a video.\n" * 40)


def _no_moov(path: Path, seed: int) -> None:
    data = _good_video(path.parent, seed, front=False)
    path.write_bytes(data[: data.rindex(b"moov") - 4 - len(data) // 4])


def _cut_short(path: Path, seed: int) -> None:
    data = _good_video(path.parent, seed, front=True)
    path.write_bytes(data[: len(data) // 2])


def _bit_flips(path: Path, seed: int) -> None:
    data = np.frombuffer(_good_video(path.parent, seed, front=True), np.uint8).copy()
    start = bytes(data).index(b"mdat") + 64
    where = np.random.default_rng([seed, 9002]).integers(start, len(data), max(40, len(data) // 400))
    data[where] ^= np.uint8(0x55)
    path.write_bytes(data.tobytes())


def _random(path: Path, seed: int) -> None:
    path.write_bytes(np.random.default_rng([seed, 9003]).bytes(150_000))


def _playlist(path: Path, seed: int) -> None:
    path.write_text(
        "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:10\n#EXTINF:10.0,\nfile:///etc/passwd\n"
        "#EXTINF:10.0,\nhttp://169.254.169.254/latest/meta-data/\n#EXT-X-ENDLIST\n"
    )


def _concat_script(path: Path, seed: int) -> None:
    path.write_text("ffconcat version 1.0\nfile empty.mp4\nfile /etc/hostname\n")


def _sound_only(path: Path, seed: int) -> None:
    t = np.arange(44_100 * 2) / 44_100
    wave = (np.sin(2 * np.pi * 220 * t) * 8000).astype(np.int16)[None]
    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("aac", rate=44_100, layout="mono")
        for start in range(0, wave.shape[1], 1024):
            frame = av.AudioFrame.from_ndarray(wave[:, start : start + 1024], format="s16", layout="mono")
            frame.sample_rate, frame.pts = 44_100, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _picture(path: Path, seed: int) -> None:
    shots = make_scene("spin", np.random.default_rng([seed, 9004]), width=320, height=240, seconds=1)
    Image.fromarray(render(shots, 0.0, width=320, height=240)).save(path, "JPEG", quality=85)


def _timestamp_bomb(path: Path, seed: int) -> None:
    """Twelve frames. The last is due after 116 days: a tool that fills the gap writes 289 million frames."""
    shots = make_scene("sway", np.random.default_rng([seed, 9005]), width=160, height=120, seconds=1)
    with av.open(str(path), "w", format="matroska", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        packets = []
        for i in range(12):
            frame = av.VideoFrame.from_ndarray(render(shots, i / 25, width=160, height=120), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 25)
            packets += stream.encode(frame)
        packets += stream.encode(None)
        packets[-1].pts = packets[-1].dts = 250_000_000  # the encoder itself would refuse such a gap
        container.mux(packets)


def _markup_name(path: Path, seed: int) -> None:
    path.write_bytes(np.random.default_rng([seed, 9006]).bytes(4_000))


# (motion kind: the folder, name, maker). They are in the same folders as the good videos, as in a real bucket
BROKEN: tuple[tuple[str, str, Callable[[Path, int], None]], ...] = (
    ("linear", "empty.mp4", _empty),
    ("linear", "notes.mp4", _text),
    ("bounce", "no moov.mp4", _no_moov),
    ("bounce", "cut short.mp4", _cut_short),
    ("orbit", "flipped_bits.mp4", _bit_flips),
    ("orbit", "random.mkv", _random),
    ("sway", "playlist.mp4", _playlist),
    ("linear", "script.mp4", _concat_script),
    ("fall", "sound only.mp4", _sound_only),
    ("spin", "photo.mp4", _picture),
    ("zoom", "timestamp_bomb.mkv", _timestamp_bomb),
    ("pan", "<img src=x onerror=alert(1)>.webm", _markup_name),
)
