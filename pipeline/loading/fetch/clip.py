"""The bytes of one clip, checked: from the shard cache, from a local shard, or by ranged reads.

Properties that hold:
- every clip is checked against the sha256 that was taken when it was sharded, and a part of a clip against those of its
  blocks. Wrong bytes are read again (pieces.py). A damaged clip is a bad clip and never becomes training data;
- a clip whose shard is in the cache is read from there. Otherwise it is read at once by one ranged read: whole shards
  are brought by read_ahead.py, before they are needed;
- of a large clip on a remote store only the blocks that the decoder needs are read (blocks.py), where they are less
  than half of it and the index has their checks. That takes two requests, one after the other: what is in front says
  where the pictures lie;
- where a cached clip is damaged, it is read again from the store. If it is good there, the cached shard is dropped and
  the clip is used. If not, the clip is bad, and the cached shard stays for the other clips in it;
- the shards of a local dataset are read where they are and never cached;
- a shard that is gone makes its clips bad. Where dataset.json is gone too, it is the storage that is not there.

Neighbours in a shard are read by one request where they are asked for together (`fetch_all`). That is so in a sweep,
which plays clips in the order of the index: eight clips of 0.3 MB cost one latency and not eight. In training there are
hardly ever neighbours: of P clips in flight, P / L are of one lane (32 / 64 with the defaults), two of a lane are of one
shard, and in a shuffled shard of C clips they lie side by side with a chance of 2 / C.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from reelmae.pipeline.errors import BadClipError, StorageError
from reelmae.pipeline.loading.fetch.blocks import BLOCK, ClipParts, Need, Needed, blocks_of, is_worth_it, join, piece_of
from reelmae.pipeline.loading.fetch.pieces import Damage, Piece, check_of, read_pieces
from reelmae.pipeline.loading.fetch.shard_cache import CacheSettings, ShardCache
from reelmae.pipeline.loading.tasks import ClipTask
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.store import Store

DATASET_JSON = "dataset.json"  # schema.DATASET_JSON, which workers do not import, since they start without pyarrow


@dataclass(frozen=True)
class SourceSettings:
    """Where clips come from; it is sent to the workers, through a pipe. `stores[ClipTask.dataset]` has the clip."""

    stores: tuple[Store, ...]
    cache: CacheSettings | None = None


def accesses_of(stores: Iterable[Store]) -> list[Access]:
    """How the stores are reached: each Access once, in the order of the stores."""
    return list({id(store.access): store.access for store in stores}.values())


def stores_to_stop(stores: Sequence[Store]) -> tuple[Store, ...]:
    """The same stores, to be stopped without stopping these; retries are counted together."""
    own = {id(access): replace(access, stopping=threading.Event()) for access in accesses_of(stores)}
    return tuple(Store(store.url(), own[id(store.access)]) for store in stores)


class ClipSource:
    """The clips of some datasets. Any number of threads may fetch."""

    def __init__(self, settings: SourceSettings) -> None:
        self.stores = stores_to_stop(settings.stores)
        self._cache = None if settings.cache is None else ShardCache(settings.cache)

    def stop(self) -> None:
        """End all waiting for stores soon: what is being fetched raises a StorageError."""
        for access in accesses_of(self.stores):
            access.stop()

    def fetch(self, task: ClipTask) -> bytes:
        """All of the video's bytes.

        BadClipError where the shard is missing, ends within the clip, or holds other bytes than the index says;
        StorageError where the storage fails after retries, which says nothing about the clip.
        """
        return self._fetch(task, self._cached(task))

    def _fetch(self, task: ClipTask, cached: bytes | None) -> bytes:
        store = self.stores[task.dataset]
        if cached is not None and check_of(cached) == task.check:
            return cached
        try:
            data = _whole(store, task)
        except FileNotFoundError as e:
            raise _judge_missing(store, task) from e
        if self._cache is not None and cached is not None:
            self._cache.drop(store, task.shard)
        return data

    def fetch_needed(self, task: ClipTask, needed: Needed) -> bytes | ClipParts:
        """What is needed of the video's bytes, where that is much less than all; else as `fetch`."""
        store = self.stores[task.dataset]
        cached = self._cached(task)
        if task.blocks is None or store.is_local or cached is not None:
            return self._fetch(task, cached)
        try:
            return _fetch_part(store, task, needed)
        except FileNotFoundError as e:
            raise _judge_missing(store, task) from e

    def fetch_all(self, tasks: Sequence[ClipTask], needed: Needed) -> list[bytes | ClipParts | BadClipError]:
        """What `fetch_needed` gives for each task, or the BadClipError that it raises.

        Clips of one shard are read together. StorageError as `fetch`.
        """
        fetched: dict[int, bytes | ClipParts | BadClipError] = {}
        together: dict[tuple[int, str], list[int]] = {}
        for at, task in enumerate(tasks if len(tasks) > 1 else ()):
            if task.blocks is None and not self.stores[task.dataset].is_local and self._cached(task) is None:
                together.setdefault((task.dataset, task.shard), []).append(at)
        for (dataset, shard), places in together.items():
            if len(places) > 1:
                fetched |= self._fetch_neighbours(self.stores[dataset], shard, {at: tasks[at] for at in places})
        for at, task in enumerate(tasks):
            if at not in fetched:
                try:
                    fetched[at] = self.fetch_needed(task, needed)
                except BadClipError as e:
                    fetched[at] = e
        return [fetched[at] for at in range(len(tasks))]

    def _cached(self, task: ClipTask) -> bytes | None:
        """The clip's bytes in the cache, unchecked; None where its shard is not there."""
        store = self.stores[task.dataset]
        if self._cache is None or store.is_local:
            return None
        return self._cache.read(store, task.shard, task.offset, task.size)

    def _fetch_neighbours(
        self, store: Store, shard: str, tasks: dict[int, ClipTask]
    ) -> dict[int, bytes | ClipParts | BadClipError]:
        pieces = [Piece(task.offset, task.size, task.check) for task in tasks.values()]
        try:
            read = read_pieces(store, shard, pieces)
        except FileNotFoundError:
            return {at: _judge_missing(store, task) for at, task in tasks.items()}
        return {
            at: BadClipError(task.key, data.reason) if isinstance(data, Damage) else data
            for (at, task), data in zip(tasks.items(), read, strict=True)
        }


def _whole(store: Store, task: ClipTask) -> bytes:
    [data] = read_pieces(store, task.shard, [Piece(task.offset, task.size, task.check)])
    if isinstance(data, Damage):
        raise BadClipError(task.key, data.reason)
    return data


def _fetch_part(store: Store, task: ClipTask, needed: Needed) -> bytes | ClipParts:
    """The blocks that are needed; the whole clip where they are not much less. Errors as those of ClipSource.fetch."""
    blocks: dict[int, bytes] = {}
    need: Need | None = needed(task, b"")
    while need is not None:
        wanted = blocks_of(need, task.size)
        if not is_worth_it(wanted, task.size):
            break
        _add_blocks(store, task, blocks, wanted)
        parts = join(blocks, task.size)
        if need.ranges:
            return parts
        need = needed(task, parts.runs[0])
    if not blocks:
        return _whole(store, task)
    _add_blocks(store, task, blocks, range(-(-task.size // BLOCK)))
    data = join(blocks, task.size).runs[0]
    if check_of(data) != task.check:
        raise BadClipError(
            task.key, f"the checks of its blocks in the index of {store.url()} are not those of its sha256"
        )
    return data


def _add_blocks(store: Store, task: ClipTask, blocks: dict[int, bytes], wanted: Iterable[int]) -> None:
    """Read those that are not here yet."""
    new = [block for block in wanted if block not in blocks]
    for block, data in zip(new, read_pieces(store, task.shard, [piece_of(task, block) for block in new]), strict=True):
        if isinstance(data, Damage):
            raise BadClipError(task.key, data.reason)
        blocks[block] = data


def _judge_missing(store: Store, task: ClipTask) -> BadClipError:
    """Why the clip is bad, whose shard is not there; StorageError where its dataset is not there either."""
    if not store.exists(DATASET_JSON):
        raise StorageError(
            f"{store.url(task.shard)} is not there, and {DATASET_JSON} of its dataset is gone too; "
            "bring the dataset back (is its disk mounted?), and run again"
        )
    return BadClipError(task.key, f"its shard {store.url(task.shard)} is missing")
