"""Pure: which clips make up which global batch.

A pass over a dataset shuffles its shards and the clips within each shard. The resulting sequence is cut into `lanes`
runs of equal length (to within one clip); with fewer shards than lanes a run is part of a shard. Lane `l` is played by
rank `l % world`. Position `p` of an epoch is the clip `p // lanes` of lane `p % lanes`, and global batch `s` is the
positions `s * G .. (s + 1) * G - 1`. An epoch is one pass, unless several datasets are mixed by weights.

Properties that hold:
- every clip has exactly one position in a pass;
- the last `clips % G` positions of an epoch, which fill no global batch, are dropped (another epoch drops others);
- rank `r` of `W` holds the positions `p % W == r` of every global batch: the same number on each rank;
- the global batches, in order, are the same for every `W` that divides `lanes` and `G`;
- a shard is cut by at most the lane borders in it: shards read are at most `shards + lanes - 1`, all ranks together;
- a batch mixes clips of `lanes` places in the epoch;
- an epoch costs the shuffling of its shards: a shard's clips are shuffled when they are first asked for.

Example, 7 clips, 2 lanes, G = 2:  lane 0 = a b c d, lane 1 = e f g
    positions  a e b f c g d    batches  (a e) (b f) (c g)   dropped  d

Mixed by weights, every lane takes from the datasets in turn, by their shares (shares.py). Each dataset has passes of
its own, which go on from one epoch to the next: its clip `t` in lane `l` has the position `(t * lanes + l) % clips` of
its pass `(t * lanes + l) // clips`. So a clip still comes once in each pass of its dataset, and the properties of lanes
and shards hold for each pass. An epoch has `clips // lanes` clips a lane (at least one), where `clips` counts all
datasets. A clip may come twice in an epoch, or not at all. The pair (pass, clip) is unique, so draws are keyed by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from reelmae.pipeline.errors import ConfigError
from reelmae.pipeline.loading.order.philox import STREAM_ORDER, raw_bits
from reelmae.pipeline.loading.order.shares import Shares

# second words of the counter of the order's random numbers (see philox.py)
_OF_SHARDS, _OF_CLIPS = 1, 2


@dataclass(frozen=True)
class ShardRange:
    """Shards `start` to `stop` - 1 of an index: they are shuffled as one dataset, which has a weight in a mixture."""

    start: int
    stop: int
    weight: float = 1.0


class DatasetPass:
    """One pass through the N clips of a shard range: each clip has one of the positions 0 … N - 1."""

    def __init__(self, shard_start: np.ndarray, shards: ShardRange, *, seed: int, number: int, lanes: int) -> None:
        self._seed, self._number, self._lanes = seed, number, lanes
        self._shard_start = shard_start
        order = _shuffle(shards.stop - shards.start, seed, (number, _OF_SHARDS, shards.start))
        self._shards = (shards.start + order).astype(np.int32)
        ends = np.cumsum(np.diff(shard_start[shards.start : shards.stop + 1])[order])
        self._starts = np.concatenate([[0], ends]).astype(np.int64)
        self._lane_starts = lane_starts(int(self._starts[-1]), lanes)
        # Each lane is within one shard at a time and moves forward, so a cache of two shards a lane is enough
        self._clips_of = lru_cache(maxsize=2 * lanes)(self._shuffle_clips)

    def shards_at(self, positions: np.ndarray) -> np.ndarray:
        """int32: the shards of the clips at these positions (0 … N - 1)."""
        return self._shards[self._nth(positions)[0]]

    def clips_at(self, positions: np.ndarray) -> np.ndarray:
        """int64: the clips at these positions, as rows of the index."""
        nth, place = self._nth(positions)
        within = place - self._starts[nth]
        clips = np.empty(len(nth), np.int64)
        for at in _groups(nth):
            clips[at] = self._clips_of(int(self._shards[nth[at[0]]]))[within[at]]
        return clips

    def _nth(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(which of the shuffled shards, place in the pass' sequence of clips)."""
        place = self._lane_starts[positions % self._lanes] + positions // self._lanes
        return np.searchsorted(self._starts, place, side="right") - 1, place

    def _shuffle_clips(self, shard: int) -> np.ndarray:
        first, stop = int(self._shard_start[shard]), int(self._shard_start[shard + 1])
        return first + _shuffle(stop - first, self._seed, (self._number, _OF_CLIPS, shard))


class Epoch:
    """The positions 0 … len - 1 of one epoch over the `parts` of an index whose shards begin at `shard_start`.

    `shard_start` is int64 [S + 1]. Several threads may call it at once.
    """

    def __init__(
        self, shard_start: np.ndarray, parts: Sequence[ShardRange], *, seed: int, epoch: int, lanes: int
    ) -> None:
        self._epoch, self._lanes = epoch, lanes
        self._sizes = np.array([shard_start[p.stop] - shard_start[p.start] for p in parts], np.int64)
        self._clips = int(self._sizes.sum())
        self._rows = max(1, self._clips // lanes)  # clips a lane takes in an epoch, if mixed
        self._shares = Shares([p.weight for p in parts], seed=seed, lanes=lanes) if len(parts) > 1 else None

        def make(part: int, number: int) -> DatasetPass:
            return DatasetPass(shard_start, parts[part], seed=seed, number=number, lanes=lanes)

        # Lanes reach the end of a pass at different steps: then two passes of a dataset are played, more of a small one
        self._pass = lru_cache(maxsize=4 * len(parts))(make)

    def __len__(self) -> int:
        return self._clips if self._shares is None else self._rows * self._lanes

    def clips_at(self, positions: np.ndarray) -> np.ndarray:
        """int64: the clips at these positions, as rows of the index."""
        clips = np.empty(len(positions), np.int64)
        for at, played, places in self._by_pass(positions):
            clips[at] = played.clips_at(places)
        return clips

    def shards_at(self, positions: np.ndarray) -> np.ndarray:
        """int32: the shards of those clips. Quick for many positions, since no clips are shuffled."""
        shards = np.empty(len(positions), np.int32)
        for at, played, places in self._by_pass(positions):
            shards[at] = played.shards_at(places)
        return shards

    def passes_at(self, positions: np.ndarray) -> np.ndarray:
        """int64: the number of the pass in which those clips are played: the epoch's own, unless mixed by weights."""
        return self._places(positions)[1]

    def _places(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(part, pass, position within the pass), int64 each."""
        if self._shares is None:
            same = np.zeros(len(positions), np.int64)
            return same, same + self._epoch, positions
        lane = positions % self._lanes
        part, turn = self._shares.at(lane, self._epoch * self._rows + positions // self._lanes)
        number, place = np.divmod(turn * self._lanes + lane, self._sizes[part])
        return part, number, place

    def _by_pass(self, positions: np.ndarray) -> Iterator[tuple[np.ndarray | slice, DatasetPass, np.ndarray]]:
        """(which of the positions, the pass that they belong to, their positions within it), for each pass."""
        if self._shares is None:
            yield slice(None), self._pass(0, self._epoch), positions
            return
        part, number, place = self._places(positions)
        for at in _groups(number * len(self._sizes) + part):
            yield at, self._pass(int(part[at[0]]), int(number[at[0]])), place[at]


def rank_positions(*, step: int, batch_videos: int, rank: int, world: int) -> np.ndarray:
    """int64 [batch_videos]: the positions that `rank` takes in global batch `step` of an epoch."""
    return step * batch_videos * world + rank + world * np.arange(batch_videos, dtype=np.int64)


def _shuffle(n: int, seed: int, words: tuple[int, int, int]) -> np.ndarray:
    """int64 [n]: 0 … n - 1 in an order drawn for these words."""
    return np.argsort(raw_bits(n, seed=seed, stream=STREAM_ORDER, words=words), kind="stable")


def _groups(values: np.ndarray) -> list[np.ndarray]:
    """For each distinct value the indices at which it stands, int64."""
    if not len(values):
        return []
    by_value = np.argsort(values, kind="stable")
    return np.split(by_value, np.flatnonzero(np.diff(values[by_value])) + 1)


def lane_starts(n_clips: int, lanes: int) -> np.ndarray:
    """int64 [lanes + 1]: where each lane starts in the epoch's sequence; lanes differ by at most one clip."""
    base, extra = divmod(n_clips, lanes)
    lane = np.arange(lanes + 1, dtype=np.int64)
    return lane * base + np.minimum(lane, extra)


def check_sizes(*, n_clips: int, batch_videos: int, lanes: int, rank: int, world: int) -> int:
    """Steps per epoch; ConfigError where the sizes cannot be played."""
    if not 0 <= rank < world:
        raise ConfigError(f"rank {rank} of world {world}: a rank is 0 … {world - 1}")
    if lanes % world:
        remedy = world * max(1, round(lanes / world))
        raise ConfigError(
            f"lanes={lanes} cannot be dealt to {world} ranks evenly; set lanes to a multiple, like {remedy}"
        )
    global_batch = batch_videos * world
    if n_clips < global_batch:
        raise ConfigError(
            f"the dataset has {n_clips} clips, fewer than one global batch of {global_batch} "
            f"(batch_videos={batch_videos} on {world} ranks); lower batch_videos to at most {n_clips // world} "
            "or shard more video"
        )
    return n_clips // global_batch
