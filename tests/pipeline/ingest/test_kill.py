"""Killed at random moments, a job resumes to the bytes of an undisturbed one; nothing of it lives on."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from reelmae.pipeline import schema
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.job import shard

pytestmark = pytest.mark.slow
KILLS = 21  # of each number of workers
CONFIG = ShardConfig(
    short_side=48, clip_seconds=1, sources_per_task=1, labels="folder", shard_bytes=20_000, duplicates="near"
)
CODE = (
    "import sys\n"
    "from reelmae.pipeline.ingest.job import shard\n"
    "from reelmae.pipeline.ingest.config import ShardConfig\n"
    "config = ShardConfig.model_validate_json(sys.argv[3])\n"
    "shard(sys.argv[1], sys.argv[2], config, workers=int(sys.argv[4]))"
)


def _files(dst: Path) -> dict[str, bytes]:
    return {str(p.relative_to(dst)): p.read_bytes() for p in sorted(dst.rglob("*")) if p.is_file()}


def _start(src: Path, dst: Path, workers: int, scratch_folder: Path) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-c", CODE, str(src), str(dst), CONFIG.model_dump_json(), str(workers)]
    return subprocess.Popen(argv, env={**os.environ, "TMPDIR": str(scratch_folder)}, start_new_session=True)


@pytest.fixture(scope="module")
def undisturbed(tiny_bucket: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], float]:
    """The files of a job that ran through, and the seconds that the whole process took."""
    folder = tmp_path_factory.mktemp("undisturbed")
    begin = time.monotonic()
    assert _start(tiny_bucket, folder / "dst", 1, folder).wait() == 0
    return _files(folder / "dst"), time.monotonic() - begin


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(
    list_processes: Callable[[Path], list[int]],
    workers: int,
    tiny_bucket: Path,
    undisturbed: tuple[dict[str, bytes], float],
    tmp_path: Path,
) -> None:
    wanted, seconds = undisturbed
    draw = random.Random(workers)
    kills = rounds = 0
    progress: set[int] = set()  # committed tasks when it was killed
    while kills < KILLS:
        dst, rounds = tmp_path / f"dst{rounds}", rounds + 1
        for _ in range(4):  # killed up to four times on its way
            process = _start(tiny_bucket, dst, workers, tmp_path)
            try:
                process.wait(timeout=draw.uniform(0.3, 0.9 * seconds))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                kills += 1
                progress.add(len(list(dst.glob("commits/*.parquet"))))
                deadline = time.monotonic() + 10
                while list_processes(tmp_path):
                    assert time.monotonic() < deadline, "children live on"
                    time.sleep(0.01)
        shard(str(tiny_bucket), str(dst), CONFIG, workers=workers)
        assert _files(dst) == wanted
    assert len(progress) > 2  # not always at the same place


def test_a_killed_child_costs_nothing(
    list_processes: Callable[[Path], list[int]],
    tiny_bucket: Path,
    undisturbed: tuple[dict[str, bytes], float],
    tmp_path: Path,
) -> None:
    """The system's own killer may take any process: a source whose decoder was killed is tried again."""
    draw = random.Random(0)
    dst = tmp_path / "dst"
    process = _start(tiny_bucket, dst, 1, tmp_path)
    killed_at: list[int] = []  # commits when a child was killed: never twice at one source
    while process.poll() is None:
        time.sleep(draw.uniform(0.005, 0.05))
        children = [pid for pid in list_processes(tmp_path) if pid != process.pid and "reelmae-work-" in _cwd(pid)]
        commits = len(list(dst.glob("commits/*.parquet")))
        if children and len(killed_at) < 5 and commits > (killed_at[-1] + 1 if killed_at else -1):
            with contextlib.suppress(ProcessLookupError):
                os.kill(draw.choice(children), signal.SIGKILL)
                killed_at.append(len(list(dst.glob("commits/*.parquet"))))
    assert len(killed_at) == 5
    assert process.returncode == 0
    rejects = pq.read_table(dst / schema.REJECTS_FILE).to_pylist()
    assert {r["reason"] for r in rejects} == {"empty_file", "not_a_video", "unreadable"}, rejects
    assert _files(dst) == undisturbed[0]


def _cwd(pid: int) -> str:
    with contextlib.suppress(OSError):
        return str(Path(f"/proc/{pid}/cwd").readlink())
    return ""


def test_what_a_killed_job_left_in_tmpdir_is_removed_by_the_next(tiny_bucket: Path, tmp_path: Path) -> None:
    """All of it: of its workers, its plan, its records."""
    (tmp_path / "tmp").mkdir()
    for seconds in (0.0, 0.3, 0.6):
        process = _start(tiny_bucket, tmp_path / "dst", 2, tmp_path / "tmp")
        while not list((tmp_path / "tmp").glob("reelmae-*")) and process.poll() is None:
            time.sleep(0.005)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert _start(tiny_bucket, tmp_path / "dst", 2, tmp_path / "tmp").wait() == 0
    assert list((tmp_path / "tmp").iterdir()) == []


def test_of_children_killed_at_random_three_in_ten_cost_nothing(
    list_processes: Callable[[Path], list[int]],
    tiny_bucket: Path,
    undisturbed: tuple[dict[str, bytes], float],
    tmp_path: Path,
) -> None:
    draw, dst = random.Random(3), tmp_path / "dst"
    process = _start(tiny_bucket, dst, 2, tmp_path)
    seen: set[int] = set()
    doomed: dict[int, float] = {}
    killed = 0
    while process.poll() is None:
        for child in list_processes(tmp_path):
            if child != process.pid and child not in seen and "reelmae-work-" in _cwd(child):
                seen.add(child)
                if draw.random() < 0.3:
                    doomed[child] = time.monotonic() + draw.uniform(0, 0.3)
        for child in [child for child, when in doomed.items() if when <= time.monotonic()]:
            del doomed[child]
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, draw.choice([signal.SIGKILL, signal.SIGTERM]))
                killed += 1
        time.sleep(0.002)
    assert process.returncode == 0
    assert killed
    assert _files(dst) == undisturbed[0]


def test_a_killed_append_leaves_the_old_dataset_readable(tiny_bucket: Path, tmp_path: Path) -> None:
    import shutil

    from reelmae.pipeline.loading.index.clips import ClipIndex

    src, dst = shutil.copytree(tiny_bucket / "a", tmp_path / "src"), tmp_path / "dst"
    config = CONFIG.model_copy(update={"labels": "none"})
    shard(str(src), str(dst), config)
    before = ClipIndex.open(str(dst))
    for path in (tiny_bucket / "b").glob("*e*.mp4"):
        shutil.copy(path, src)
    undisturbed = shutil.copytree(dst, tmp_path / "undisturbed")
    code = CODE.replace("workers=int(sys.argv[4])", "workers=1, append=True")
    argv = [sys.executable, "-c", code, str(src), str(dst), config.model_dump_json()]
    process = subprocess.Popen(argv, start_new_session=True)
    first = len(before) and len(list(dst.glob("commits/*.parquet")))
    while len(list(dst.glob("commits/*.parquet"))) == first:
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if (dst / schema.DATASET_JSON).read_bytes() != (undisturbed / schema.DATASET_JSON).read_bytes():
        pytest.skip("the job was too fast to be killed before its end")
    assert ClipIndex.open(str(dst)).digest == before.digest
    shard(str(src), str(dst), config, append=True)
    shard(str(src), str(undisturbed), config, append=True)
    assert _files(dst) == _files(undisturbed)
