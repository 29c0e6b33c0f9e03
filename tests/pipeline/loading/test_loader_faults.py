"""The loader through a network that fails: the same batches, a store that is away is waited for and named, nothing leaks."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from reelmae.pipeline.errors import ReelmaeError, StorageError
from reelmae.pipeline.loading.batch import ClipBatch
from reelmae.pipeline.loading.config import LoaderConfig
from reelmae.pipeline.loading.decode.av_pool import AvPool
from reelmae.pipeline.loading.fetch.clip import SourceSettings, stores_to_stop
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.loading.index.mixture import mix
from reelmae.pipeline.loading.index.selection import Selection
from reelmae.pipeline.loading.loader import ClipLoader, batches_ahead
from reelmae.pipeline.loading.order.draws import SamplePolicy
from reelmae.pipeline.loading.sweep import ClipSweep
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.store import Store

SAMPLE = SamplePolicy(frames=4, size=32, stride=4)
HANGS_S = 120  # only what never ends takes so long, on any machine
N = 12
ALL = ("flip", "truncate", "503", "reset")


def config(**settings: object) -> LoaderConfig:
    base = {"backend": "av", "workers": 0, "device": "cpu", "sample": SAMPLE, "patch": (2, 8, 8)}
    order = {"batch_videos": 4, "lanes": 4, "seed": 7}
    return LoaderConfig(**{**base, **order, **settings})  # type: ignore[arg-type]


def play(index: ClipIndex, n: int = N, **settings: object) -> tuple[list[ClipBatch], ClipLoader]:
    with ClipLoader(index, config(**settings)) as loader:
        return list(islice(loader, n)), loader


def same(a: list[ClipBatch], b: list[ClipBatch]) -> bool:
    return all(
        x.draws == y.draws and x.clip_B.tolist() == y.clip_B.tolist() and torch.equal(x.clips_BCTHW, y.clips_BCTHW)
        for x, y in zip(a, b, strict=True)
    )


def at(index: ClipIndex, access: Access) -> ClipIndex:
    """The same clips, reached in another way."""
    return replace(index, stores=tuple(Store(store.url(), access) for store in index.stores))


@pytest.fixture
def remote_index(natural_index: ClipIndex, s3_server: Any, tmp_path: Path) -> ClipIndex:
    """natural_index, 22 clips in 4 shards, in a bucket."""
    store = Store(s3_server.url(f"faults/{tmp_path.name}"), s3_server.access())
    folder = natural_index.store.local_path()
    for file in folder.rglob("*.*"):
        store.publish(file, file.relative_to(folder).as_posix())
    return ClipIndex.open(store.url(), access=store.access)


@pytest.fixture
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)


# --- access


@pytest.mark.usefixtures("bare_environment")
@pytest.mark.parametrize("cached", [False, True])
def test_workers_get_the_options_and_nothing_else_shows_them(
    natural_index: ClipIndex, remote_index: ClipIndex, s3_server: Any, tmp_path: Path, cached: bool
) -> None:
    secret, quarantine = s3_server.secret, tmp_path / "bad.jsonl"
    settings: dict[str, Any] = {"cache": str(tmp_path / "cache")} if cached else {}
    broken = replace(remote_index, check=remote_index.check.copy())
    broken.check[3] ^= 1
    whole, _ = play(natural_index, 6)
    with ClipLoader(broken, config(workers=2, quarantine=str(quarantine), **settings)) as loader:
        batches = list(islice(loader, 8))
        assert isinstance(loader._decoder, AvPool)
        for pid in loader._decoder.pids:
            for file in ("environ", "cmdline"):
                assert secret.encode() not in Path(f"/proc/{pid}/{file}").read_bytes()
        shown = [json.dumps(loader.state_dict()), repr(broken), repr(SourceSettings(broken.stores)), str(loader.stats)]
    assert list(loader.stats.bad) == [broken.key(3)]
    assert not any(secret in text for text in [*shown, quarantine.read_text(), broken.digest])
    assert same(whole[:1], batches[:1]) or 3 in batches[0].clip_B


@pytest.mark.usefixtures("bare_environment")
def test_every_dataset_of_a_mix_is_reached_by_its_own_access(
    natural_index: ClipIndex, remote_index: ClipIndex, s3_server: Any
) -> None:
    url = remote_index.store.url()
    other = ClipIndex.open(url, access=Access({**s3_server.options(), "default_cache_type": "none"}))
    with pytest.raises(StorageError):
        ClipIndex.open(url, access=Access({**s3_server.options(), "secret": "wrong"}))
    both = mix([(remote_index, 1.0), (natural_index, 1.0), (other, 1.0)])
    assert [store.access for store in both.stores] == [
        remote_index.store.access,
        natural_index.store.access,
        other.store.access,
    ]
    local = mix([(natural_index, 1.0)] * 3)
    assert same(play(both, workers=2)[0], play(local)[0])


def test_a_list_of_keys_in_the_same_bucket_is_reached_like_the_dataset(
    remote_index: ClipIndex, s3_server: Any, bare_environment: None, tmp_path: Path
) -> None:
    store = remote_index.store
    store.publish_bytes(remote_index.key(5).encode() + b"\n", "keys.txt")
    (tmp_path / "keys.txt").write_text(remote_index.key(6) + "\n")
    for keys, clip in ((store.url("keys.txt"), 5), (str(tmp_path / "keys.txt"), 6)):
        index = ClipIndex.open(store.url(), Selection(keys=keys), access=s3_server.access())
        assert [index.key(0)] == [remote_index.key(clip)]


def test_stores_that_are_stopped_leave_the_others_and_count_together(remote_index: ClipIndex) -> None:
    [own] = stores_to_stop(remote_index.stores)
    own.access.stop()
    own.access.retries.add("checksum")
    assert own.access.stopping.is_set() and not remote_index.store.access.stopping.is_set()
    assert remote_index.store.access.retries.counts()["checksum"] == 1
    assert own.url() == remote_index.store.url() and own.access.options == remote_index.store.access.options
    two = stores_to_stop([*remote_index.stores, *remote_index.stores])
    assert two[0].access is two[1].access


# --- faults


@pytest.mark.parametrize(
    ("kinds", "workers"),
    [(("flip",), 0), (("flip",), 2), (("truncate",), 2), (("500", "503"), 2), (ALL, 0), (ALL, 2)],
)
def test_the_batches_are_those_without_faults(
    natural_index: ClipIndex, remote_index: ClipIndex, faulty: Any, kinds: tuple[str, ...], workers: int
) -> None:
    proxy = faulty(*kinds, share=0.1, path="/shards/")
    batches, loader = play(at(remote_index, proxy.s3.access()), workers=workers)
    assert same(batches, play(natural_index)[0])
    assert not loader.stats.bad and loader.stats.worker_restarts == 0
    assert proxy.counts.total() >= 3
    assert sum(loader.stats.retries.values()) >= proxy.counts.total() - 3  # those of batches that were never taken
    if kinds == ("flip",):
        assert set(loader.stats.retries) == {"checksum"}


def test_a_cache_is_filled_through_faults_with_the_right_bytes(
    natural_index: ClipIndex, remote_index: ClipIndex, faulty: Any, tmp_path: Path
) -> None:
    proxy = faulty("flip", "truncate", "503", "reset", share=0.1, path="/shards/")
    batches, loader = play(at(remote_index, proxy.s3.access()), workers=2, cache=str(tmp_path / "cache"))
    assert same(batches, play(natural_index)[0])
    assert not loader.stats.bad


def test_damage_in_the_store_is_bad_after_two_equal_reads(remote_index: ClipIndex) -> None:
    name = remote_index.shard(0)
    data = bytearray(remote_index.store.read_bytes(name))
    data[int(remote_index.offset[2]) + 50] ^= 1
    remote_index.store.publish_bytes(bytes(data), name)
    before = remote_index.store.access.retries.counts()
    _, loader = play(remote_index, workers=1)
    assert list(loader.stats.bad) == [remote_index.key(2)]
    assert "the shard is damaged" in loader.stats.bad[remote_index.key(2)]
    assert set(loader.stats.retries) == {"checksum"} and not before
    assert loader.stats.retries["checksum"] <= 2  # once for each time that it was planned before it was known


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bucket_that_is_gone_is_named(remote_index: ClipIndex, s3_server: Any, workers: int) -> None:
    index = replace(remote_index, stores=(Store("s3://no-such-bucket-here/x", s3_server.access()),))
    with pytest.raises(ReelmaeError, match=r"no-such-bucket-here.*no such bucket"):
        play(index, 1, workers=workers)


def test_a_dataset_that_is_gone_altogether_is_the_storages_fault(make_dataset: Callable, spec: type) -> None:
    index = make_dataset([spec(frames=20)] * 8)
    folder = index.store.local_path()
    folder.rename(folder.with_name("unmounted"))
    for workers in (0, 1):
        with pytest.raises(StorageError, match=r"\.tar is not there, and dataset.json .* gone too; bring"):
            play(index, 1, workers=workers)


def test_dali_plays_the_same_through_faults(make_dataset: Any, make_remote: Any, faulty: Any, spec: type) -> None:
    specs = [spec(frames=30, codec="vp9", seed=s) for s in range(8)]
    index = ClipIndex.open(make_remote(specs))
    proxy = faulty("flip", "503", share=0.2, path="/shards/")
    batches, loader = play(at(index, proxy.s3.access()), 6, backend="dali-cpu", workers=1)
    local, _ = play(make_dataset(specs), 6, backend="dali-cpu", workers=1)
    assert same(batches, local) and not loader.stats.bad and loader.stats.retries["checksum"] >= 1


# --- a store that is away


@pytest.mark.parametrize("settings", [{"workers": 0}, {"workers": 2}, {"workers": 2, "cache": "cache"}])
def test_an_outage_shorter_than_the_patience_is_waited_out_and_told_once(
    natural_index: ClipIndex,
    remote_index: ClipIndex,
    faulty: Any,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    settings: dict[str, Any],
) -> None:
    if "cache" in settings:
        settings = {**settings, "cache": str(tmp_path / "cache")}
    proxy = faulty()
    with ClipLoader(at(remote_index, proxy.s3.access()), config(**settings, clip_timeout_s=2.0)) as loader:
        batches = list(islice(loader, 2))
        proxy.down()
        back = threading.Timer(9.0, proxy.up)
        back.start()
        batches += islice(loader, N - 2)
        back.join()
        assert loader.stats.worker_restarts == 0 and not loader.stats.bad
    assert same(batches, play(natural_index)[0])
    if "cache" in settings:
        return  # all may have been here already
    assert loader.stats.retries.keys() & {"connection refused", "connection reset"}
    told = [r.getMessage() for r in caplog.records if r.name.startswith("reelmae")]
    assert [text.startswith("waiting for s3://") for text in told].count(True) == 1, told
    assert [" answers again after " in text for text in told].count(True) == 1, told


@pytest.mark.parametrize("workers", [0, 2])
def test_a_store_that_stays_away_ends_the_run_in_one_line_and_is_no_clips_fault(
    remote_index: ClipIndex, faulty: Any, workers: int, capfd: pytest.CaptureFixture[str]
) -> None:
    proxy = faulty()
    index = at(remote_index, proxy.s3.access(patience_s=2.0))
    proxy.down()
    loader = ClipLoader(index, config(workers=workers, clip_timeout_s=1.0))
    with pytest.raises(StorageError, match=r"^s3://.*/shards/.*connection refused; waited [^\n]*$"):
        next(iter(loader))
    loader.close()
    assert loader.stats.worker_restarts == 0 and not loader.stats.bad
    assert "Traceback" not in capfd.readouterr().err


def test_a_worker_that_waits_for_a_store_is_not_taken_for_one_that_hangs(
    natural_index: ClipIndex, remote_index: ClipIndex, faulty: Any
) -> None:
    proxy = faulty("stall", share=1.0, path="/shards/")

    def recover() -> None:
        proxy.wait_for("stall", 1)
        time.sleep(4.0)  # many times the timeout of a clip
        proxy.faults = None
        proxy.down()
        proxy.up()

    recovery = threading.Thread(target=recover)
    recovery.start()
    batches, loader = play(at(remote_index, proxy.s3.access()), 3, workers=1, clip_timeout_s=0.5)
    recovery.join()
    assert loader.stats.worker_restarts == 0 and not loader.stats.bad
    assert same(batches, play(natural_index, 3)[0])


PROGRAM = """
import _thread, json, sys, threading, time
from reelmae.pipeline.loading import ClipIndex, ClipLoader, LoaderConfig, SamplePolicy
from reelmae.pipeline.storage.access import Access
url, options, settings = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
index = ClipIndex.open(url, access=Access(options))
config = LoaderConfig(device="cpu", batch_videos=4, patch=(2, 8, 8), sample=SamplePolicy(frames=4, size=32), **settings)
loader = ClipLoader(index, config)
print("open", flush=True)
sys.stdin.readline()  # now it stalls
def wait():
    try:
        next(iter(loader))
    except Exception as e:
        print(type(e).__name__, flush=True)
waiting = threading.Thread(target=wait, daemon=True)
waiting.start()
sys.stdin.readline()  # a request hangs
loader.close()
print("closed", flush=True)
waiting.join(90)
print("ended" if not waiting.is_alive() else "still waiting")
"""


@pytest.mark.parametrize("settings", [{"workers": 2}, {"workers": 0}, {"workers": 1, "cache": "cache"}])
def test_closing_while_a_store_stalls_does_not_hang_and_prints_nothing(
    remote_index: ClipIndex, faulty: Any, tmp_path: Path, settings: dict[str, Any]
) -> None:
    proxy = faulty()
    options = json.dumps(proxy.s3.options())
    if "cache" in settings:
        settings = {**settings, "cache": str(tmp_path / "cache")}
    command = [sys.executable, "-c", PROGRAM, remote_index.store.url(), options, json.dumps(settings)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "open\n"
        proxy.faults = replace(faulty("stall", share=1.0).faults)
        process.stdin.write("\n")
        process.stdin.flush()
        proxy.wait_for("stall", 1)
        process.stdin.write("\n")
        process.stdin.flush()
        out, err = process.communicate(timeout=HANGS_S)
    assert process.returncode == 0 and "closed" in out and "ended" in out, out
    assert "Traceback" not in err and "Exception" not in err, err


# --- how much is in flight


def test_neighbours_are_read_by_one_request_in_a_sweep(
    natural_index: ClipIndex, remote_index: ClipIndex, faulty: Any
) -> None:
    proxy = faulty()
    rows, pixels = [], []
    with ClipSweep(at(remote_index, proxy.s3.access()), SAMPLE, batch_videos=4, workers=2) as sweep:
        for batch in sweep:
            rows += batch.clip_V.tolist()
            pixels.append(torch.from_numpy(batch.pixels_VRCTHW.copy()))
    with ClipSweep(natural_index, SAMPLE, batch_videos=4, workers=0) as sweep:
        local = torch.cat([torch.from_numpy(batch.pixels_VRCTHW.copy()) for batch in sweep])
    assert rows == list(range(22)) and torch.equal(torch.cat(pixels), local)
    requests = [r for r in proxy.requests if r.startswith("GET") and "/shards/" in r]
    assert len(requests) <= 12  # 22 clips in 4 shards


def test_so_many_batches_are_ahead_that_latency_is_hidden_and_memory_is_bounded() -> None:
    small = config(batch_videos=8, sample=SamplePolicy(frames=16, size=224))
    assert batches_ahead(small, is_local=True) == 2
    assert batches_ahead(small, is_local=False) == 4  # 32 clips
    assert batches_ahead(config(batch_videos=8, prefetch=7), is_local=False) == 7
    large = config(batch_videos=1, repeats=16, sample=SamplePolicy(frames=16, size=224))
    assert batches_ahead(large, is_local=False) * 16 * 3 * 16 * 224**2 <= 256 << 20


def test_logging_of_workers_reaches_the_callers_handlers(
    remote_index: ClipIndex, faulty: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    proxy = faulty()
    proxy.down()
    index = at(remote_index, proxy.s3.access(patience_s=6.0))
    with caplog.at_level(logging.WARNING), pytest.raises(StorageError):
        play(index, 1, workers=3)
    told = [r.getMessage() for r in caplog.records]
    assert sum(text.startswith("waiting for s3://") for text in told) == 1, told
    assert not capfd.readouterr().err
