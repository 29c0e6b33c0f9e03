"""The generated bucket: it opens, it moves, it is the same for a seed, and its broken files are broken."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from reelmae.pipeline.errors import ConfigError
from reelmae.tools.synth.broken import BROKEN
from reelmae.tools.synth.bucket import SynthSummary, make_bucket, plan_videos
from reelmae.tools.synth.encode import ENCODINGS, Encoding, VideoSpec, frame_times, write_video
from reelmae.tools.synth.scene import MOTIONS, make_scene, render

SECONDS = 0.8


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> SynthSummary:
    """One video of each encoding, and every broken file."""
    return make_bucket(tmp_path_factory.mktemp("raw"), videos=len(ENCODINGS), seconds=SECONDS)


def digests(summary: SynthSummary) -> dict[str, str]:
    return {name: hashlib.sha256(Path(summary.folder, name).read_bytes()).hexdigest() for name in summary.files}


def test_every_good_video_opens_and_has_all_its_frames(bucket: SynthSummary) -> None:
    specs = plan_videos(Path(bucket.folder), videos=len(ENCODINGS), seed=0, seconds=SECONDS)
    for spec in specs:
        with av.open(spec.path) as container:
            frames = sum(1 for _ in container.decode(video=0))
            sound = len(container.streams.audio)
        assert frames == len(frame_times(spec.encoding, spec.seconds)), spec.path
        assert sound == (spec.encoding.audio is not None), spec.path


def test_the_bucket_is_a_mixture(bucket: SynthSummary) -> None:
    names = [name for name, kind in bucket.files.items() if kind == "video"]
    assert len({Path(name).suffix for name in names}) >= 10
    assert {Path(name).parts[0] for name in names} == set(MOTIONS)
    assert len({encoding.codec for encoding in ENCODINGS}) >= 10
    assert {90, 180, 270} <= {encoding.rotation for encoding in ENCODINGS}
    assert bucket.n_videos == len(ENCODINGS)
    assert bucket.n_broken == len(BROKEN) >= 8


def test_nothing_but_the_sources_lies_in_the_bucket(bucket: SynthSummary) -> None:
    found = {str(p.relative_to(bucket.folder)) for p in Path(bucket.folder).rglob("*") if p.is_file()}
    assert found == set(bucket.files)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(bucket: SynthSummary, tmp_path: Path) -> None:
    again = make_bucket(tmp_path / "again", videos=len(ENCODINGS), seconds=SECONDS)
    assert digests(again) == digests(bucket)
    other = make_bucket(tmp_path / "other", videos=2, broken=0, seconds=SECONDS, seed=1)
    assert not set(digests(other).values()) & set(digests(bucket).values())


def test_a_stopped_bucket_is_completed_and_what_is_there_is_kept(bucket: SynthSummary, tmp_path: Path) -> None:
    first = make_bucket(tmp_path, videos=2, broken=0, seconds=SECONDS)
    before = {name: Path(tmp_path, name).stat().st_mtime_ns for name in first.files}
    more = make_bucket(tmp_path, videos=4, broken=2, seconds=SECONDS)
    assert {name: Path(tmp_path, name).stat().st_mtime_ns for name in first.files} == before
    assert digests(more).items() <= digests(bucket).items()


@pytest.mark.parametrize(
    "encoding", [encoding for encoding in ENCODINGS if encoding.rotation], ids=lambda encoding: f"{encoding.rotation}"
)
def test_a_rotated_video_is_upright_when_played(encoding: Encoding, tmp_path: Path) -> None:
    spec = VideoSpec(str(tmp_path / f"turned.{encoding.suffix}"), "linear", encoding, 0.5, 0, (5, 1))
    write_video(spec)
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin"]  # it turns as a player does
    subprocess.run([*ffmpeg, "-i", spec.path, "-frames:v", "1", tmp_path / "first.png"], check=True)
    with Image.open(tmp_path / "first.png") as image:
        played = np.asarray(image.convert("RGB")).astype(int)
    height, width = played.shape[:2]
    shots = make_scene("linear", np.random.default_rng((5, 1)), width=width, height=height, seconds=0.5)
    wanted = render(shots, 0.0, width=width, height=height).astype(int)
    assert np.abs(played - wanted).mean() < 6
    assert np.abs(played - wanted[::-1, ::-1]).mean() > 12


@pytest.mark.parametrize("motion", MOTIONS)
def test_every_motion_moves_smoothly(motion: str) -> None:
    shots = make_scene(motion, np.random.default_rng(7), width=160, height=120, seconds=2)
    frames = np.stack([render(shots, i / 30, width=160, height=120) for i in range(31)]).astype(int)
    steps = np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3))
    assert np.abs(frames[30] - frames[0]).mean() > 3 * steps.mean() > 0
    assert steps.max() < 25


@pytest.mark.parametrize("name", [name for _, name, _ in BROKEN if name not in ("photo.mp4", "timestamp_bomb.mkv")])
def test_a_broken_file_does_not_decode_cleanly(bucket: SynthSummary, name: str) -> None:
    (path,) = [Path(bucket.folder, file) for file in bucket.files if file.endswith(f"/{name}")]
    strict = {"err_detect": "explode"}
    with pytest.raises((av.error.FFmpegError, IndexError)), av.open(str(path), options=strict) as c:
        frames = sum(1 for _ in c.decode(c.streams.video[0]))
        if frames < 75:
            raise IndexError(f"only {frames} of 75 frames")


def test_values_out_of_range_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="broken=99"):
        make_bucket(tmp_path, broken=99)
    with pytest.raises(ConfigError, match="videos=0"):
        make_bucket(tmp_path, videos=0)
