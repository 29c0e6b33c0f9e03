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
from reelmae.tools.synth.bucket import SynthSummary, make_bucket, plan
from reelmae.tools.synth.encode import WAYS, Job, Way, frame_times, write_video
from reelmae.tools.synth.scene import MOTIONS, make_scene, render

SECONDS = 0.8


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SynthSummary:
    """One video of each way, and every broken file."""
    return make_bucket(tmp_path_factory.mktemp("raw"), videos=len(WAYS), seconds=SECONDS)


def digests(summary: SynthSummary) -> dict[str, str]:
    return {name: hashlib.sha256(Path(summary.folder, name).read_bytes()).hexdigest() for name in summary.files}


def test_every_good_video_opens_and_has_all_its_frames(made: SynthSummary) -> None:
    jobs = plan(Path(made.folder), videos=len(WAYS), seed=0, seconds=SECONDS)
    for job in jobs:
        with av.open(job.path) as container:
            frames = sum(1 for _ in container.decode(video=0))
            sound = len(container.streams.audio)
        assert frames == len(frame_times(job.way, job.seconds)), job.path
        assert sound == (job.way.audio is not None), job.path


def test_the_bucket_is_a_mixture(made: SynthSummary) -> None:
    names = [name for name, kind in made.files.items() if kind == "video"]
    assert len({Path(name).suffix for name in names}) >= 10
    assert {Path(name).parts[0] for name in names} == set(MOTIONS)
    assert len({way.codec for way in WAYS}) >= 10
    assert {90, 180, 270} <= {way.rotation for way in WAYS}
    assert made.videos == len(WAYS)
    assert made.broken == len(BROKEN) >= 8


def test_nothing_but_the_sources_lies_in_the_bucket(made: SynthSummary) -> None:
    found = {str(p.relative_to(made.folder)) for p in Path(made.folder).rglob("*") if p.is_file()}
    assert found == set(made.files)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(made: SynthSummary, tmp_path: Path) -> None:
    again = make_bucket(tmp_path / "again", videos=len(WAYS), seconds=SECONDS)
    assert digests(again) == digests(made)
    other = make_bucket(tmp_path / "other", videos=2, broken=0, seconds=SECONDS, seed=1)
    assert not set(digests(other).values()) & set(digests(made).values())


def test_a_stopped_bucket_is_completed_and_what_is_there_is_kept(made: SynthSummary, tmp_path: Path) -> None:
    first = make_bucket(tmp_path, videos=2, broken=0, seconds=SECONDS)
    before = {name: Path(tmp_path, name).stat().st_mtime_ns for name in first.files}
    more = make_bucket(tmp_path, videos=4, broken=2, seconds=SECONDS)
    assert {name: Path(tmp_path, name).stat().st_mtime_ns for name in first.files} == before
    assert digests(more).items() <= digests(made).items()


@pytest.mark.parametrize("way", [way for way in WAYS if way.rotation], ids=lambda way: f"{way.rotation}")
def test_a_rotated_video_is_upright_when_played(way: Way, tmp_path: Path) -> None:
    job = Job(str(tmp_path / f"turned.{way.suffix}"), "linear", way, 0.5, 0, (5, 1))
    write_video(job)
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin"]  # it turns as a player does
    subprocess.run([*ffmpeg, "-i", job.path, "-frames:v", "1", tmp_path / "first.png"], check=True)
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
def test_a_broken_file_does_not_decode_cleanly(made: SynthSummary, name: str) -> None:
    (path,) = [Path(made.folder, file) for file in made.files if file.endswith(f"/{name}")]
    with pytest.raises((av.error.FFmpegError, IndexError)), av.open(str(path), options={"err_detect": "explode"}) as c:  # fmt: skip
        frames = sum(1 for _ in c.decode(c.streams.video[0]))
        if frames < 75:
            raise IndexError(f"only {frames} of 75 frames")


def test_values_out_of_range_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="broken=99"):
        make_bucket(tmp_path, broken=99)
    with pytest.raises(ConfigError, match="videos=0"):
        make_bucket(tmp_path, videos=0)
