"""Which shard is needed when, and the threads that bring it in time, against a real S3 server."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reelmae.pipeline.errors import ConfigError, StorageFullError
from reelmae.pipeline.loading.fetch import read_ahead, shard_cache
from reelmae.pipeline.loading.fetch.read_ahead import ReadAhead, Stay, shard_stays
from reelmae.pipeline.loading.fetch.shard_cache import CacheSettings, ShardCache
from reelmae.pipeline.storage.store import Store

SIZE, N = 100_000, 8
WAIT_S = 120


def lanes_at(sequence: np.ndarray, lanes: int) -> Callable[[np.ndarray], np.ndarray]:
    """`shards_at` of a sequence of shards dealt to lanes of equal length; position p is row p // lanes of lane p % lanes."""
    assert len(sequence) % lanes == 0
    return lambda positions: sequence[positions % lanes * (len(sequence) // lanes) + positions // lanes]


def test_the_example_of_the_docstring() -> None:
    a, b, c = 0, 1, 2
    shards_at = lanes_at(np.array([a, a, a, a, b, b, b, b, c, c]), 2)
    stays = shard_stays(shards_at, steps=5, batch_videos=2, rank=0, world=1)
    assert stays == [Stay(0, 3, a), Stay(0, 4, b), Stay(3, 4, c)]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("piece", [50, 1 << 16])
def test_every_use_lies_in_one_stay_and_every_end_is_a_use(
    world: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "PIECE", piece)
    sequence = np.repeat(np.random.default_rng(0).permutation(60), 40)
    batch = 4
    steps = len(sequence) // (batch * world) - 1  # the last global batch is dropped
    seen = 0
    for rank in range(world):
        asked: list[np.ndarray] = []

        def shards_at(positions: np.ndarray, asked: list[np.ndarray] = asked) -> np.ndarray:
            asked.append(positions)
            return lanes_at(sequence, 8)(positions)

        stays = shard_stays(shards_at, steps=steps, batch_videos=batch, rank=rank, world=world)
        assert max(map(len, asked)) <= max(piece, batch)
        used = {(int(s), k // batch) for k, s in enumerate(shards_at(rank + world * np.arange(steps * batch)))}
        for shard, step in used:
            assert sum(s.shard == shard and s.first_step <= step <= s.last_step for s in stays) == 1
        assert {(s.shard, end) for s in stays for end in (s.first_step, s.last_step)} <= used
        assert [s.first_step for s in stays] == sorted(s.first_step for s in stays)
        seen += len(stays)
    assert seen <= 60 + 8  # a shard is cut by lane borders only


def test_a_shard_that_is_not_used_for_long_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    shards_at = lanes_at(np.repeat([0, 1, 2, 3, 0, 4], 500), 1)
    stays = shard_stays(shards_at, steps=3000, batch_videos=1, rank=0, world=1)
    assert [(s.shard, s.first_step, s.last_step) for s in stays if s.shard == 0] == [
        (0, 0, 499),
        (0, 2000, 2499),
    ]
    rare = shard_stays(lambda p: np.where(p % 140, 1, 0), steps=3000, batch_videos=1, rank=0, world=1)
    assert rare == [Stay(0, 2940, 0), Stay(1, 2999, 1)]  # used now and then is one stay


def test_an_epoch_without_steps_needs_nothing() -> None:
    assert shard_stays(lambda p: p, steps=0, batch_videos=4, rank=0, world=1) == []


def test_ten_million_clips_are_planned_in_large_pieces() -> None:
    """Half a second of processor time: clips are looked at some ten thousands at a time, never one by one."""
    order = np.random.default_rng(0).permutation(10_000)
    pieces: list[int] = []
    asking = 0.0

    def shards_at(positions: np.ndarray) -> np.ndarray:
        nonlocal asking
        began = time.thread_time()
        pieces.append(len(positions))
        shards = order[(positions % 64 * 156_250 + positions // 64) // 1000]
        asking += time.thread_time() - began
        return shards

    began = time.thread_time()
    stays = shard_stays(shards_at, steps=10_000_000 // 64, batch_videos=64, rank=0, world=1)
    assert time.thread_time() - began < 50 * asking  # 6 times where it was measured
    assert len(stays) <= 10_000 + 63
    assert sum(pieces) == 10_000_000 and len(pieces) < 200 and max(pieces) <= read_ahead.PIECE


class SlowStore(Store):
    """Counts what is read of each shard, and hangs while `gate` is closed."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.read: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        self.read.append(path)
        self.gate.wait()
        return super().read_range(path, offset, size)


@dataclass
class Table:
    """N shards of one dataset, as an index has them."""

    stores: list[SlowStore]
    shard_names: list[str] = field(default_factory=lambda: [f"shards/{i:06d}-00.tar" for i in range(N)])
    dataset_of_shard: np.ndarray = field(default_factory=lambda: np.zeros(N, np.int32))
    shard_bytes: np.ndarray = field(default_factory=lambda: np.full(N, SIZE, np.int64))


@pytest.fixture
def table(s3_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Table:
    monkeypatch.setattr(shard_cache, "POLL_S", 0.005)
    store = SlowStore(s3_server.url(f"ahead/{tmp_path.name}"))
    names = Table([store]).shard_names
    for i, name in enumerate(names):
        store.publish_bytes(random.Random(i).randbytes(SIZE), name)
    return Table([store])


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(CacheSettings(str(tmp_path / "cache"), 3 * SIZE))


@pytest.fixture
def make_ahead(cache: ShardCache) -> Iterator[Callable[..., ReadAhead]]:
    """make_ahead(table, stays, steps=…) → a ReadAhead over three shards' room, closed at the end."""
    made = []

    def make(table: Table, stays: Callable[[int], list[Stay]], **values: Any) -> ReadAhead:
        values = {"steps": 2 * N, "budget_bytes": 3 * SIZE, "in_flight": 0, "threads": 2, **values}
        made.append(ReadAhead(cache, table, stays, **values))
        return made[-1]

    yield make
    for ahead in made:
        for store in ahead._shards.stores:
            store.gate.set()  # type: ignore[attr-defined]
        ahead.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("reelmae-read-ahead")]


def one_after_the_other(epoch: int) -> list[Stay]:
    """Shard s is used in steps 2 s and 2 s + 1."""
    return [Stay(2 * s, 2 * s + 1, s) for s in range(N)]


def here(cache: ShardCache, table: Table) -> set[int]:
    return {
        i
        for i, name in enumerate(table.shard_names)
        if (cache._path(table.stores[0], name)).exists()  # without a read, which would make it young
    }


def comes_true(condition: Callable[[], bool]) -> bool:
    """Whether it is true at some time. Only what never comes takes WAIT_S, on any machine."""
    until = time.monotonic() + WAIT_S
    while not condition() and time.monotonic() < until:
        time.sleep(0.005)
    return condition()


def comes(cache: ShardCache, table: Table, wanted: set[int]) -> bool:
    """Whether these shards are there soon."""
    return comes_true(lambda: wanted <= here(cache, table))


def test_shards_come_before_their_use_and_as_many_as_fit(table: Table, cache: ShardCache, make_ahead: Any) -> None:
    ahead = make_ahead(table, one_after_the_other, threads=1)
    for step in range(2 * N):
        ahead.advance(0, step)
        s = step // 2
        cache.read(table.stores[0], table.shard_names[s], 0, 1)
        assert comes(cache, table, set(range(s, min(s + 3, N))))
        time.sleep(0.02)
        if s + 3 < N:
            assert s + 3 not in here(cache, table)  # there is no room for it yet
    assert comes(cache, table, {N - 1, 0, 1})  # the next epoch's
    assert table.stores[0].read[:N] == table.shard_names
    ahead.advance(1, 0)
    ahead.advance(1, 2)
    assert comes(cache, table, {1, 2, 3})


def test_what_is_passed_goes_first_and_what_is_in_flight_not_yet(
    table: Table, cache: ShardCache, make_ahead: Any
) -> None:
    ahead = make_ahead(table, one_after_the_other, in_flight=2)
    ahead.advance(0, 0)
    assert comes(cache, table, {0, 1, 2})
    cache.read(table.stores[0], table.shard_names[0], 0, 1)  # the youngest, but
    ahead.advance(0, 3)
    time.sleep(0.1)
    assert here(cache, table) == {0, 1, 2}
    ahead.advance(0, 4)
    assert comes(cache, table, {1, 2, 3})


def test_reading_ahead_begins_where_a_run_is_resumed(table: Table, cache: ShardCache, make_ahead: Any) -> None:
    ahead = make_ahead(table, one_after_the_other)
    ahead.advance(5, 9)
    assert comes(cache, table, {4, 5, 6})
    assert sorted(table.stores[0].read) == table.shard_names[4:7]


def test_a_dataset_that_fits_is_downloaded_once(table: Table, cache: ShardCache, make_ahead: Any) -> None:
    three = Table(table.stores, table.shard_names[:3], np.zeros(3, np.int32), np.full(3, SIZE, np.int64))
    ahead = make_ahead(three, lambda epoch: one_after_the_other(epoch)[:3], steps=6)
    for epoch in range(5):
        for step in range(6):
            ahead.advance(epoch, step)
            assert comes(cache, three, {0, 1, 2})
            time.sleep(0.005)
    assert sorted(table.stores[0].read) == three.shard_names


def test_planning_stays_one_epoch_ahead(table: Table, cache: ShardCache, make_ahead: Any) -> None:
    planned = []

    def stays(epoch: int) -> list[Stay]:
        planned.append(epoch)
        return [Stay(0, 2 * N - 1, 0)]

    ahead = make_ahead(table, stays)
    ahead.advance(3, 0)
    assert comes(cache, table, {0})
    assert comes_true(lambda: len(planned) >= 2)
    time.sleep(0.1)  # time for a third that would be wrong
    assert planned == [3, 4]
    ahead.advance(4, 0)
    assert comes_true(lambda: len(planned) >= 3)
    assert planned == [3, 4, 5]


def test_the_consumer_does_not_wait_and_passed_downloads_are_given_up(
    table: Table, cache: ShardCache, make_ahead: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_cache, "CHUNK", SIZE // 20)
    ahead = make_ahead(table, one_after_the_other)
    store = table.stores[0]
    store.gate.clear()
    ahead.advance(0, 0)
    assert comes_true(lambda: len(store.read) >= 2)  # both threads hang in a download

    def play() -> None:
        for step in range(8):
            ahead.advance(0, step)

    consumer = threading.Thread(target=play, daemon=True)
    consumer.start()
    consumer.join(WAIT_S)
    assert not consumer.is_alive()  # it played on while no byte came
    assert not store.gate.is_set() and not here(cache, table)
    store.gate.set()
    assert comes(cache, table, {4, 5})
    assert store.read.count(table.shard_names[0]) <= shard_cache.PIECES  # of twenty
    assert here(cache, table).isdisjoint({0, 1, 2})


def test_closing_ends_a_download_soon(
    table: Table, cache: ShardCache, make_ahead: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_cache, "CHUNK", SIZE // 20)
    ahead = make_ahead(table, one_after_the_other)
    store = table.stores[0]
    store.gate.clear()
    ahead.advance(0, 0)
    assert comes_true(lambda: len(store.read) >= 2)  # two shards hang in their first pieces
    closing = threading.Thread(target=ahead.close, daemon=True)
    closing.start()
    assert comes_true(lambda: ahead._closing)
    store.gate.set()
    closing.join(WAIT_S)
    assert not closing.is_alive()
    ahead.close()
    assert len(store.read) <= 2 * shard_cache.PIECES
    assert not here(cache, table) and not list(cache.folder.glob(".*.part"))


def test_local_stores_are_left_alone(table: Table, cache: ShardCache, make_ahead: Any, tmp_path: Path) -> None:
    local = SlowStore(str(tmp_path / "local"))
    mixed = Table([local, *table.stores], dataset_of_shard=np.arange(N, dtype=np.int32) % 2)
    mixed.shard_bytes[::2] = 1 << 40  # that they would not fit does not matter
    ahead = make_ahead(mixed, one_after_the_other)
    ahead.advance(0, 0)
    assert comes(cache, table, {1, 3, 5})
    assert not local.read


def test_a_missing_shard_is_left_to_the_consumer(table: Table, cache: ShardCache, make_ahead: Any) -> None:
    table.stores[0].remove(table.shard_names[0])
    ahead = make_ahead(table, one_after_the_other)
    ahead.advance(0, 0)
    assert comes(cache, table, {1, 2})
    ahead.advance(0, 1)


def test_what_goes_wrong_is_raised_at_the_next_step(
    table: Table, cache: ShardCache, make_ahead: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = make_ahead(table, one_after_the_other)
    table.stores[0].publish_bytes(bytes(4 * SIZE), table.shard_names[2])  # larger than the whole cache
    ahead.advance(0, 0)
    with pytest.raises(ConfigError, match=rf"{4 * SIZE} bytes, more than the cache"):
        for _ in range(WAIT_S * 100):
            time.sleep(0.01)
            ahead.advance(0, 0)
    with pytest.raises(ConfigError):
        ahead.advance(0, 1)

    def full(epoch: int) -> list[Stay]:
        raise StorageFullError("no space")

    ahead = make_ahead(table, full)
    ahead.advance(0, 0)
    with pytest.raises(StorageFullError):
        for _ in range(WAIT_S * 100):
            time.sleep(0.01)
            ahead.advance(0, 0)


def test_a_shard_that_does_not_fit_is_refused_at_once(table: Table, make_ahead: Any) -> None:
    with pytest.raises(ConfigError, match=rf"000000-00.tar has {SIZE} bytes, and {SIZE - 1} of the shard cache"):
        make_ahead(table, one_after_the_other, budget_bytes=SIZE - 1)
