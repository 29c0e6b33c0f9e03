"""Pure: which of several datasets a lane plays at each of its steps, by their weights.

Weights are scaled to a sum of 1. A dataset of weight `w` has on each lane the marks `(t + phase) / w`, t = 0, 1, 2 ….
The lane plays the datasets in the order of their marks, for ever. Epochs cut this sequence, and nothing is rounded.

Properties that hold:
- in any `n` consecutive steps of a lane, a dataset is played `w * n` times, to within 2 + w × datasets;
- the phases of a dataset are spread evenly over the lanes, in an order of its own, so a batch over all lanes has about
  the right shares as well;
- step `k` is found without computing the steps before it: the sequence is made in windows of about 1000 steps.

Example, weights 3/4 and 1/4, phases 0.5 and 0.5:  marks 2/3 2 10/3 14/3 6 … and 2 6 …
    played  0 0 1 0 0 0 1 …
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from reelmae.pipeline.loading.order.philox import STREAM_ORDER, raw_bits

_OF_PHASES = 3  # a second word of the counter, different from those in epochs.py
_WINDOW = 1024


class Shares:
    """The sequences of `lanes` lanes. Several threads may call it at once."""

    def __init__(self, weights: Sequence[float], *, seed: int, lanes: int) -> None:
        d = len(weights)
        self._weights = np.array(weights, np.float64) / sum(weights)
        places = [
            np.argsort(raw_bits(lanes, seed=seed, stream=STREAM_ORDER, words=(0, _OF_PHASES, i)), kind="stable")
            for i in range(d)
        ]
        self._phase_LD = (np.stack(places, axis=1) + 0.5) / lanes
        self._window = max(_WINDOW, 4 * d)  # steps; a window holds as many marks, give or take `d`
        # Each lane is within one window at a time and moves forward
        self._marks = lru_cache(maxsize=2 * lanes)(self._sort_marks)

    def at(self, lane: np.ndarray, step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(dataset, how often the lane played it before), int64 each, at these steps of these lanes."""
        window = np.maximum(0, (step - len(self._weights)) // self._window)
        for _ in range(3):  # the estimate is at most two windows early, and one more for rounding
            window += self._before(lane, window + 1).sum(axis=1) <= step
        within = step - self._before(lane, window).sum(axis=1)
        dataset, turn = np.empty(len(step), np.int64), np.empty(len(step), np.int64)
        by_lane = np.lexsort((window, lane))
        borders = np.flatnonzero(np.diff(lane[by_lane]) | np.diff(window[by_lane])) + 1
        for at in np.split(by_lane, borders) if len(step) else ():
            datasets, turns = self._marks(int(lane[at[0]]), int(window[at[0]]))
            dataset[at], turn[at] = datasets[within[at]], turns[within[at]]
        return dataset, turn

    def _before(self, lane: np.ndarray, window: np.ndarray) -> np.ndarray:
        """int64 [n, D]: each dataset's marks before these windows of these lanes."""
        marks = np.ceil(self._weights * (self._window * window)[:, None] - self._phase_LD[lane])
        return np.maximum(marks, 0).astype(np.int64)

    def _sort_marks(self, lane: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """(datasets, turns) of one window of a lane, in the order of their marks."""
        first, stop = self._before(np.array([lane, lane]), np.array([window, window + 1]))
        dataset = np.repeat(np.arange(len(first)), stop - first)
        turn = np.concatenate([np.arange(a, b) for a, b in zip(first, stop, strict=True)])
        mark = (turn + self._phase_LD[lane][dataset]) / self._weights[dataset]
        sorted_ = np.argsort(mark, kind="stable")
        return dataset[sorted_], turn[sorted_]
