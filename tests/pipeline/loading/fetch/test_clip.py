"""Clip bytes are what the index names, wherever they come from: a folder, a real S3 server, the shard cache."""

from __future__ import annotations

import hashlib
import pickle
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reelmae.pipeline.errors import BadClipError, StorageError
from reelmae.pipeline.loading.fetch.clip import ClipSource, SourceSettings
from reelmae.pipeline.loading.fetch.shard_cache import CacheSettings, ShardCache
from reelmae.pipeline.loading.tasks import ClipTask
from reelmae.pipeline.storage.checked import READS
from reelmae.pipeline.storage.store import Store

SHARD = "shards/000000-00.tar"
CLIPS = [random.Random(i).randbytes(5000 + i) for i in range(4)]


def tasks(dataset: int = 0, clips: list[bytes] = CLIPS) -> list[ClipTask]:
    """The clips of a shard that holds them one behind the other."""
    made, offset = [], 0
    for i, clip in enumerate(clips):
        check = int(hashlib.sha256(clip).hexdigest()[:16], 16)
        where = {"dataset": dataset, "shard": SHARD, "offset": offset, "size": len(clip), "check": check}
        order = {"planned": i, "epoch": 0, "attempt": 0}
        made.append(ClipTask(clip=i, key=f"key_{i:04d}", frames=16, draws=(), **where, **order))  # type: ignore[arg-type]
        offset += len(clip)
    return made


@pytest.fixture
def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Store]:
    """make_store("local" | "s3", clips=CLIPS, name="data") → a store with one shard."""

    def make(kind: str, clips: list[bytes] = CLIPS, name: str = "data") -> Store:
        if kind == "local":
            store = Store(str(tmp_path / name))
        else:
            store = Store(request.getfixturevalue("s3_server").url(f"fetch/{tmp_path.name}/{name}"))
        store.publish_bytes(b"".join(clips), SHARD)
        store.publish_bytes(b"{}", "dataset.json")
        return store

    return make


@pytest.fixture
def cache(tmp_path: Path) -> CacheSettings:
    return CacheSettings(str(tmp_path / "cache"), 1 << 20)


def cached_files(cache: CacheSettings) -> list[Path]:
    return sorted(Path(cache.folder).glob("*.shard"))


@pytest.mark.parametrize("kind", ["local", "s3"])
@pytest.mark.parametrize("with_cache", [False, True])
def test_clips_are_what_the_index_names(make_store: Any, cache: CacheSettings, kind: str, with_cache: bool) -> None:
    store = make_store(kind)
    source = ClipSource(SourceSettings((store,), cache if with_cache else None))
    assert [source.fetch(task) for task in tasks()] == CLIPS


def test_settings_travel_to_other_processes(make_store: Any, cache: CacheSettings) -> None:
    settings = SourceSettings((make_store("local"),), cache)
    assert ClipSource(pickle.loads(pickle.dumps(settings))).fetch(tasks()[2]) == CLIPS[2]


def test_every_dataset_is_read_from_its_own_store(make_store: Any, cache: CacheSettings) -> None:
    others = [clip[::-1] for clip in CLIPS]
    stores = [make_store("s3"), make_store("local", others, "b"), make_store("s3", others, "c")]
    source = ClipSource(SourceSettings(tuple(stores), cache))
    ShardCache(cache).bring(stores[0], SHARD)
    assert source.fetch(tasks(0)[1]) == CLIPS[1]
    assert source.fetch(tasks(1, others)[1]) == source.fetch(tasks(2, others)[1]) == others[1]


@pytest.mark.parametrize("kind", ["local", "s3"])
@pytest.mark.parametrize("with_cache", [False, True])
def test_a_changed_byte_is_a_bad_clip(make_store: Any, cache: CacheSettings, kind: str, with_cache: bool) -> None:
    damaged = bytearray(CLIPS[1])
    damaged[100] ^= 1
    store = make_store(kind, [CLIPS[0], bytes(damaged), *CLIPS[2:]])
    source = ClipSource(SourceSettings((store,), cache if with_cache else None))
    with pytest.raises(BadClipError, match=rf"{tasks()[1].check:016x}.*the shard is damaged") as bad:
        source.fetch(tasks()[1])
    assert bad.value.key == "key_0001" and store.url(SHARD) in bad.value.reason
    assert source.fetch(tasks()[2]) == CLIPS[2]


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_a_shard_that_is_gone_or_cut_makes_bad_clips(make_store: Any, kind: str) -> None:
    store = make_store(kind)
    source = ClipSource(SourceSettings((store,)))
    with pytest.raises(BadClipError, match=r"shards/1\.tar is missing"):
        source.fetch(replace(tasks()[0], shard="shards/1.tar"))
    with pytest.raises(BadClipError, match="wanted 5003 bytes"):
        source.fetch(replace(tasks()[3], offset=tasks()[3].offset + 1))


def test_storage_that_fails_is_no_fault_of_a_clip(tmp_path: Path) -> None:
    (tmp_path / SHARD).mkdir(parents=True)
    with pytest.raises((StorageError, IsADirectoryError)):
        ClipSource(SourceSettings((Store(str(tmp_path)),))).fetch(tasks()[0])


def test_cached_shards_are_read_from_the_cache_and_others_not_brought(make_store: Any, cache: CacheSettings) -> None:
    store = make_store("s3")
    source = ClipSource(SourceSettings((store,), cache))
    assert source.fetch(tasks()[0]) == CLIPS[0]
    assert not cached_files(cache)
    ShardCache(cache).bring(store, SHARD)  # as the read-ahead does, in another process
    store.remove(SHARD)
    assert [source.fetch(task) for task in tasks()] == CLIPS


def test_damage_in_the_cache_costs_nothing_but_the_cached_shard(make_store: Any, cache: CacheSettings) -> None:
    store = make_store("s3")
    source = ClipSource(SourceSettings((store,), cache))
    for damage in (lambda f: f.write_bytes(f.read_bytes()[:6000]), lambda f: f.write_bytes(bytes(20006))):
        ShardCache(cache).bring(store, SHARD)
        (file,) = cached_files(cache)
        damage(file)
        assert source.fetch(tasks()[1]) == CLIPS[1]
        assert not cached_files(cache)
    assert ShardCache(cache).bring(store, SHARD)
    assert source.fetch(tasks()[1]) == CLIPS[1]


def test_damage_in_the_store_does_not_cost_the_cached_shard(make_store: Any, cache: CacheSettings) -> None:
    store = make_store("s3", [CLIPS[0], bytes(len(CLIPS[1])), *CLIPS[2:]])
    source = ClipSource(SourceSettings((store,), cache))
    ShardCache(cache).bring(store, SHARD)
    with pytest.raises(BadClipError, match="the shard is damaged"):
        source.fetch(tasks()[1])
    assert cached_files(cache)
    assert source.fetch(tasks()[2]) == CLIPS[2]


def test_local_datasets_leave_the_cache_alone(make_store: Any, cache: CacheSettings) -> None:
    store = make_store("local")
    ShardCache(cache).bring(store, SHARD)  # nobody does
    (file,) = cached_files(cache)
    file.write_bytes(bytes(30000))
    assert [ClipSource(SourceSettings((store,), cache)).fetch(task) for task in tasks()] == CLIPS
    assert cached_files(cache) == [file]


class Unsteady(Store):
    """Each read gives one wrong bit, and every time another one."""

    reads = 0

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        """Read, and change a bit."""
        data = bytearray(super().read_range(path, offset, size))
        data[self.reads] ^= 1
        self.reads += 1
        return bytes(data)


def test_a_network_that_gives_other_bytes_each_time_is_no_fault_of_a_clip(make_store: Any) -> None:
    store = Unsteady(make_store("s3").url())
    source = ClipSource(SourceSettings((store,)))
    source.stores = (store,)
    with pytest.raises(StorageError, match=rf"{store.url(SHARD)}.*gave other bytes at each of {READS} reads"):
        source.fetch(tasks()[0])
    assert store.access.retries.counts() == {"checksum": READS - 1}
