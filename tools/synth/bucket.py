"""Makes a raw bucket without a download: generated videos with movement like that of real ones, and broken files.

Properties that hold:
- The bucket is a pure function of (videos, broken, seed, seconds): the same bytes under the same names.
- A second run keeps the files that are there, so it completes a stopped run. A file appears whole or not at all.
- The bucket holds only sources: no list, no marker.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import av

from reelmae.pipeline.cores import usable_cores
from reelmae.pipeline.errors import ConfigError
from reelmae.pipeline.storage.store import whole_file
from reelmae.tools.synth.broken import BROKEN
from reelmae.tools.synth.encode import ENCODINGS, VideoSpec, write_video
from reelmae.tools.synth.scene import MOTIONS

CUT_EVERY = 5  # every fifth video has a hard cut
_NAMES = (
    "clip {i:03d}",
    "VID_{i:04d}",
    "été à vélo {i}",
    "{i:03d}-kamera",
    "動画 {i:03d}",
    "take.{i}.final (2)",
)
_FOLDERS = ("camera-a", "camera b", "приём")


@dataclass(frozen=True)
class SynthSummary:
    """What is in the bucket."""

    folder: str
    files: dict[str, str]
    """Path relative to the folder → `video` or `broken`."""
    bytes: int

    @property
    def n_videos(self) -> int:
        """How many files are good videos."""
        return sum(kind == "video" for kind in self.files.values())

    @property
    def n_broken(self) -> int:
        """How many files are broken or hostile."""
        return len(self.files) - self.n_videos


def plan_videos(folder: Path, *, videos: int, seed: int, seconds: float) -> list[VideoSpec]:
    """The videos to write. Pure. The first folder of a path is the motion kind: the label."""
    specs = []
    for i in range(videos):
        # each round over the encodings is shifted, so that a motion meets other encodings than before
        encoding = ENCODINGS[(i + i // len(ENCODINGS) * 5) % len(ENCODINGS)]
        motion = MOTIONS[i % len(MOTIONS)]
        name = f"{_NAMES[i % len(_NAMES)].format(i=i)}.{encoding.suffix}"
        length = seconds * (0.85 + 0.3 * (i * 7 % 11) / 10)  # 0.85 … 1.15 times `seconds`
        path = folder / motion / _FOLDERS[i // len(MOTIONS) % len(_FOLDERS)] / name
        specs.append(VideoSpec(str(path), motion, encoding, length, int(i % CUT_EVERY == 2), (seed, i)))
    return specs


def _start_worker() -> None:
    """Set up a worker: leave Ctrl-C to the parent, silence the encoders' notes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("SVT_LOG", "1")
    logging.getLogger("libav").setLevel(logging.ERROR)
    av.logging.set_level(av.logging.ERROR)


def make_bucket(
    folder: str | Path,
    *,
    videos: int = 48,
    broken: int = len(BROKEN),
    seed: int = 0,
    seconds: float = 4.5,
    workers: int | None = None,
    on_file: Callable[[int, int], None] | None = None,
) -> SynthSummary:
    """Write the bucket; returns what is in it. `on_file(done, all)` is called after each file.

    `seconds` is the mean length of a video. Files that are there already are kept. Raises ConfigError where a value
    is out of range.
    """
    if videos < 1 or seconds < 0.5:
        raise ConfigError(f"videos={videos}, seconds={seconds}: give at least 1 video of at least 0.5 s")
    if not 0 <= broken <= len(BROKEN):
        raise ConfigError(f"broken={broken}: there are {len(BROKEN)} kinds of broken files; give 0 to {len(BROKEN)}")
    folder = Path(folder).absolute()
    specs = plan_videos(folder, videos=videos, seed=seed, seconds=seconds)
    total = videos + broken
    wanted = [spec for spec in specs if not Path(spec.path).exists()]
    done = videos - len(wanted)
    if wanted:
        # spawned, not forked: the caller may hold threads (torch, fsspec)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers or usable_cores(), len(wanted)), context, _start_worker) as pool:
            try:
                for finished in as_completed([pool.submit(write_video, spec) for spec in wanted]):
                    finished.result()
                    done += 1
                    if on_file is not None:
                        on_file(done, total)
            except BaseException:  # Ctrl-C too: cancel the videos that have not begun
                pool.shutdown(cancel_futures=True)
                raise
    files = {str(Path(spec.path).relative_to(folder)): "video" for spec in specs}
    for kind, name, make in BROKEN[:broken]:
        path = folder / kind / _FOLDERS[0] / name
        if not path.exists():
            with whole_file(path) as part:
                make(part, seed)
        done += 1
        if on_file is not None:
            on_file(done, total)
        files[str(path.relative_to(folder))] = "broken"
    return SynthSummary(str(folder), files, sum((folder / name).stat().st_size for name in files))
