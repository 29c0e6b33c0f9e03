"""The broken and hostile files of the generated bucket, each of which a real bucket has held.

Properties that hold: each file is a pure function of the seed; none reaches outside the bucket by itself, but several
ask a careless reader to (a playlist, a script for the concatenating demuxer), so a test can tell that ours does not.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from reelmae.tools.synth.encode import Job, Way, write_video
from reelmae.tools.synth.scene import make_scene, render

_OPTIONS = (("preset", "veryfast"), ("crf", "23"), ("x264-params", "mbtree=0"))


def _whole(folder: Path, seed: int, *, front: bool) -> bytes:
    """A good H.264 mp4 as bytes, its index (moov) in front or at the end."""
    path = folder / ".good.mp4"
    write_video(Job(str(path), "bounce", Way("mp4", "libx264", "25", 320, 240, options=_OPTIONS), 3.0, 0, (seed, 9001)))
    if front:
        moved = folder / ".front.mp4"
        with av.open(str(path)) as source, av.open(str(moved), "w", options={"movflags": "+faststart", "fflags": "+bitexact"}) as sink:  # fmt: skip
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
    data = _whole(path.parent, seed, front=False)
    path.write_bytes(data[: data.rindex(b"moov") - 4 - len(data) // 4])


def _cut_short(path: Path, seed: int) -> None:
    data = _whole(path.parent, seed, front=True)
    path.write_bytes(data[: len(data) // 2])


def _bit_flips(path: Path, seed: int) -> None:
    data = np.frombuffer(_whole(path.parent, seed, front=True), np.uint8).copy()
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
    """Twelve frames, the last of which is due in 116 days: filling the gap would write 289 million frames."""
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


# (folder by motion kind, name, maker): the folders are those of the good videos, as in a real bucket
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
