"""The bytes of one clip, checked: from the shard cache, from a local shard, or by one ranged read.

Properties that hold:
- every clip is checked against the sha256 that was taken when it was sharded. A damaged clip is a bad clip and never
  becomes training data;
- a clip whose shard is in the cache is read from there. Otherwise it is read at once by one ranged read: whole shards
  are brought by read_ahead.py, before they are needed;
- where a cached clip is damaged, it is read again from the store. If it is good there, the cached shard is dropped and
  the clip is used. If not, the clip is bad, and the cached shard stays for the other clips in it;
- the shards of a local dataset are read where they are and never cached.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from reelmae.pipeline.errors import BadClipError, ShortFileError
from reelmae.pipeline.loading.fetch.shard_cache import CacheSettings, ShardCache
from reelmae.pipeline.loading.tasks import ClipTask
from reelmae.pipeline.storage.store import Store


@dataclass(frozen=True)
class SourceSettings:
    """Where clips come from; it is sent to the workers. `urls[ClipTask.dataset]` is a clip's dataset."""

    urls: tuple[str, ...]
    cache: CacheSettings | None = None


class ClipSource:
    """The clips of some datasets. Any number of threads may fetch."""

    def __init__(self, settings: SourceSettings) -> None:
        self.stores = tuple(Store(url) for url in settings.urls)
        self._cache = None if settings.cache is None else ShardCache(settings.cache)

    def fetch(self, task: ClipTask) -> bytes:
        """The video's bytes.

        BadClipError where the shard is missing, ends within the clip, or holds other bytes than the index says;
        StorageError where the storage fails after retries, which says nothing about the clip.
        """
        store = self.stores[task.dataset]
        cached = None
        if self._cache is not None and not store.is_local:
            cached = self._cache.read(store, task.shard, task.offset, task.size)
            if cached is not None and _is_whole(cached, task):
                return cached
        data = fetch(store, key=task.key, shard=task.shard, offset=task.offset, size=task.size)
        if not _is_whole(data, task):
            raise BadClipError(
                task.key,
                f"its bytes in {store.url(task.shard)} are not those of the index (sha256 {_check(data):016x}…, "
                f"wanted {task.check:016x}…); the shard is damaged",
            )
        if self._cache is not None and cached is not None:
            self._cache.drop(store, task.shard)
        return data


def fetch(store: Store, *, key: str, shard: str, offset: int, size: int) -> bytes:
    """The video's bytes within its shard, unchecked; errors as those of ClipSource."""
    try:
        return store.read_range(shard, offset, size)
    except FileNotFoundError as e:
        raise BadClipError(key, f"its shard {store.url(shard)} is missing") from e
    except ShortFileError as e:
        raise BadClipError(key, str(e)) from e


def _is_whole(data: bytes, task: ClipTask) -> bool:
    return _check(data) == task.check


def _check(data: bytes) -> int:
    """The first 8 bytes of the sha256, which the index keeps of each clip."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")
