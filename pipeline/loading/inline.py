"""The `av` backend without processes: batches are decoded in the caller's thread when they are collected."""

from __future__ import annotations

from collections import deque

import numpy as np

from reelmae.pipeline.errors import BadClipError
from reelmae.pipeline.loading.decode_av import AvDecoder
from reelmae.pipeline.loading.tasks import ClipTask, Decoded, OnBad
from reelmae.pipeline.storage import Store


class InlineDecoder:
    """A Decoder (see tasks) for debugging and for measuring one core. `shape` is (videos, R, T, H, W, 3)."""

    def __init__(self, store: Store, shape: tuple[int, ...], *, on_bad: OnBad) -> None:
        self._decoder = AvDecoder(store, frames=shape[2], size=shape[3])
        self._shape = shape
        self._on_bad = on_bad
        self._batches: deque[list[ClipTask]] = deque()

    def submit(self, tasks: list[ClipTask]) -> None:
        """Remember a batch."""
        self._batches.append(list(tasks))

    def collect(self) -> Decoded:
        """Decode the oldest batch."""
        tasks = self._batches.popleft()
        frames = np.empty(self._shape, np.uint8)
        videos, repeats, *rest = self._shape
        decoded = Decoded(tasks, frames.reshape(videos * repeats, *rest), lambda: None)
        for at in range(videos):
            while True:
                try:
                    decoded.cost.add(self._decoder.decode(tasks[at], frames[at]))
                    break
                except BadClipError as e:
                    tasks[at] = self._on_bad(tasks[at], e)
        return decoded

    def close(self) -> None:
        """Forget the batches."""
        self._batches.clear()
