"""The sample tables of an mp4, against FFmpeg's own reading of them."""

import io
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from reelmae.pipeline.loading.decode.mp4 import read_track

KINDS = {
    "h264": {"codec": "libx264"},
    "h264 with sound before it": {"codec": "libx264", "audio": True},
    "h264 with B-frames": {"codec": "libx264", "options": (("preset", "medium"), ("g", "12"), ("flags", "+cgop"))},
    "hevc": {"codec": "libx265", "options": (("preset", "ultrafast"), ("x265-params", "log-level=none"))},
    "vp9": {"codec": "libvpx-vp9"},
    "av1": {"codec": "libsvtav1"},
}


@pytest.fixture(params=KINDS, scope="module")
def video(request: pytest.FixtureRequest, make_video: Callable, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    values = KINDS[request.param]
    if values["codec"] not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {values['codec']}")
    path: Path = make_video(tmp_path_factory.mktemp("mp4") / "a.mp4", frames=45, seed=3, **values)
    return path.read_bytes()


def test_tables_are_those_of_ffmpeg(video: bytes) -> None:
    track = read_track(video)
    with av.open(io.BytesIO(video)) as container:
        stream = container.streams.video[0]
        assert av.Codec(track.codec, "r").canonical_name == stream.codec_context.codec.canonical_name
        packets = [p for p in container.demux(stream) if p.size]
        assert av.Codec(track.codec, "r").canonical_name == stream.codec_context.codec.canonical_name
        assert track.extradata == (stream.codec_context.extradata or b"") or track.codec == "vp9"
    assert [video[o : o + s] for o, s in zip(track.offsets, track.sizes, strict=True)] == [bytes(p) for p in packets]
    assert track.keyframes.tolist() == [i for i, p in enumerate(packets) if p.is_keyframe]
    assert track.numbers.tolist() == np.argsort(np.argsort([p.pts for p in packets])).tolist()


def test_packets_taken_by_the_tables_decode_to_the_same_frames(video: bytes) -> None:
    with av.open(io.BytesIO(video)) as container:
        expected = [f.to_ndarray(format="yuv420p") for f in container.decode(video=0)]
    track = read_track(video)
    context = av.CodecContext.create(track.codec, "r")
    context.extradata = track.extradata or None
    frames = []
    for offset, size, number in zip(track.offsets, track.sizes, track.numbers, strict=True):
        packet = av.Packet(video[offset : offset + size])
        packet.pts = int(number)
        frames += context.decode(packet)
    frames += context.decode(None)
    assert [f.pts for f in frames] == list(range(len(expected)))
    assert all((f.to_ndarray(format="yuv420p") == e).all() for f, e in zip(frames, expected, strict=True))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no moov box"),
        (b"not a video at all, only text", "ends within a box"),
        (b"\0\0\0\x08moov", "no video stream"),
        (b"\0\0\0\x01moov", "damaged"),
        (b"\0\0\0\x10moov\0\0\0\x08trak", "damaged"),
    ],
)
def test_what_is_no_clip_is_a_value_error(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_track(data)


def test_a_clip_without_pictures_is_told(make_video: Callable, tmp_path: Path) -> None:
    data = bytearray(make_video(tmp_path / "a.mp4", frames=4).read_bytes())
    for box, at, count in ((b"stsz", 12, 0), (b"stco", 8, 0), (b"stsc", 8, 1)):
        begin = data.index(box) + at
        data[begin : begin + 4] = count.to_bytes(4, "big")
    with pytest.raises(ValueError, match="holds no picture"):
        read_track(bytes(data))


def test_a_clip_that_ends_early_is_told(make_video: Callable, tmp_path: Path) -> None:
    path: Path = make_video(tmp_path / "a.mp4", frames=45)
    with (
        av.open(str(path)) as source,
        av.open(str(tmp_path / "b.mp4"), "w", options={"movflags": "faststart"}) as out,
    ):
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    data = (tmp_path / "b.mp4").read_bytes()
    assert len(read_track(data)) == 45
    with pytest.raises(ValueError, match=r"ends within a box|ends before its last picture"):
        read_track(data[:-50])


def test_flipped_bits_in_the_tables_raise_nothing_but_value_errors(make_video: Callable, tmp_path: Path) -> None:
    data = bytearray(make_video(tmp_path / "a.mp4", frames=20, audio=True).read_bytes())
    rng = np.random.default_rng(0)
    start = data.index(b"moov")
    refused = 0
    for _ in range(3000):
        damaged = bytearray(data)
        for at in rng.integers(start, len(data), 3):
            damaged[at] ^= 1 << int(rng.integers(8))
        try:
            track = read_track(bytes(damaged))
            assert len(track.offsets) == len(track.sizes) == len(track.numbers)
            assert (track.offsets + track.sizes <= len(damaged)).all()
        except ValueError:
            refused += 1
    assert refused > 300
