"""Makes a raw bucket that needs no download: generated videos that move like video, and broken or hostile files.

Properties that hold:
- The bucket is a pure function of (videos, broken, seed, seconds): the same bytes under the same names.
- Made twice it is made once: a file that is there is kept (each appears whole or not at all), so a stopped run goes on.
- Nothing but sources lies in it: no list, no marker.
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
from reelmae.tools.synth.encode import WAYS, Job, write_video
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
    """What lies in the bucket; `files` maps each path, relative to the folder, to `video` or `broken`."""

    folder: str
    files: dict[str, str]
    bytes: int

    @property
    def videos(self) -> int:
        """How many files are good videos."""
        return sum(kind == "video" for kind in self.files.values())

    @property
    def broken(self) -> int:
        """How many files are broken or hostile."""
        return len(self.files) - self.videos


def plan(folder: Path, *, videos: int, seed: int, seconds: float) -> list[Job]:
    """The videos to be written. Pure. Each motion kind (the first folder: the label) meets every third way of writing."""
    jobs = []
    for i in range(videos):
        way = WAYS[(i + i // len(WAYS) * 5) % len(WAYS)]  # the second round pairs motions and ways anew
        motion = MOTIONS[i % len(MOTIONS)]
        name = f"{_NAMES[i % len(_NAMES)].format(i=i)}.{way.suffix}"
        length = seconds * (0.85 + 0.3 * (i * 7 % 11) / 10)  # 0.85 … 1.15 of what was asked
        path = folder / motion / _FOLDERS[i // len(MOTIONS) % len(_FOLDERS)] / name
        jobs.append(Job(str(path), motion, way, length, int(i % CUT_EVERY == 2), (seed, i)))
    return jobs


def _start_worker() -> None:
    """In a worker: the parent handles Ctrl-C, and encoders' notes are no news to whoever waits for the bucket."""
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
    """Write the bucket and say what is in it; `on_file(done, all)` is called after each file.

    `seconds` is the mean length of a video. Files that are there already are kept. Raises ConfigError on a
    value out of range.
    """
    if videos < 1 or seconds < 0.5:
        raise ConfigError(f"videos={videos}, seconds={seconds}: give at least 1 video of at least 0.5 s")
    if not 0 <= broken <= len(BROKEN):
        raise ConfigError(f"broken={broken}: there are {len(BROKEN)} kinds of broken files; give 0 to {len(BROKEN)}")
    folder = Path(folder).absolute()
    jobs = plan(folder, videos=videos, seed=seed, seconds=seconds)
    total = videos + broken
    wanted = [job for job in jobs if not Path(job.path).exists()]
    done = videos - len(wanted)
    if wanted:
        # spawned, not forked: the caller may hold threads (torch, fsspec)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers or usable_cores(), len(wanted)), context, _start_worker) as pool:
            try:
                for finished in as_completed([pool.submit(write_video, job) for job in wanted]):
                    finished.result()
                    done += 1
                    if on_file is not None:
                        on_file(done, total)
            except BaseException:  # Ctrl-C too: what has not begun is not begun
                pool.shutdown(cancel_futures=True)
                raise
    files = {str(Path(job.path).relative_to(folder)): "video" for job in jobs}
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
