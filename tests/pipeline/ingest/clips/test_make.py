"""One source into its clips: manifest spans, scenes, copying, borders, screens, colours. Frames show their number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from reelmae.pipeline.ingest.clips import transcode
from reelmae.pipeline.ingest.clips.outcome import Rejected
from reelmae.pipeline.schema import Reason

Encode = Callable[..., Any]
BITS = 12


def _numbered(number: int, width: int = 192, height: int = 64) -> np.ndarray:
    """RGB uint8 [H, W, 3] that carries its number as a row of black and white blocks."""
    bits = [(number >> i) & 1 for i in range(BITS)]
    row = np.repeat(np.array(bits, np.uint8) * 215 + 20, width // BITS)
    return np.repeat(np.tile(row, (height, 1))[..., None], 3, axis=-1)


def _numbers(pictures_THWC: np.ndarray) -> list[int]:
    """The numbers that clips of `_numbered` frames show."""
    middle = pictures_THWC[:, pictures_THWC.shape[1] // 2, :, 0].astype(int)
    blocks = middle.reshape(len(middle), BITS, -1).mean(axis=2)
    return [sum(1 << i for i, level in enumerate(blocks_) if level > 128) for blocks_ in blocks]


def _write(
    path: Path,
    frames: Sequence[np.ndarray],
    fps: Fraction | int = 25,
    times: Sequence[int] | None = None,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    **context: Any,
) -> Path:
    with av.open(str(path), "w") as container:
        options = {"preset": "ultrafast", "crf": "12", "g": "50"} if codec == "libx264" else {}
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        for i, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = (times[i] if times else i), 1 / Fraction(fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1200 numbered frames at 25 a second: 48 s."""
    path = tmp_path_factory.mktemp("numbered") / "v.mp4"
    return _write(path, [_numbered(i) for i in range(1200)])


def _shown(done: Any) -> list[list[int]]:
    return [_numbers(done.pictures(i)) for i in range(len(done.clips))]


@pytest.mark.parametrize("profile", ["default", "small", "vp9"])
def test_spans_of_a_manifest_show_exactly_their_frames(profile: str, encode: Encode, numbered: Path) -> None:
    rows = [(0.0, 0.4), (2.0, 4.0), (3.0, 5.0), (8.04, 9.0)]  # two of them overlap
    done = encode(numbered, rows=rows, profile=profile, clip_seconds=1)
    assert _shown(done) == [
        list(range(0, 10)),
        list(range(50, 100)),
        list(range(75, 125)),
        list(range(201, 225)),
    ]
    assert [(r.wanted_start_s, r.wanted_end_s) for r in done.rows] == rows
    assert [(r.span_start_s, r.span_end_s) for r in done.rows] == rows


@pytest.mark.parametrize("fps", [None, 7.5])
def test_a_span_far_into_a_file_is_the_same_with_and_without_seeking(
    fps: float | None, encode: Encode, numbered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [(40.0, 42.0), (44.0, None)]
    sought = encode(numbered, rows=rows, fps=fps)
    monkeypatch.setattr(transcode, "FAR_S", 1e9)
    plain = encode(numbered, rows=rows, fps=fps)
    assert _shown(sought) == _shown(plain)
    assert [p.read_bytes() for p in sought.clips] == [p.read_bytes() for p in plain.clips]
    if fps is None:
        assert _shown(plain) == [list(range(1000, 1050)), list(range(1100, 1200))]
    monkeypatch.undo()
    plan = transcode.EncodePlan(sought.kept, None, tuple(_spans(sought)), "x264")  # type: ignore[arg-type]
    assert 0 < transcode.frames_to_skip(sought.probe, plan) < 40 * sought.kept.fps


def _spans(done: Any) -> list[Any]:
    from reelmae.pipeline.ingest.clips.cut import Span

    return [Span(a, b, r.wanted_start_s, r.wanted_end_s) for (a, b), r in zip(done.spans, done.rows, strict=True)]


def test_more_spans_than_files_may_be_open_overlap(encode: Encode, numbered: Path) -> None:
    rows = [(0.4 * i, 0.4 * i + 20) for i in range(60)]
    done = encode(numbered, rows=rows)
    assert len(done.clips) == 60
    assert _numbers(done.pictures(59)) == list(range(590, 1090))


def test_a_span_beyond_the_end_is_a_reject_of_its_own(encode: Encode, numbered: Path) -> None:
    done = encode(numbered, rows=[(1.0, 2.0), (47.0, 90.0), (48.0, 50.0)])
    assert [r.frames for r in done.rows] == [25, 25]
    dropped = [(d["reason"], d["span_start_s"], d["span_end_s"]) for d in done.dropped]
    assert dropped == [("span_outside", 48.0, 50.0)]
    assert (done.rows[1].span_end_s, done.rows[1].wanted_end_s) == (48.0, 90.0)
    lost = encode(numbered, rows=[(100.0, 110.0)])
    assert (lost.reason, lost.detail) == (Reason.SPAN_OUTSIDE, "the video ends at 48 s")


def _scenes(lengths: Sequence[int]) -> list[np.ndarray]:
    """Stretches that look alike within and unlike each other; a square moves through each."""
    rng = np.random.default_rng(3)
    frames = []
    for length in lengths:
        base = np.repeat(np.repeat(rng.integers(0, 256, (4, 6, 3)), 32, axis=0), 32, axis=1).astype(np.uint8)
        for i in range(length):
            frames.append(base.copy())
            frames[-1][10:26, i : i + 16] = 255
    return frames


@pytest.mark.parametrize("profile", ["default", "small", "vp9"])
def test_clips_are_scenes(profile: str, encode: Encode, tmp_path: Path) -> None:
    path = _write(tmp_path / "v.mp4", _scenes([60, 20, 75, 55]))
    done = encode(path, cut="scenes", profile=profile, min_scene_seconds=1, clip_seconds=10)
    wanted = [(0.0, 2.4), (3.2, 6.2), (6.2, 8.4)]
    assert [(r.wanted_start_s, r.wanted_end_s) for r in done.rows] == wanted
    assert [(d["reason"], d["span_start_s"], d["span_end_s"]) for d in done.dropped] == [("too_short", 2.4, 3.2)]
    for row, (start, end) in zip(done.rows, wanted, strict=True):
        assert start <= row.span_start_s < start + 16 / 25  # at the cut, or at the next keyframe
        assert row.span_end_s == end
    for i in range(3):  # no clip shows a cut
        steps = np.abs(np.diff(done.pictures(i).astype(int), axis=0)).mean(axis=(1, 2, 3))
        assert steps.max() < 10
    if profile == "default":  # x264 itself put a keyframe on this cut
        assert done.rows[1].span_start_s == 3.2


def test_a_conforming_source_is_copied_at_its_keyframes(encode: Encode, tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        options = {"g": "40", "bf": "0", "sc_threshold": "0"}
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 192, 64, "yuv420p"
        for i in range(200):
            frame = av.VideoFrame.from_ndarray(_numbered(i), format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = i, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    done = encode(path, profile="copy", clip_seconds=2)
    assert {r.encoder for r in done.rows} == {"copy"}
    assert done.spans == [(0, 80), (80, 120), (120, 160), (160, 200)]
    assert [n for shown in _shown(done) for n in shown] == list(range(200))
    with av.open(str(path)) as before:
        packets = [bytes(p) for p in before.demux(video=0) if p.size]
    copied = []
    for clip in done.clips:
        with av.open(str(clip)) as after:
            copied += [bytes(p) for p in after.demux(video=0) if p.size]
    assert copied == packets
    other = encode(path, profile="copy", clip_seconds=2, short_side=48)  # has to be scaled
    assert {r.encoder for r in other.rows} == {"x264"}


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_black_borders_are_cropped(rotation: int, encode: Encode, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frames = []
    for i in range(30):
        picture = np.zeros((160, 200, 3), np.uint8)
        picture[20:120, 10:190] = 60 + i  # 20 above, 40 below, 10 left and right
        picture[20:40, 10:30] = 255  # a mark in the upper left corner
        picture[60:90, 60:120] = rng.integers(60, 255, 3)
        frames.append(picture)
    path = tmp_path / "v.mov"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "5"})
        stream.width, stream.height, stream.pix_fmt = 200, 160, "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for i, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = i, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    plain, cropped = encode(path), encode(path, crop_borders=True, crf=5)
    shape = (96, 176) if rotation % 180 == 0 else (176, 96)
    assert cropped.pictures().shape[1:3] == shape  # of 100 x 180, floored to sixteens
    assert plain.rows[0].border > 0.35
    assert cropped.rows[0].border == 0
    shown = cropped.pictures()[0]
    upright = np.rot90(shown, -rotation // 90)
    assert upright[2:12, 2:12].min() > 200
    assert upright.max(axis=2).min() > 40  # no black left


@pytest.mark.parametrize(
    ("reason", "picture"),
    [
        (Reason.DARK, lambda i: np.full((96, 128, 3), 2 + i % 2, np.uint8)),
        (Reason.BLANK, lambda i: np.full((96, 128, 3), 120 + i, np.uint8)),
        (Reason.STATIC, lambda i: _scenes([1])[0]),
        (Reason.BORDERS, lambda i: np.pad(_scenes([i + 1])[-1][:40, :64], ((40, 48), (60, 68), (0, 0)))),
    ],
)
def test_uncurated_screens_reject_with_their_score(
    reason: Reason, picture: Callable[[int], np.ndarray], encode: Encode, tmp_path: Path
) -> None:
    path = _write(tmp_path / "v.mp4", [picture(i) for i in range(75)])
    done = encode(path, preset="uncurated", min_luma=4 if reason == Reason.BORDERS else None)
    assert isinstance(done, Rejected)
    assert done.reason == reason, done.detail
    assert "min_" in done.detail or "max_border" in done.detail
    assert encode(path).rows[0].frames == 75  # the kinetics preset keeps it


def test_a_clip_that_is_screened_out_leaves_the_others(encode: Encode, tmp_path: Path) -> None:
    still = [_scenes([1])[0]] * 75
    done = encode(_write(tmp_path / "v.mp4", still + _scenes([75])), preset="uncurated", clip_seconds=3)
    assert [(r.span_start_s, r.key[-4:]) for r in done.rows] == [(3.0, "0001")]
    assert [(d["reason"], d["span_start_s"]) for d in done.dropped] == [("static", 0.0)]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"min_seconds": 3.5}, Reason.TOO_SHORT),
        ({"min_fps": 30.0}, Reason.LOW_FPS),
        ({"max_aspect": 1.2}, Reason.BAD_ASPECT),
        ({"min_side": 200}, Reason.TOO_SMALL),
    ],
)
def test_screens_on_facts(
    values: dict[str, Any], reason: Reason, encode: Encode, tmp_path: Path, make_video: Callable[..., Path]
) -> None:
    path = make_video(tmp_path / "v.mp4", frames=75, width=192, height=128)
    from reelmae.pipeline.ingest.clips.probe import Probe, Prober
    from reelmae.pipeline.ingest.clips.screen import screen_source
    from reelmae.pipeline.ingest.config import ShardConfig
    from reelmae.pipeline.ingest.sandbox import Sandbox

    prober = Prober(Sandbox(), tmp_path)
    probe = prober.probe(path, max_pixels=1 << 20, wall_s=60)
    prober.close()
    assert isinstance(probe, Probe)
    found = screen_source(probe, ShardConfig(**values))
    assert isinstance(found, Rejected)
    assert found.reason == reason
    assert str(next(iter(values))) in found.detail or reason == Reason.TOO_SMALL


@pytest.mark.parametrize(
    ("trc", "primaries", "space", "rule"),
    [
        (16, 9, 9, "pq>sdr"),
        (18, 9, 9, "hlg>sdr"),
        (1, 9, 9, "bt2020>bt709"),
        (1, 1, 1, "bt709>bt601"),
        (6, 6, 6, "none"),
    ],
)
def test_the_colour_rule_is_in_the_row_and_grey_stays_grey(
    trc: int, primaries: int, space: int, rule: str, encode: Encode, tmp_path: Path
) -> None:
    frames = [np.full((64, 96, 3), 128, np.uint8)] * 5
    path = _write(tmp_path / "v.mkv", frames, color_trc=trc, color_primaries=primaries, colorspace=space, color_range=1)
    done = encode(path, crf=5)
    assert done.rows[0].colour == rule
    level = done.pictures()[2].astype(int).mean(axis=(0, 1))
    assert np.ptp(level) <= 3
    if not rule.endswith("sdr"):
        assert abs(level.mean() - 128) < 3


def test_wide_gamut_is_brought_into_bt709(encode: Encode, tmp_path: Path) -> None:
    """A colour within BT.709, written with BT.2020 primaries, comes out as it was."""
    wanted = np.array([180, 90, 60], float)
    to_2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
    linear = np.where(wanted / 255 < 0.081, wanted / 255 / 4.5, ((wanted / 255 + 0.099) / 1.099) ** (1 / 0.45))
    wide = to_2020 @ linear
    coded = np.where(wide < 0.018, 4.5 * wide, 1.099 * wide**0.45 - 0.099) * 255
    picture = np.broadcast_to(coded.round().astype(np.uint8), (64, 96, 3)).copy()
    path = tmp_path / "v.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=10, options={"crf": "0"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "rgb24"
        stream.codec_context.color_primaries, stream.codec_context.color_trc = 9, 1
        for i in range(4):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    done = encode(path, crf=1)
    assert done.rows[0].colour == "bt2020>bt709"
    assert np.abs(done.pictures()[1].mean(axis=(0, 1)) - wanted).max() < 6


def test_spans_are_of_their_time_where_the_video_begins_late_and_changes_its_size(
    encode: Encode, tmp_path: Path
) -> None:
    """The size changes at frame 60; times begin at one second."""
    path = tmp_path / "v.ts"
    parts = []
    for number, (first, height) in enumerate(((0, 64), (60, 96))):
        part = tmp_path / f"{number}.ts"
        frames = [_numbered(first + i, height=height) for i in range(60)]
        _write(part, frames, times=[25 + first + i for i in range(60)])
        parts.append(part.read_bytes())
    path.write_bytes(b"".join(parts))
    done = encode(path, rows=[(0.4, 1.2), (2.0, 3.2)])
    # ffmpeg's fps filter gives no last frame before a change of size
    assert _shown(done) == [list(range(10, 30)), [*range(50, 59), *range(60, 80)]]
    assert {done.pictures(i).shape[1:3] for i in range(2)} == {(64, 192)}
    assert _shown(encode(path, rows=[(4.0, 4.4)])) == [list(range(100, 110))]
    # so the frames after it in the same encode are not where they were planned: rejected, never shown as other frames
    lost = encode(path, rows=[(0.4, 1.2), (2.0, 3.2), (4.0, 4.4)])
    assert (lost.reason, lost.detail) == (
        Reason.VERIFY_FAILED,
        "frame 50, where a clip begins, is no keyframe",
    )
