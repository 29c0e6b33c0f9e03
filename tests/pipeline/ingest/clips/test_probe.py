"""Facts come from the content: a name may lie, and text is no video."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import pytest

from reelmae.pipeline.ingest.clips.outcome import Rejected
from reelmae.pipeline.ingest.clips.probe import Probe, Prober
from reelmae.pipeline.ingest.clips.probe_child import container_of
from reelmae.pipeline.ingest.sandbox import Sandbox
from reelmae.pipeline.schema import Reason

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def prober(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prober]:
    prober = Prober(Sandbox(), tmp_path_factory.mktemp("prober"))
    yield prober
    prober.close()


def _facts(prober: Prober, path: Path) -> Probe:
    found = prober.probe(path, max_pixels=1 << 26, wall_s=60)
    assert isinstance(found, Probe), found
    return found


def _reason(prober: Prober, path: Path) -> Reason:
    found = prober.probe(path, max_pixels=1 << 26, wall_s=60)
    assert isinstance(found, Rejected), found
    return found.reason


@pytest.mark.parametrize(
    ("name", "codec", "container"),
    [
        ("v.mp4", "libx264", "mov"),
        ("v.mkv", "libx264", "matroska"),
        ("v.webm", "libvpx", "matroska"),
        ("v.avi", "mpeg4", "avi"),
        ("v.ts", "libx264", "mpegts"),
        ("v.mpg", "mpeg2video", "mpeg"),
        ("v.m2v", "mpeg2video", "mpegvideo"),
        ("v.flv", "flv", "flv"),
        ("v.wmv", "wmv2", "asf"),
    ],
)
def test_frames_rate_and_container_under_a_lying_name(
    name: str, codec: str, container: str, prober: Prober, make_video: Make, tmp_path: Path
) -> None:
    path = make_video(tmp_path / name, codec=codec, frames=30).rename(tmp_path / "in.txt")
    facts = _facts(prober, path)
    assert (facts.container, facts.packets, facts.width, facts.height) == (container, 30, 96, 64)
    assert facts.duration_s == pytest.approx(1.2, abs=0.03)
    assert facts.decoded


def test_gif_rotation_and_pixel_aspect(prober: Prober, make_video: Make, tmp_path: Path) -> None:
    gif = _facts(prober, make_video(tmp_path / "a.gif", codec="gif", pix_fmt="rgb8", fps=10, frames=12))
    assert (gif.container, gif.packets) == ("gif", 12)
    turned = _facts(prober, make_video(tmp_path / "t.mp4", rotation=90))
    assert turned.rotation % 360 in (90, 270)
    assert _facts(prober, make_video(tmp_path / "s.mp4", sar=Fraction(4, 3))).sar == pytest.approx(4 / 3)


def test_variable_rate_is_measured(prober: Prober, make_video: Make, tmp_path: Path) -> None:
    times = tuple(t * t for t in range(20))
    facts = _facts(prober, make_video(tmp_path / "v.mkv", times=times, frames=20))
    assert facts.rate == pytest.approx(20 / (361 / 25 + 361 / 25 / 19), rel=0.05)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", Reason.EMPTY_FILE),
        (b"plain text\n" * 200, Reason.NOT_A_VIDEO),
        (b"ffconcat version 1.0\nfile 'other.mp4'\n", Reason.NOT_A_VIDEO),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", Reason.NOT_A_VIDEO),
        (b"\xff\xd8\xff\xe0" + bytes(500), Reason.NOT_A_VIDEO),
        (bytes(5000), Reason.NOT_A_VIDEO),
        (b"\0\0\0\x18ftypisom" + bytes(500), Reason.UNREADABLE),
        (b"\x1aE\xdf\xa3" + bytes(500), Reason.UNREADABLE),
    ],
)
def test_what_is_no_video_is_told(content: bytes, reason: Reason, prober: Prober, tmp_path: Path) -> None:
    path = tmp_path / "in.mp4"
    path.write_bytes(content)
    assert _reason(prober, path) == reason


def test_sound_only_has_no_video_stream(prober: Prober, make_video: Make, tmp_path: Path) -> None:
    import av

    whole = make_video(tmp_path / "v.mp4", audio=True)
    with av.open(str(whole)) as source, av.open(str(tmp_path / "a.mp4"), "w") as sink:
        stream = sink.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(source.streams.audio[0]):
            if packet.dts is not None:
                packet.stream = stream
                sink.mux(packet)
    assert _reason(prober, tmp_path / "a.mp4") == Reason.NO_VIDEO_STREAM


def test_a_killed_child_is_replaced(prober: Prober, make_video: Make, tmp_path: Path) -> None:
    from reelmae.pipeline.errors import ChildTimeoutError

    path = make_video(tmp_path / "v.mp4")
    with pytest.raises(ChildTimeoutError):
        prober.probe(path, max_pixels=1 << 26, wall_s=1e-6)
    assert _facts(prober, path).packets == 20


def test_verify_tells_what_a_clip_is_and_what_is_damaged(prober: Prober, make_video: Make, tmp_path: Path) -> None:
    clip = make_video(tmp_path / "c.mp4", fps=25, frames=20, options=(("bf", "0"), ("color_range", "tv")))
    good, bad = tmp_path / "good.mp4", tmp_path / "bad.mp4"
    shutil.copy(clip, good)
    bad.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    whole, broken = prober.verify([good, bad], wall_s=60)
    assert (whole.frames, whole.key_first, whole.from_zero, whole.codec) == (20, True, True, "h264")
    assert whole.steps_s == (0.04,)
    asked = {"frames": 20, "fps": Fraction(25), "width": 96, "height": 64, "codec": "h264"}
    assert "frames: 20, wanted 21" in whole.fault(**{**asked, "frames": 21})  # type: ignore[arg-type]
    assert "codec" in whole.fault(**{**asked, "codec": "vp9"})  # type: ignore[arg-type]
    assert broken.fault(**asked)  # type: ignore[arg-type]


def test_transport_streams_are_told_by_their_sync_bytes() -> None:
    packet = b"\x47" + bytes(187)
    assert container_of(packet * 6) == "mpegts"
    assert container_of((bytes(4) + packet) * 6) == "mpegts"
    assert container_of(packet + bytes(2000)) is None
