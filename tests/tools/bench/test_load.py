"""What the loader's benchmarks say is what happened; and the loaders it is compared with do the same work."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from reelmae.pipeline import schema
from reelmae.pipeline.errors import ConfigError, InputError
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.job import shard
from reelmae.pipeline.loading.config import LoaderConfig, LoadOptions
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.loading.loader import ClipLoader
from reelmae.pipeline.loading.order.draws import SamplePolicy, draw
from reelmae.tools.bench import baselines, processes
from reelmae.tools.bench.baselines import LOADERS, Wanted
from reelmae.tools.bench.config import BenchLoadConfig, BenchLoadersConfig
from reelmae.tools.bench.load import STAGES, bench_load
from reelmae.tools.bench.loaders import bench_loaders
from reelmae.tools.cli import parse

SAMPLE = SamplePolicy(frames=4, size=64)
SMALL: dict[str, Any] = {"sample": SAMPLE, "repeats": 2}
NAMES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name == "webdataset_torchcodec" and not baselines.has_torchcodec()[0],
            reason=baselines.has_torchcodec()[1],
        ),
    )
    for name in LOADERS
]
# webdataset leaves its shards to the garbage collector
pytestmark = pytest.mark.filterwarnings(r"ignore:unclosed file .*\.tar:ResourceWarning")
BURN = "import time\nwhile time.process_time() < {}: pass\n"


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """What webdataset leaves open is closed within the test that opened it."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def shards(tiny_run: Path) -> str:
    return str(tiny_run / "shards")


@pytest.fixture(scope="session")
def index(shards: str) -> ClipIndex:
    return ClipIndex.open(shards)


@pytest.fixture(scope="session")
def ours(index: ClipIndex) -> dict[tuple[int, str], np.ndarray]:
    """(epoch, key) → reelmae's samples float32 [R, C, T, S, S], of two epochs."""
    config = LoaderConfig(backend="av", device="cpu", workers=0, batch_videos=1, repeats=2, sample=SAMPLE, seed=5)
    found = {}
    with ClipLoader(index, config) as loader:
        for batch in islice(loader, 2 * len(index)):
            found[batch.epoch, index.key(int(batch.clip_B[0]))] = batch.clips_BCTHW.numpy()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_baseline_gives_the_pictures_that_ours_gives_every_clip_once_an_epoch(
    name: str, index: ClipIndex, ours: dict[tuple[int, str], np.ndarray]
) -> None:
    n = len(index)
    assert n % 2, "the last batch of an epoch is to be smaller"
    batches = LOADERS[name](index, Wanted(repeats=2, sample=SAMPLE, batch_videos=2, seed=5))
    seen: list[tuple[int, str]] = []
    while len(seen) < 2 * n:
        batch = next(batches)
        assert batch.clips_BCTHW.shape == (2 * len(batch.keys), 3, 4, 64, 64)
        assert batch.clips_BCTHW.dtype == torch.float32
        for key, clips in zip(batch.keys, batch.clips_BCTHW.unflatten(0, (-1, 2)), strict=True):
            place = (len(seen) // n, key)
            # in levels of 255: other resizing and other rounding, but the same frames, boxes, flips and scale
            assert np.abs(clips.numpy() - ours[place]).mean() * 0.225 * 255 < 4, place
            seen.append(place)
    batches.close()
    assert sorted(seen) == sorted(ours)


def test_mae_st_decodes_the_whole_video_and_seeking_from_the_keyframe_to_the_last_frame(
    index: ClipIndex,
) -> None:
    n, sample = len(index), SamplePolicy(frames=2, size=64, stride=1)
    wanted = Wanted(repeats=1, sample=sample, batch_videos=n, seed=3)
    assert next(LOADERS["mae_st"](index, wanted)).frames_decoded == int(index.frames.sum())
    facts = ("frames", "fps", "height", "width")
    starts = [
        draw(sample, seed=3, epoch=0, clip=i, repeat=0, **{f: getattr(index, f)[i].item() for f in facts}).start
        for i in range(n)
    ]
    gop = 16  # of the sharding job
    assert next(LOADERS["webdataset_pyav"](index, wanted)).frames_decoded == sum(s % gop + 2 for s in starts)


def test_rows_that_the_index_leaves_out_are_left_out_by_webdataset(shards: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(shards, tmp_path / "copy"))
    table = pq.read_table(folder / schema.INDEX)
    first = table["key"][0].as_py()
    marks = [None, *[first] * (len(table) - 1)]  # all repeat the first clip
    at = table.schema.get_field_index("duplicate_of")
    pq.write_table(table.set_column(at, table.schema.field(at), [marks]), folder / schema.INDEX)
    batches = LOADERS["webdataset_pyav"](ClipIndex.open(str(folder)), Wanted(1, SAMPLE, batch_videos=4))
    assert [next(batches).keys for _ in range(3)] == [[first]] * 3


def test_the_baseline_over_webdataset_refuses_a_store_it_cannot_read(shards: str) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(f"{shards}/", "/remote/", recursive=True)
    try:
        remote = ClipIndex.open("memory://remote")
        with pytest.raises(ConfigError, match=r"memory://.*remote.*copy them"):
            next(LOADERS["webdataset_pyav"](remote, Wanted(1, SAMPLE, batch_videos=1)))
    finally:
        memory.rm("/remote", recursive=True)


def test_without_torchcodec_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert baselines.has_torchcodec() == (False, "torchcodec is not installed; install reelmae[bench]")


@pytest.mark.parametrize("workers", [0, 1])
def test_one_run_says_what_loading_gave_and_cost(shards: str, index: ClipIndex, workers: int) -> None:
    n = len(index)  # an epoch before the clock, two epochs by it
    config = BenchLoadConfig(
        data=shards, backend="av", batch_videos=1, warmup=n, batches=2 * n, workers=workers, sample=SAMPLE
    )
    found = json.loads(json.dumps(bench_load(config)))
    assert (found["videos"], found["clips"], found["backend"]) == (2 * n, 2 * n, "av")
    assert found["clips_per_s"] == pytest.approx(2 * n / found["seconds"])
    assert found["clips_per_cpu_s"] == pytest.approx(2 * n / found["cpu_seconds"])
    assert set(found["stages"]) == set(STAGES)
    assert sum(stage["share"] for stage in found["stages"].values()) == pytest.approx(1)
    assert all(stage["seconds"] > 0 for stage in found["stages"].values())
    strides = [SAMPLE.stride_for(fps) for fps in index.fps]
    assert found["decoded_per_used"] >= sum(3 * s + 1 for s in strides) / (4 * n)  # first to last wanted frame
    assert found["mb_per_s"] * 1e6 * found["seconds"] == pytest.approx(2 * index.size.sum())
    assert found["read_mb_per_sample"] == pytest.approx(found["clip_mb_per_sample"])
    assert found["clip_mb_per_sample"] * 1e6 * found["clips"] == pytest.approx(2 * index.size.sum())
    assert "whole_clips" not in found
    assert 0 <= found["wait_share"] <= 1
    assert found["peak_memory_bytes"] > (150 << 20) + workers * (30 << 20)
    assert (found["bad_clips"], found["worker_restarts"]) == (0, 0)
    assert {"cpu", "cores"} <= set(found["machine"]) and "torch" in found["versions"]


@pytest.fixture(scope="module")
def long_clips(make_video: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A dataset on a store that is not local, of one clip of over 1 MiB with many keyframes."""
    folder = tmp_path_factory.mktemp("long")
    options = {"crf": "0", "preset": "ultrafast"}
    make_video(folder / "raw" / "long.mp4", frames=250, width=256, height=256, options=options)
    config = ShardConfig(clip_seconds=0, crf=1, gop=16)
    shard(str(folder / "raw"), str(folder / "shards"), config)
    memory = fsspec.filesystem("memory")
    memory.put(f"{folder / 'shards'}/", "/long/", recursive=True)
    yield "memory://long"
    memory.rm("/long", recursive=True)


def test_a_sample_of_a_long_clip_is_less_than_the_clip_and_both_are_told(long_clips: str) -> None:
    index = ClipIndex.open(long_clips)
    assert index.size.min() > schema.BLOCKS_FROM
    config = BenchLoadConfig(
        data=long_clips, backend="av", workers=0, batch_videos=1, warmup=1, batches=3, sample=SAMPLE, whole_clips=True
    )
    found = json.loads(json.dumps(bench_load(config)))
    whole = found["whole_clips"]
    assert found["clip_mb_per_sample"] == pytest.approx(index.size.mean() / 1e6)
    assert whole["read_mb_per_sample"] == pytest.approx(index.size.mean() / 1e6)
    assert 0 < found["read_mb_per_sample"] < 0.5 * found["clip_mb_per_sample"]
    assert whole["clips"] == found["clips"] and set(whole["stages"]) == set(STAGES)
    assert found["retries"] == {}


def test_a_decoding_worker_is_part_of_what_loading_cost(shards: str) -> None:
    large = {"sample": SamplePolicy(frames=8), "repeats": 2, "batch_videos": 2, "batches": 10}
    here, there = (bench_load(BenchLoadConfig(data=shards, backend="av", workers=w, **large)) for w in (0, 1))
    assert there["cpu_seconds"] > 0.5 * here["cpu_seconds"]
    assert there["peak_memory_bytes"] > here["peak_memory_bytes"]


def test_what_the_loader_refuses_is_refused_in_words(shards: str) -> None:
    with pytest.raises(ConfigError, match="batch_videos"):
        bench_load(BenchLoadConfig(data=shards, batch_videos=5000, **SMALL))
    with pytest.raises(ConfigError, match="patch"):
        bench_load(BenchLoadConfig(data=shards, sample=SamplePolicy(frames=4, size=65)))


def test_processor_time_of_children_and_their_threads_is_counted() -> None:
    grandchild = (
        f"import subprocess,sys\nsubprocess.Popen([sys.executable,'-c',{BURN.format(0.3) + 'time.sleep(60)'!r}])\n"
    )
    threaded = (
        f"import threading\nt=threading.Thread(target=exec,args=({BURN.format(0.4)!r},{{}}))\nt.start(); t.join()\n"
    )
    before = processes.cpu_seconds()
    memory = processes.memory_bytes("VmRSS")
    child = subprocess.Popen(
        [sys.executable, "-c", f"{grandchild}{threaded}print(flush=True)\nimport time\ntime.sleep(60)"],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert child.stdout is not None
        child.stdout.readline()
        deadline = time.monotonic() + 20
        while True:
            after = processes.cpu_seconds()
            after.pop(os.getpid())  # looking takes time too
            if (spent := processes.cpu_between(before, after)) > 0.65:
                break
            assert time.monotonic() < deadline, spent
            time.sleep(0.02)
        family = processes.family()
        assert child.pid in family and len(family) >= 3
        assert processes.memory_bytes("VmRSS") > memory + (10 << 20)
    finally:
        for pid in set(processes.family()) - set(before):
            os.kill(pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()


def test_processor_time_before_the_clock_is_not_counted() -> None:
    burner = threading.Thread(
        target=exec, args=("end=time.thread_time()+0.2\nwhile time.thread_time()<end: pass", {"time": time})
    )
    burner.start()
    burner.join()
    assert processes.cpu_between(processes.cpu_seconds(), processes.cpu_seconds()) < 0.1


def test_loaders_are_compared_over_the_same_clips(shards: str, index: ClipIndex) -> None:
    n, threads = len(index), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        config = BenchLoadersConfig(data=(shards,), rounds=2, videos=3 * n - 1, **SMALL)
        found = json.loads(json.dumps(bench_loaders(config)))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    rows = {row["loader"]: row for row in found["rows"]}
    torchcodec = baselines.has_torchcodec()[0]
    seeking = "webdataset_torchcodec" if torchcodec else "webdataset_pyav"
    assert set(rows) == {"reelmae", "mae_st", "webdataset_pyav", seeking}
    assert found["torchcodec"] == baselines.has_torchcodec()[1]
    for name, row in rows.items():
        assert row["clips_in_a_round"] == 2 * 2 * n, name
        assert len(row["clips_per_cpu_s_of_rounds"]) == 2
        assert row["clips_per_cpu_s"] == pytest.approx(np.median(row["clips_per_cpu_s_of_rounds"]))
        assert row["clips_per_s"] > 0
    (ratio,) = found["ratios"]
    for name, key in (("mae_st", "to_mae_st"), (seeking, f"to_{seeking}")):
        expected = rows["reelmae"]["clips_per_cpu_s"] / rows[name]["clips_per_cpu_s"]
        assert ratio[key] == pytest.approx(expected) == ratio[f"{key}_on_first"]
    decoded = {name: row["decoded_per_used"] for name, row in rows.items()}
    assert decoded["mae_st"] == pytest.approx(index.frames.sum() / (n * 2 * 4))
    assert decoded["reelmae"] <= decoded["webdataset_pyav"] and decoded["reelmae"] <= decoded["mae_st"]
    assert n % found["batch_videos"] == 0 and "webdataset" in found["versions"]


def test_datasets_of_other_clips_are_not_compared(
    shards: str, ready_dataset: Any, tmp_path: Path, make_video: Any
) -> None:
    video = make_video(tmp_path / "v.mp4", frames=20, width=96, height=64).read_bytes()
    clip = {"source": "other", "video": video, "frames": 20, "fps": 25, "height": 64, "width": 96}
    other = ready_dataset(tmp_path / "other", [clip], 1)
    with pytest.raises(InputError, match=r"other: does not hold the same clips as .*shards"):
        bench_loaders(BenchLoadersConfig(data=(shards, other), **SMALL))


def test_a_large_dataset_is_played_in_part(shards: str) -> None:
    found = bench_loaders(BenchLoadersConfig(data=(shards,), rounds=1, videos=4, batch_videos=2, **SMALL))
    assert {row["clips_in_a_round"] for row in found["rows"]} == {8}


def test_the_command_prints_one_object_and_refuses_in_one_line(shards: str) -> None:
    command = [sys.executable, "-m", "reelmae.tools.cli", "bench", "loaders", shards]
    command += ["--rounds=1", "--videos=1", "--json"]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], capture_output=True, text=True, timeout=120)

    done = run("--repeats=1", "--frames=4", "--size=64")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["config"]["data"] == [shards]
    refused = run("--frames=2", "--size=16")
    assert refused.returncode == 2 and "mask.ratio" in refused.stderr and "Traceback" not in refused.stderr


def test_flags_of_the_loader_reach_it(shards: str) -> None:
    """The options are the loader's own class, so a flag that it has is a flag of the benchmark."""
    command = [
        sys.executable,
        "-m",
        "reelmae.tools.cli",
        "bench",
        "load",
        shards,
        "--batches=2",
        "--warmup=1",
        "--json",
    ]
    command += ["--backend=av", "--decode=span", "--batch-videos=1", "--repeats=3", "--workers=0", "--prefetch=1"]
    command += ["--frames=4", "--size=64", "--fps=5", "--no-flip"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["videos"], found["clips"]) == (2, 6)
    config = found["config"]
    assert (config["decode"], config["prefetch"], config["workers"], config["batch_videos"]) == ("span", 1, 0, 1)
    sample = config["sample"]
    assert (sample["frames"], sample["size"], sample["fps"], sample["flip"]) == (4, 64, 5.0, False)


def test_a_benchmark_of_the_loader_has_the_loader_s_own_defaults(shards: str) -> None:
    config = BenchLoadConfig(data=shards)
    for name, field in LoadOptions.model_fields.items():
        assert getattr(config, name) == field.default, name
    assert (config.sample.frames, config.sample.size, config.sample.stride_for(30)) == (16, 224, 4)


def test_a_stride_takes_the_place_of_the_rate(shards: str) -> None:
    command = [sys.executable, "-m", "reelmae.tools.cli", "bench", "load", shards, "--stride=2", "--workers=0"]
    command += ["--batches=1", "--warmup=1", "--batch-videos=1", "--frames=4", "--size=64", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    sample = json.loads(done.stdout)["config"]["sample"]
    assert (sample["stride"], sample["fps"]) == (2, None)


@pytest.mark.parametrize("flag", ["--frames=3", "--size=70"])
def test_a_sample_of_no_whole_tokens_is_refused_by_its_flag(flag: str, shards: str) -> None:
    name, value = flag.split("=")
    with pytest.raises(ConfigError, match=f"{name} {value}: give a multiple of "):
        parse(["bench", "loaders", shards, flag])
