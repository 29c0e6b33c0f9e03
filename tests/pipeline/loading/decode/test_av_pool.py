"""How the clips of remote stores are handed to workers: enough in flight to hide latency, within bounded memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch

from reelmae.pipeline.loading.config import LoaderConfig
from reelmae.pipeline.loading.decode import av_pool
from reelmae.pipeline.loading.decode.av_pool import AvPool
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.loading.loader import ClipLoader
from reelmae.pipeline.loading.order.draws import SamplePolicy
from reelmae.pipeline.storage.store import Store

HANGS_S = 120  # only what never ends takes so long, on any machine


def config(**settings: object) -> LoaderConfig:
    base = {"backend": "av", "device": "cpu", "sample": SamplePolicy(frames=4, size=32, stride=4), "patch": (2, 8, 8)}
    return LoaderConfig(**{**base, "workers": 2, "batch_videos": 8, "lanes": 8, **settings})  # type: ignore[arg-type]


class Gate:
    """Holds requests until `wanted` different ones are waiting at the same time."""

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self.most = 0
        self._waiting: set[tuple[str, int]] = set()
        self._open = False
        self._changed = threading.Condition()

    def __call__(self, path: str, start: int) -> None:
        with self._changed:
            self._waiting.add((path, start))
            self.most = max(self.most, len(self._waiting))
            if len(self._waiting) == self.wanted:
                self._changed.wait_for(lambda: len(self._waiting) > self.wanted, 1.0)  # time for more
                self._open = True
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self._open, HANGS_S):
                self._open = True  # the test fails, and soon
            self._waiting.discard((path, start))


@pytest.fixture
def index(make_dataset: Callable[..., ClipIndex], spec: type) -> ClipIndex:
    """80 clips in 10 shards."""
    return make_dataset([spec(frames=20, seed=s % 8) for s in range(80)], clips_per_shard=8)


def test_so_many_clips_are_fetched_at_a_time_that_latency_is_hidden(
    index: ClipIndex, serve_ranges: Callable[..., str]
) -> None:
    """200 MB/s of clips of 0.3 MB take 17 at a time through 20 ms and 60 MB/s for each connection."""
    gate = Gate(24)
    remote = replace(index, stores=(Store(serve_ranges(index.store, gate)),))
    with ClipLoader(remote, config()) as loader:
        [batch] = islice(loader, 1)
    with ClipLoader(index, config()) as loader:
        [local] = islice(loader, 1)
    assert gate.most >= 24 and torch.equal(batch.clips_BCTHW, local.clips_BCTHW)


def test_large_clips_are_fetched_two_at_a_time_for_each_worker(
    index: ClipIndex, serve_ranges: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(av_pool, "BYTES_IN_FLIGHT", 1)
    gate = Gate(4)
    remote = replace(index, stores=(Store(serve_ranges(index.store, gate)),))
    with ClipLoader(remote, config()) as loader:
        assert len(list(islice(loader, 3))) == 3
        assert isinstance(loader._decoder, AvPool)
    assert gate.most == 4


def test_neighbours_go_together_and_no_worker_is_left_without_work(index: ClipIndex) -> None:
    with ClipLoader(index, config()) as loader:
        next(iter(loader))
        pool: Any = loader._decoder
        tasks = [loader._task(clip, 0) for clip in (0, 1, 2, 4, 5, 8, 9)]
        with pool._changed:  # its thread hands out nothing meanwhile
            before, pool._pending = pool._pending, av_pool.deque(range(-7, 0))
            places = {n - 7: av_pool._Place(pool._order[0], 0, task) for n, task in enumerate(tasks)}
            pool._places.update(places)
            groups = []
            while pool._pending:
                groups.append([tasks[ticket + 7].clip for ticket in pool._take_neighbours()])
            for ticket in places:
                del pool._places[ticket]
            pool._pending = before
    assert groups == [[0, 1, 2], [4, 5], [8], [9]]  # at most half of those that wait, for each of two workers
