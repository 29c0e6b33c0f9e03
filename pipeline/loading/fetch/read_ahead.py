"""Shards brought into the cache before they are played, by the known order of the epoch.

    shard_stays   pure: order of an epoch → when this rank needs which shard
    ReadAhead     threads of the rank's process that bring them in that order

Properties that hold:
- shards come in the order of their first use. The next one comes only if it fits into `budget_bytes` together with
  all that are still needed. So reading ahead never evicts a shard that is still to be read, and ranks that share a
  cache in equal parts do not evict each other's shards;
- the consumer never waits for it: a clip whose shard is not here yet is read by itself (clip.py). A cache too small
  for all shards that are played at the same time (one for each lane of the rank) works, it only saves less;
- a shard is dropped, even in the middle of its download, once its last use is over;
- an error is raised in the consumer's thread, at its next `advance`. A shard that is missing or cut raises nothing
  here: the consumer's own reads report its clips as bad.

Example, a rank that plays two lanes, one clip of each in every step, with three shards of 4, 4 and 2 clips:

    lane 0   a a a a b         stays  a: steps 0 to 3, b: 0 to 4, c: 3 to 4
    lane 1   b b b c c
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from reelmae.pipeline.errors import ConfigError, ShortFileError
from reelmae.pipeline.loading.fetch.clip import accesses_of
from reelmae.pipeline.loading.fetch.readers import END_GRACE_S
from reelmae.pipeline.loading.fetch.shard_cache import ShardCache
from reelmae.pipeline.storage.store import Store

THREADS = 4  # shards at a time, each by several requests (shard_cache.py): 128 MiB of memory, 800 MB/s at most
PIECE = 1 << 16  # about how many positions are looked at together
MIN_GAP = 100  # steps


@dataclass(frozen=True)
class Stay:
    """A rank needs a shard from `first_step` to `last_step`, both included. `shard` is a number into the index."""

    first_step: int
    last_step: int
    shard: int


class ShardTable(Protocol):
    """The S shards of some datasets: the part of a ClipIndex that reading ahead needs."""

    @property
    def stores(self) -> Sequence[Store]:
        """The store of each dataset."""

    @property
    def shard_names(self) -> Sequence[str]:
        """[S], paths within their store."""

    @property
    def dataset_of_shard(self) -> np.ndarray:
        """Integers [S], into `stores`."""

    @property
    def shard_bytes(self) -> np.ndarray:
        """int64 [S]: bytes of each shard up to the end of its last clip."""


def shard_stays(
    shards_at: Callable[[np.ndarray], np.ndarray], *, steps: int, batch_videos: int, rank: int, world: int
) -> list[Stay]:
    """When `rank` needs which shard in an epoch of `steps` global batches, by first step.

    `shards_at` takes positions of the epoch (int64) and gives the number of each one's shard; the rank's k-th clip has
    position `rank + world * k` and belongs to step `k // batch_videos`. A shard has two stays where it is not used for
    a twentieth of the epoch (at least `MIN_GAP` steps); this happens mostly to shards that a border of lanes cuts.
    """
    gap = max(MIN_GAP, steps // 20)
    piece = min(gap, max(1, PIECE // batch_videos)) * batch_videos
    pieces = [np.empty((3, 0), np.int64)]
    for start in range(0, steps * batch_videos, piece):
        k = np.arange(start, min(start + piece, steps * batch_videos), dtype=np.int64)
        used = shards_at(rank + world * k)
        shards, first = np.unique(used, return_index=True)
        _, back = np.unique(used[::-1], return_index=True)
        pieces.append(np.stack([shards, k[first] // batch_videos, k[len(k) - 1 - back] // batch_videos]))
    shard, first, last = np.concatenate(pieces, axis=1)
    by_shard = np.lexsort((first, shard))
    shard, first, last = shard[by_shard], first[by_shard], last[by_shard]
    begins = np.ones(len(shard), dtype=bool)
    begins[1:] = (shard[1:] != shard[:-1]) | (first[1:] - last[:-1] > gap)
    ends = np.roll(begins, -1)
    stays = zip(first[begins].tolist(), last[ends].tolist(), shard[begins].tolist(), strict=True)
    return [Stay(*stay) for stay in sorted(stays)]


class ReadAhead:
    """Brings the shards of remote stores into `cache`. `stays(epoch)` gives the stays of an epoch, as shard_stays does.

    `steps` is the number of steps in an epoch. `in_flight` is how many steps before the current one may still be read.
    Looks at most one epoch ahead. Raises ConfigError where a shard does not fit into `budget_bytes`.
    The stores of `shards` are stopped when it is closed: give it its own (clip.stores_to_stop).
    """

    def __init__(
        self,
        cache: ShardCache,
        shards: ShardTable,
        stays: Callable[[int], list[Stay]],
        *,
        steps: int,
        budget_bytes: int,
        in_flight: int,
        threads: int = THREADS,
    ) -> None:
        remote = np.array([not store.is_local for store in shards.stores])[shards.dataset_of_shard]
        sizes = np.where(remote, shards.shard_bytes, 0)
        if len(sizes) and sizes.max() > budget_bytes:
            largest = int(sizes.argmax())
            raise ConfigError(
                f"shard {shards.shard_names[largest]} has {sizes[largest]} bytes, "
                f"and {budget_bytes} of the shard cache are this rank's; raise cache_gb so that several shards fit for each rank "
                "of the node, or leave cache out"
            )
        self._cache, self._shards, self._stays = cache, shards, stays
        self._remote, self._steps, self._budget_bytes = remote, steps, budget_bytes
        self._in_flight = in_flight
        self._changed = threading.Condition()  # guards what follows
        self._now = 0  # steps since the first epoch began
        self._held: dict[int, Stay] = {}  # by shard; steps since the first epoch began
        self._error: BaseException | None = None
        self._closing = False
        self._looking = threading.Lock()  # one thread at a time looks ahead; `advance` does not wait for it
        self._ahead: Iterator[Stay] = iter(())
        self._threads = [
            threading.Thread(target=self._run, name=f"reelmae-read-ahead-{i}", daemon=True) for i in range(threads)
        ]

    def advance(self, epoch: int, step: int) -> None:
        """The rank begins this step; it never goes back. The first call starts the threads."""
        with self._changed:
            if self._error is not None:
                raise self._error
            self._now = epoch * self._steps + step
            passed = [s for s in self._held.values() if s.last_step < self._now - self._in_flight]
            for stay in passed:  # marked before another shard gets its room, so that it is the one that is evicted
                self._cache.done(self._store(stay), self._shards.shard_names[stay.shard])
                del self._held[stay.shard]
            self._changed.notify_all()
        if not self._threads[0].ident:
            self._ahead = self._look_ahead(epoch)
            for thread in self._threads:
                thread.start()
            atexit.register(self.close)

    def close(self) -> None:
        """Stop downloading and end the threads: the stores are stopped, so that none is waited for."""
        atexit.unregister(self.close)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for access in accesses_of(self._shards.stores):
            access.stop()
        for thread in self._threads:
            if thread.ident:
                thread.join(END_GRACE_S)  # a request that stalls has a deadline, and the threads are daemons

    def _run(self) -> None:
        """A thread: take the next shard that fits, and bring it."""
        try:
            while (stay := self._take()) is not None:
                try:
                    shard = self._shards.shard_names[stay.shard]
                    self._cache.bring(self._store(stay), shard, partial(self._holds, stay.shard))
                except (FileNotFoundError, ShortFileError):
                    continue  # the consumer's own reads report the clips in it as bad
        except BaseException as e:  # noqa: BLE001  raised again in the consumer's thread
            with self._changed:
                self._error = e

    def _take(self) -> Stay | None:
        """Hold the next stay for which there is room, and return it; None when closing."""
        with self._looking:
            for stay in self._ahead:
                with self._changed:
                    self._changed.wait_for(partial(self._can_decide, stay))
                    if self._closing:
                        return None
                    if not self._needs(stay):
                        continue
                    known = stay.shard in self._held
                    self._held[stay.shard] = stay
                    if not known:
                        return stay
        return None

    def _look_ahead(self, epoch: int) -> Iterator[Stay]:
        """All stays from `epoch` on, in steps since the first epoch began; an epoch's once the one before starts."""
        while True:
            before = (epoch - 1) * self._steps
            with self._changed:
                self._changed.wait_for(partial(self._has_reached, before))
                if self._closing:
                    return
            base = epoch * self._steps
            for stay in self._stays(epoch):
                if self._remote[stay.shard]:
                    yield Stay(base + stay.first_step, base + stay.last_step, stay.shard)
            epoch += 1

    def _has_reached(self, step: int) -> bool:
        return self._closing or self._now >= step

    def _can_decide(self, stay: Stay) -> bool:
        return not self._needs(stay) or self._fits(stay)

    def _holds(self, shard: int) -> bool:
        return not self._closing and shard in self._held

    def _needs(self, stay: Stay) -> bool:
        return not self._closing and stay.last_step >= self._now

    def _fits(self, stay: Stay) -> bool:
        if stay.shard in self._held:
            return True
        sizes = self._shards.shard_bytes
        return sum(int(sizes[s]) for s in self._held) + int(sizes[stay.shard]) <= self._budget_bytes

    def _store(self, stay: Stay) -> Store:
        return self._shards.stores[self._shards.dataset_of_shard[stay.shard]]
