"""The loader's fetching without decoding: one epoch of clips, in its order, from a dataset that `bench storage` wrote.

Threads fetch as those of the decoding workers do (through ClipSource, which checks each clip's sha256), and reading
ahead fills the cache as a ClipLoader has it do. All threads are in one process here; a loader's are in several.
"""

from __future__ import annotations

import shutil
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Literal

from reelmae.pipeline.loading.fetch.clip import ClipSource, SourceSettings, stores_to_stop
from reelmae.pipeline.loading.fetch.read_ahead import ReadAhead, shard_stays
from reelmae.pipeline.loading.fetch.readers import BYTES_IN_FLIGHT, CLIPS_IN_FLIGHT
from reelmae.pipeline.loading.fetch.shard_cache import CacheSettings, ShardCache
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.loading.order import epochs
from reelmae.pipeline.loading.tasks import ClipTask, clip_task
from reelmae.tools.bench.contenders import Contender, Job

BATCH, PREFETCH, LANES = 8, 2, 64  # the loader's own defaults


class Fetching(Contender):
    """Plays an epoch. Not given, the number of threads is that of the clips that a loader has in flight. `cache`: None fetches each clip by itself; an empty one is filled meanwhile; a full one is read."""

    def __init__(self, job: Job, cache: Literal["empty", "full"] | None = None) -> None:
        super().__init__(job)
        self._index = ClipIndex.open(job.url, access=job.access)
        largest = int(self._index.size.max())
        self._threads = job.fetch_threads or min(CLIPS_IN_FLIGHT, max(2, BYTES_IN_FLIGHT // largest))
        self._batch = min(BATCH, len(self._index))
        self._steps = len(self._index) // self._batch
        total = sum(file.size for file in job.files)
        self._cache = None if cache is None else CacheSettings(str(job.folder / "cache"), 2 * total)
        self._source = ClipSource(SourceSettings(self._index.stores, self._cache))
        if cache == "full":
            assert self._cache is not None
            shards = ShardCache(self._cache)
            for file in job.files:
                shards.bring(self._index.stores[0], file.path)
        self._fetch(clip_task(self._index, 0, (), planned=0))

    def _order(self) -> epochs.Epoch:
        return epochs.Epoch(self._index.shard_start, self._index.parts, seed=0, epoch=0, lanes=LANES)

    def _read_ahead(self, order: epochs.Epoch) -> ReadAhead | None:
        if self._cache is None:
            return None
        stays = shard_stays(order.shards_at, steps=self._steps, batch_videos=self._batch, rank=0, world=1)
        return ReadAhead(
            ShardCache(self._cache),
            replace(self._index, stores=stores_to_stop(self._index.stores)),  # closing it stops them
            lambda epoch: stays if epoch == 0 else [],
            steps=self._steps,
            budget_bytes=self._cache.max_bytes,
            in_flight=PREFETCH + 1,
        )

    def _fetch(self, task: ClipTask) -> int:
        return len(self._source.fetch(task))

    def run(self) -> int:
        order = self._order()
        ahead = self._read_ahead(order)
        try:
            return self._play(order, ahead)
        finally:
            if ahead is not None:
                ahead.close()

    def _play(self, order: epochs.Epoch, ahead: ReadAhead | None) -> int:
        """Fetch the epoch's clips and take them in their order, with as many in flight as there are threads; their bytes."""
        moved = 0
        waiting: deque[Future[int]] = deque()
        with ThreadPoolExecutor(self._threads) as pool:
            for step in range(self._steps):
                if ahead is not None:
                    ahead.advance(0, step)
                positions = epochs.rank_positions(step=step, batch_videos=self._batch, rank=0, world=1)
                for clip in order.clips_at(positions).tolist():
                    if len(waiting) == self._threads:
                        moved += waiting.popleft().result()
                    waiting.append(pool.submit(self._fetch, clip_task(self._index, clip, (), planned=clip)))
            return moved + sum(fetched.result() for fetched in waiting)

    def check(self) -> None:
        """Each clip was checked when it was fetched."""
        if self._cache is not None:
            shutil.rmtree(self._cache.folder)
