"""The `av` backend without processes: batches are decoded in the caller's thread when they are collected."""

from __future__ import annotations

import time
from collections import deque

import numpy as np

from reelmae.pipeline.errors import BadClipError
from reelmae.pipeline.loading.decode.passes import DecodePolicy
from reelmae.pipeline.loading.decode.pyav import AvDecoder
from reelmae.pipeline.loading.fetch.clip import ClipSource, SourceSettings
from reelmae.pipeline.loading.tasks import ClipTask, Cost, Decoded, OnBad


class InlineDecoder:
    """A Decoder (see tasks) for debugging and for measuring one core. `shape` is (videos, R, 3, T, H, W)."""

    def __init__(self, source: SourceSettings, shape: tuple[int, ...], *, policy: DecodePolicy, on_bad: OnBad) -> None:
        self._source = ClipSource(source)
        self._decoder = AvDecoder(frames=shape[3], size=shape[4], policy=policy)
        self._clips = np.empty(shape, np.uint8)  # one batch at a time is between collect and release
        self._on_bad = on_bad
        self._batches: deque[list[ClipTask]] = deque()

    def submit(self, tasks: list[ClipTask]) -> None:
        """Remember a batch."""
        self._batches.append(list(tasks))

    def collect(self) -> Decoded:
        """Decode the oldest batch."""
        tasks = self._batches.popleft()
        decoded = Decoded(tasks, self._clips.reshape(-1, *self._clips.shape[2:]), lambda: None)
        for at in range(len(tasks)):
            while True:
                try:
                    decoded.cost.add(self._decode(tasks[at], at))
                    break
                except BadClipError as e:
                    tasks[at] = self._on_bad(tasks[at], e)
        return decoded

    def _decode(self, task: ClipTask, at: int) -> Cost:
        began = time.perf_counter()
        data = self._source.fetch(task)
        fetched = time.perf_counter()
        cost = self._decoder.decode(task, data, self._clips[at])
        cost.fetch_s = fetched - began
        return cost

    def close(self) -> None:
        """Forget the batches."""
        self._batches.clear()
