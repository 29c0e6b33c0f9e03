"""Clips are what the format promises: frames, times, keyframes, size, colour, bytes."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from reelmae.pipeline.ingest.clips.colour import Colour, choose_colour
from reelmae.pipeline.ingest.clips.cut import Span
from reelmae.pipeline.ingest.clips.outcome import Rejected
from reelmae.pipeline.ingest.clips.transcode import EncodePlan, command
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.ffmpeg import find_ffmpeg
from reelmae.pipeline.schema import Reason

Make = Callable[..., Path]
Encode = Callable[..., Any]
BT709 = 1


@pytest.mark.parametrize("profile", ["default", "fast-decode", "small", "vp9"])
def test_every_clip_has_its_span_and_conforms(profile: str, encode: Encode, make_video: Make, tmp_path: Path) -> None:
    source = make_video(tmp_path / "v.mkv", frames=70, fps=25, audio=True)
    done = encode(source, profile=profile, clip_seconds=1.2, gop=8)
    assert done.spans == [(0, 30), (30, 70)]
    found = done.prober.verify(done.clips, wall_s=60)
    codec = {"vp9": "vp9", "small": "hevc"}.get(profile, "h264")
    for clip, (start, end) in zip(found, done.spans, strict=True):
        assert clip.fault(frames=end - start, fps=Fraction(25), width=96, height=64, codec=codec) == ""
    for path in done.clips:
        data = path.read_bytes()
        assert 0 < data.find(b"moov") < data.find(b"mdat")
        with av.open(str(path)) as container:
            assert len(container.streams) == 1
            assert set(container.metadata) <= {"major_brand", "minor_version", "compatible_brands"}
            packets = [p for p in container.demux(video=0) if p.size]
            assert [i for i, p in enumerate(packets) if p.is_keyframe] == list(range(0, len(packets), 8))
            assert all(p.pts == p.dts for p in packets)  # no B-frames


def test_clips_show_the_frames_of_their_span(
    encode: Encode, make_video: Make, make_pictures: Callable[..., Any], tmp_path: Path
) -> None:
    source = make_video(tmp_path / "v.mp4", frames=60, fps=20, options=(("crf", "10"),))
    done = encode(source, clip_seconds=1, crf=10)
    wanted = np.stack(list(make_pictures(60, 96, 64))).astype(np.float32)
    for clip, (start, end) in enumerate(done.spans):
        nearest = [int(np.abs(wanted - shown).mean(axis=(1, 2, 3)).argmin()) for shown in done.pictures(clip)]
        assert nearest == list(range(start, end))


def test_two_runs_give_equal_bytes(encode: Encode, make_video: Make, tmp_path: Path) -> None:
    source = make_video(tmp_path / "v.mp4", frames=40, width=130, height=98)
    one, two = encode(source, clip_seconds=1), encode(source, clip_seconds=1)
    assert [p.read_bytes() for p in one.clips] == [p.read_bytes() for p in two.clips]


@pytest.mark.parametrize(("rotation", "turns"), [(90, 1), (180, 2), (270, 3)])
def test_rotation_is_applied(
    rotation: int,
    turns: int,
    encode: Encode,
    make_video: Make,
    make_pictures: Callable[..., Any],
    tmp_path: Path,
) -> None:
    done = encode(make_video(tmp_path / "v.mp4", rotation=rotation), crf=10)
    first = next(make_pictures(1, 96, 64)).astype(int)
    differences = [
        np.abs(done.pictures()[0] - turned).mean()
        if (turned := np.rot90(first, k)).shape == done.pictures()[0].shape
        else 99
        for k in range(4)
    ]
    assert int(np.argmin(differences)) == turns
    assert differences[turns] < 10


def test_pixel_aspect_is_applied(encode: Encode, make_video: Make, tmp_path: Path) -> None:
    done = encode(make_video(tmp_path / "v.mp4", sar=Fraction(2, 1)))
    assert done.pictures().shape[1:3] == (64, 192)


def test_scaling_keeps_the_aspect_and_crops_the_rest(
    encode: Encode, make_video: Make, make_pictures: Callable[..., Any], tmp_path: Path
) -> None:
    done = encode(make_video(tmp_path / "v.mp4", width=200, height=100), short_side=96, crf=10)
    assert done.pictures().shape[1:3] == (96, 192)
    done = encode(make_video(tmp_path / "w.mp4", width=200, height=110), short_side=256, crf=10)
    assert done.pictures().shape[1:3] == (96, 192)  # cropped from 192x105.6
    whole = next(make_pictures(1, 200, 110)).astype(float)
    middle = whole[5:105, :].reshape(100, 200, 3)
    rows = np.linspace(0, 99, 96).round().astype(int)
    columns = np.linspace(0, 199, 192).round().astype(int)
    assert np.abs(done.pictures()[0] - middle[rows][:, columns]).mean() < 12


@pytest.mark.parametrize("kind", ["bt709", "full range", "rgb"])
def test_colours_survive_into_bt601_limited(kind: str, encode: Encode, tmp_path: Path) -> None:
    colour = np.array([200, 60, 40], np.uint8)
    picture = np.broadcast_to(colour, (64, 96, 3)).copy()
    path = tmp_path / "v.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb" if kind == "rgb" else "libx264", rate=10)
        stream.width, stream.height = 96, 64
        stream.pix_fmt = {"bt709": "yuv420p", "full range": "yuvj420p", "rgb": "rgb24"}[kind]
        if kind == "bt709":
            stream.codec_context.colorspace = BT709
        for i in range(5):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if kind != "rgb":
                matrix = (
                    av.video.reformatter.Colorspace.ITU709
                    if kind == "bt709"
                    else av.video.reformatter.Colorspace.ITU601
                )
                frame = frame.reformat(format=stream.pix_fmt, dst_colorspace=matrix)
            frame.pts, frame.time_base = i, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    done = encode(path, crf=5)
    with av.open(str(done.clips[0])) as container:
        frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_range) == (6, 1)  # smpte170m, limited
    assert np.abs(done.pictures()[2].mean(axis=(0, 1)) - colour).max() < 4


def test_transparent_is_black(encode: Encode, tmp_path: Path) -> None:
    path = tmp_path / "v.mov"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "rgba"
        picture = np.full((64, 64, 4), 255, np.uint8)
        picture[:, 32:, 3] = 0
        for i in range(4):
            frame = av.VideoFrame.from_ndarray(picture, format="rgba")
            frame.pts, frame.time_base = i, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    shown = encode(path, crf=5).pictures()[1]
    assert shown[:, :24].min() > 245
    assert shown[:, 40:].max() < 10


def test_lower_rate_picks_frames_in_time(encode: Encode, make_video: Make, tmp_path: Path) -> None:
    done = encode(make_video(tmp_path / "v.mp4", frames=60, fps=30), fps=7.5)
    assert done.kept.fps == Fraction(15, 2)
    assert done.pictures().shape[0] == 15


def test_frames_far_apart_are_not_expanded(encode: Encode, make_video: Make, tmp_path: Path) -> None:
    times = (*range(20), 20 + 25 * 60)  # the last frame a minute later
    done = encode(make_video(tmp_path / "v.mkv", frames=21, times=times))
    assert done.pictures().shape[0] <= 21


def test_damage_in_the_middle_rejects_the_source(encode: Encode, make_video: Make, tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.mkv", frames=50)
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    for at in rng.integers(len(data) // 3, len(data) - 200, 40):
        data[at] ^= 0xFF
    path.write_bytes(data)
    done = encode(path)
    assert isinstance(done, Rejected)
    assert done.reason == Reason.DECODE_ERRORS
    assert "<file>" in done.detail or "[" in done.detail


def test_the_command_reads_only_the_named_container(encode: Encode, make_video: Make, tmp_path: Path) -> None:
    done = encode(make_video(tmp_path / "v.mp4"))
    found = choose_colour(done.probe, tonemaps=True)
    assert isinstance(found, Colour)
    plan = EncodePlan(done.kept, found, (Span(0, 20, 0.0, 0.8),), "x264")
    argv = command(find_ffmpeg(), tmp_path / "in.bin", done.probe, plan, ShardConfig())
    joined = " ".join(argv)
    assert "-f mov -format_whitelist mov" in joined
    assert "-protocol_whitelist file,pipe" in joined
    assert f"file:{tmp_path}/in.bin" in argv
