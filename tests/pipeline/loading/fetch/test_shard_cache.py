"""The shard cache against a real S3 server: several processes, a small quota, killed writers, a full disk."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from reelmae.pipeline.errors import ConfigError, StorageError, StorageFullError
from reelmae.pipeline.loading.fetch import shard_cache
from reelmae.pipeline.loading.fetch.shard_cache import CacheSettings, ShardCache
from reelmae.pipeline.storage.store import Store

SIZE = 300_000
HANGS_S = 120  # only what never ends takes so long, on any machine


class CountingStore(Store):
    """A store that knows how many bytes were read from it."""

    read = 0
    counting = threading.Lock()

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        with self.counting:
            self.read += size
        return super().read_range(path, offset, size)


def content(number: int, size: int = SIZE) -> bytes:
    return random.Random(number).randbytes(size)


def name(number: int) -> str:
    return f"shards/{number:06d}-00.tar"


@pytest.fixture
def store(s3_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CountingStore:
    """Six shards of SIZE bytes, downloaded in small chunks."""
    monkeypatch.setattr(shard_cache, "CHUNK", 16 << 10)
    monkeypatch.setattr(shard_cache, "POLL_S", 0.005)
    store = CountingStore(s3_server.url(f"cache/{tmp_path.name}"))
    for i in range(6):
        store.publish_bytes(content(i), name(i))
    return store


@pytest.fixture
def make_cache(tmp_path: Path) -> Callable[..., ShardCache]:
    """make_cache(max_bytes) → a cache in tmp_path/"cache"."""

    def make(max_bytes: int = 10 * SIZE) -> ShardCache:
        return ShardCache(CacheSettings(str(tmp_path / "cache"), max_bytes))

    return make


def here(cache: ShardCache, store: Store) -> set[int]:
    """The numbers of the shards that can be read from the cache."""
    return {i for i in range(6) if cache.read(store, name(i), 0, 1) is not None}


def total(folder: Path) -> int:
    """Bytes of all files in a cache, at a moment when nobody makes room."""
    with (folder / "lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sizes = []
        for file in folder.iterdir():
            try:
                sizes.append(file.stat().st_size)
            except FileNotFoundError:  # a part that was given up
                continue
        return sum(sizes)


def test_what_was_brought_is_read_without_the_store(store: CountingStore, make_cache: Any) -> None:
    cache = make_cache()
    assert cache.read(store, name(0), 10, 20) is None
    assert cache.bring(store, name(0))
    store.remove(name(0))
    assert cache.read(store, name(0), 10, 20) == content(0)[10:30]
    assert cache.read(store, name(0), 0, SIZE) == content(0)
    assert cache.read(store, name(0), SIZE - 5, 20) == content(0)[-5:]  # as much as there is
    assert cache.bring(store, name(0)) and store.read == SIZE
    cache.drop(store, name(0))
    assert cache.read(store, name(0), 10, 20) is None


def test_datasets_and_names_do_not_mix(store: CountingStore, make_cache: Any) -> None:
    other = Store(f"{store.url()}-other")
    other.publish_bytes(b"other", name(0))
    store.publish_bytes(b"odd", "shards%2F000000-00.tar")
    cache = make_cache()
    cache.bring(store, name(0))
    cache.bring(other, name(0))
    cache.bring(store, "shards%2F000000-00.tar")
    assert (cache.read(other, name(0), 0, 5), cache.read(store, name(0), 0, 5)) == (b"other", content(0)[:5])
    assert cache.read(store, "shards%2F000000-00.tar", 0, 5) == b"odd"
    for path in ("../../outside", "..", "/etc/passwd"):  # an index may say anything
        assert cache.read(store, path, 0, 5) is None
        with pytest.raises((FileNotFoundError, StorageError)):
            cache.bring(store, path)
    assert {p.parent for p in cache.folder.rglob("*")} == {cache.folder}


def test_the_least_recently_read_goes_first(store: CountingStore, make_cache: Any) -> None:
    cache = make_cache(3 * SIZE + 1)
    for i in range(3):
        cache.bring(store, name(i))
        time.sleep(0.01)
    cache.read(store, name(0), 0, 1)
    cache.bring(store, name(3))
    assert here(cache, store) == {0, 2, 3}
    assert total(cache.folder) == 3 * SIZE


def test_what_is_done_goes_before_all_others(store: CountingStore, make_cache: Any) -> None:
    cache = make_cache(3 * SIZE)
    for i in range(3):
        cache.bring(store, name(i))
    cache.done(store, name(2))
    cache.done(store, name(5))  # never was here
    cache.bring(store, name(3))
    assert here(cache, store) == {0, 1, 3}


def test_room_is_made_for_what_is_missing_only(store: CountingStore, make_cache: Any) -> None:
    store.publish_bytes(b"x" * 1000, "small")
    cache = make_cache(3 * SIZE + 1000)
    for i in range(3):
        cache.bring(store, name(i))
    cache.bring(store, "small")
    assert here(cache, store) == {0, 1, 2}


def test_a_cache_survives_restarts_and_a_smaller_quota(store: CountingStore, make_cache: Any) -> None:
    for i in range(4):
        make_cache().bring(store, name(i))
    assert here(make_cache(), store) == {0, 1, 2, 3}
    assert store.read == 4 * SIZE
    smaller = make_cache(2 * SIZE)
    smaller.bring(store, name(4))
    assert total(smaller.folder) == 2 * SIZE and 4 in here(smaller, store)


def test_a_shard_larger_than_the_cache_is_refused(store: CountingStore, make_cache: Any) -> None:
    cache = make_cache(SIZE - 1)
    with pytest.raises(ConfigError, match=rf"{SIZE} bytes.*\({SIZE - 1}\).*without a cache"):
        cache.bring(store, name(0))
    assert [p.name for p in cache.folder.iterdir()] == ["lock"]


def test_a_missing_shard_leaves_nothing(store: CountingStore, make_cache: Any) -> None:
    cache = make_cache()
    with pytest.raises(FileNotFoundError):
        cache.bring(store, "shards/nowhere.tar")
    assert [p.name for p in cache.folder.iterdir()] == ["lock"]


def test_a_download_that_is_not_wanted_any_more_is_given_up(store: CountingStore, make_cache: Any) -> None:
    cache = make_cache()
    asked = iter([True, True, True])
    assert not cache.bring(store, name(0), lambda: next(asked, False))
    assert 0 < store.read < SIZE
    assert [p.name for p in cache.folder.iterdir()] == ["lock"]


def test_files_of_others_are_neither_counted_nor_removed(store: CountingStore, make_cache: Any, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    others = ["data.tar", "notes.shard", ".x.part", "0123456789abcdef_x.tar"]
    for other in others:
        (folder / other).write_bytes(bytes(SIZE))
    cache = make_cache(SIZE)
    for i in range(3):
        cache.bring(store, name(i))
    assert here(cache, store) == {2}
    assert all((folder / other).stat().st_size == SIZE for other in others)


def test_threads_that_want_one_shard_download_it_once(store: CountingStore, make_cache: Any) -> None:
    cache = make_cache()
    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(lambda _: cache.bring(store, name(0)), range(6)))
    assert store.read == SIZE
    assert cache.read(store, name(0), 0, SIZE) == content(0)


def test_a_shard_that_came_in_the_last_moment_is_not_brought_again(store: CountingStore, make_cache: Any) -> None:
    cache = make_cache()
    assert cache.bring(store, name(0), lambda: make_cache().bring(store, name(0)))
    assert store.read == SIZE and not list(cache.folder.glob(".*.part"))


def test_nothing_comes_while_another_makes_room(store: CountingStore, make_cache: Any) -> None:
    cache = make_cache()
    half, locked = threading.Event(), threading.Event()

    def wanted() -> bool:
        if store.read > SIZE // 2:
            half.set()
            locked.wait(HANGS_S)
        return True

    with ThreadPoolExecutor(1) as pool:
        bringing = pool.submit(cache.bring, store, name(0), wanted)
        assert half.wait(HANGS_S)
        with (cache.folder / "lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            locked.set()
            until = time.monotonic() + HANGS_S
            while store.read < SIZE and time.monotonic() < until:
                time.sleep(0.005)
            time.sleep(0.2)  # time to appear, which would be wrong
            assert store.read == SIZE and not bringing.done()
            assert cache.read(store, name(0), 0, 1) is None
        assert bringing.result(HANGS_S)
    assert cache.read(store, name(0), 0, SIZE) == content(0)


HANGS = """
import sys
from reelmae.pipeline.loading.fetch import shard_cache
from reelmae.pipeline.storage.store import Store
shard_cache.CHUNK = 64 << 10
url, folder, shard, max_bytes = sys.argv[1:]
cache = shard_cache.ShardCache(shard_cache.CacheSettings(folder, int(max_bytes)))
asked = 0
def wanted():
    global asked
    asked += 1
    if asked == 4:
        print("half", flush=True)
        sys.stdin.readline()
    return True
cache.bring(Store(url), shard, wanted)
print("whole", flush=True)
"""


@pytest.fixture
def start_half(store: CountingStore, make_cache: Any) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """start_half(shard, max_bytes) → another process, halfway through its download; it goes on after a line to stdin."""
    processes = []

    def start(shard: str, max_bytes: int = 10 * SIZE) -> subprocess.Popen[str]:
        folder = str(make_cache(max_bytes).folder)
        command = [sys.executable, "-c", HANGS, store.url(), folder, shard, str(max_bytes)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None and process.stdout.readline() == "half\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_one_process_downloads_and_another_waits(store: CountingStore, make_cache: Any, start_half: Any) -> None:
    process, cache = start_half(name(0)), make_cache()
    until = time.monotonic() + 0.3
    assert not cache.bring(store, name(0), lambda: time.monotonic() < until)  # it does not take what is another's
    assert cache.read(store, name(0), 0, 1) is None  # nor sees it half
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(cache.bring, store, name(0))
        process.stdin.write("\n")
        process.stdin.flush()
        assert waiting.result(timeout=HANGS_S)
    assert process.stdout.readline() == "whole\n"
    assert store.read == 0
    assert cache.read(store, name(0), 0, SIZE) == content(0)


def test_a_killed_writers_shard_is_brought_by_the_next(store: CountingStore, make_cache: Any, start_half: Any) -> None:
    process, cache = start_half(name(0), SIZE), make_cache(SIZE)
    assert total(cache.folder) == SIZE  # its place was taken before the first byte came
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert cache.bring(store, name(0))
    assert cache.read(store, name(0), 0, SIZE) == content(0)
    assert not list(cache.folder.glob(".*.part"))


def test_what_a_killed_writer_left_is_removed(store: CountingStore, make_cache: Any, start_half: Any) -> None:
    process = start_half(name(0), 2 * SIZE)
    cache = make_cache(2 * SIZE)
    cache.bring(store, name(1))
    assert len(list(cache.folder.glob(".*.part"))) == 1  # it lives: left alone
    process.send_signal(signal.SIGKILL)
    process.wait()
    cache.bring(store, name(2))  # there is room for it beside the first, once the part is gone
    assert here(cache, store) == {1, 2} and not list(cache.folder.glob(".*.part"))

    process = start_half(name(0))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(make_cache().folder.glob(".*.part"))  # or already when a cache is opened


def test_room_that_others_downloads_fill_is_waited_for(store: CountingStore, make_cache: Any, start_half: Any) -> None:
    cache = make_cache(2 * SIZE)
    cache.bring(store, name(5))
    process = start_half(name(0), 2 * SIZE - 1)
    until = time.monotonic() + 0.3
    narrow = make_cache(2 * SIZE - 1)
    assert not narrow.bring(store, name(1), lambda: time.monotonic() < until)
    assert total(cache.folder) == SIZE  # only the other's
    process.stdin.write("\n")
    process.stdin.flush()
    assert narrow.bring(store, name(1))
    assert here(narrow, store) == {1}


READS = """
import hashlib, random, sys
from reelmae.pipeline.loading.fetch import shard_cache
from reelmae.pipeline.storage.store import Store
shard_cache.CHUNK, shard_cache.POLL_S = 64 << 10, 0.005
url, folder, max_bytes, seed, rounds, size = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
cache, store, rng = shard_cache.ShardCache(shard_cache.CacheSettings(folder, max_bytes)), Store(url), random.Random(seed)
right = {i: random.Random(i).randbytes(size) for i in range(6)}
hits = 0
for _ in range(rounds):
    i = rng.randrange(6)
    shard = f"shards/{i:06d}-00.tar"
    if rng.random() < 0.7:
        assert cache.bring(store, shard)
    offset = rng.randrange(size - 1000)
    data = cache.read(store, shard, offset, 1000)
    assert data is None or data == right[i][offset : offset + 1000], (i, offset)
    hits += data is not None
    if rng.random() < 0.2:
        cache.done(store, shard)
print(hits)
"""


def test_processes_share_a_small_cache_and_never_exceed_it(store: CountingStore, make_cache: Any) -> None:
    folder = make_cache().folder
    quota = 2 * SIZE + SIZE // 2
    command = [sys.executable, "-c", READS, store.url(), str(folder), str(quota)]
    processes = [
        subprocess.Popen(
            [*command, str(seed), "60", str(SIZE)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for seed in range(3)
    ]
    largest, looks = 0, 0
    while any(p.poll() is None for p in processes):
        largest, looks = max(largest, total(folder)), looks + 1
        time.sleep(0.001)
    ends = [p.communicate() for p in processes]
    assert all(p.returncode == 0 for p in processes), ends
    assert all(int(out) > 30 for out, _ in ends)
    assert SIZE <= largest <= quota and looks > 50
    assert not list(folder.glob(".*.part"))


def test_a_killed_process_among_others_costs_nothing(store: CountingStore, make_cache: Any) -> None:
    folder, quota = make_cache().folder, 2 * SIZE
    rng = random.Random(0)
    for seed in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", READS, store.url(), str(folder), str(quota), str(seed), "9999", str(SIZE)],
            stdout=subprocess.DEVNULL,
        ) as process:
            until = time.monotonic() + 20
            while not list(folder.glob(".*.part")) and time.monotonic() < until:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.1))
            process.kill()
    cache = make_cache(quota)
    for i in range(6):
        assert cache.bring(store, name(i))
        assert cache.read(store, name(i), 0, SIZE) == content(i)
    assert total(folder) == quota


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not shutil.which("mount") or os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_says_so_and_leaves_room(store: CountingStore, small_disk: Path) -> None:
    cache = ShardCache(CacheSettings(str(small_disk / "cache"), 10 * SIZE))
    with pytest.raises(
        StorageFullError, match=rf"{small_disk}/cache: no space left.*{10 * SIZE} bytes.*another folder"
    ):
        for i in range(6):
            cache.bring(store, name(i))
    assert here(cache, store) == {0, 1, 2}
    assert not list(cache.folder.glob(".*.part"))
    assert cache.read(store, name(2), 0, SIZE) == content(2)
    cache.drop(store, name(0))
    assert cache.bring(store, name(3))


def test_a_folder_that_cannot_be_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match=r"file/cache: cannot be used as shard cache.*another folder"):
        ShardCache(CacheSettings(str(tmp_path / "file" / "cache"), SIZE))
    with pytest.raises(StorageError, match=r"/proc/cache: cannot be used as shard cache"):
        ShardCache(CacheSettings("/proc/cache", SIZE))


def test_a_link_in_the_cache_is_not_followed(store: CountingStore, make_cache: Any, tmp_path: Path) -> None:
    cache, precious = make_cache(), tmp_path / "precious"
    precious.write_bytes(b"precious")
    part = cache._path(store, name(0))
    part = part.with_name(f".{part.name}.part")
    for link, use in ((part, lambda: cache.bring(store, name(0))), (cache.folder / "lock", make_cache)):
        link.unlink(missing_ok=True)
        link.symlink_to(precious)
        with pytest.raises(StorageError, match=f"{link} is a link.*remove it"):
            use()
        assert precious.read_bytes() == b"precious" and link.is_symlink()
        link.unlink()
    cache._path(store, name(0)).symlink_to(precious)
    with pytest.raises(StorageError, match="is a link"):
        cache.read(store, name(0), 0, 5)


def test_others_cannot_look_into_a_new_cache(make_cache: Any) -> None:
    assert make_cache().folder.stat().st_mode & 0o777 == 0o700


def test_a_shard_comes_by_several_requests_at_a_time(store: CountingStore, make_cache: Any) -> None:
    """Each waits until as many are under way as a shard may have."""
    barrier = threading.Barrier(4)

    class Held(CountingStore):
        def read_range(self, path: str, offset: int, size: int) -> bytes:
            if offset < 4 * shard_cache.CHUNK:
                barrier.wait(HANGS_S)
            return super().read_range(path, offset, size)

    cache = make_cache()
    assert cache.bring(Held(store.url()), name(0))
    assert cache.read(store, name(0), 0, SIZE) == content(0)


def test_a_download_that_stalls_is_given_up_when_it_is_not_wanted(store: CountingStore, make_cache: Any) -> None:
    gate = threading.Event()

    class Stalled(CountingStore):
        def read_range(self, path: str, offset: int, size: int) -> bytes:
            gate.wait(HANGS_S)
            return super().read_range(path, offset, size)

    asked = iter([True] * 4)
    cache = make_cache()
    assert not cache.bring(Stalled(store.url()), name(0), lambda: next(asked, False))
    assert not gate.is_set() and [p.name for p in cache.folder.iterdir()] == ["lock"]
    gate.set()


def test_a_file_that_goes_while_it_is_read_is_read_whole(store: CountingStore, make_cache: Any) -> None:
    cache = make_cache(SIZE)
    cache.bring(store, name(0))
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            cache.bring(store, name(1))
            cache.bring(store, name(0))

    with ThreadPoolExecutor(1) as pool:
        churning = pool.submit(churn)
        found = [cache.read(store, name(0), 0, SIZE) for _ in range(2000)]
        stop.set()
        churning.result()
    assert {data for data in found if data is not None} == {content(0)}
    assert None in found
