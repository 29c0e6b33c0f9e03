"""Pure: which clips make up which global batch.

A pass over a dataset shuffles its shards and the clips within each, and cuts the resulting sequence into `lanes` runs
of equal length (to within one clip); with fewer shards than lanes a run is part of a shard. Lane `l` is played by
rank `l % world`. Position `p` of an epoch is the clip `p // lanes` of lane `p % lanes`, and global batch `s` is the
positions `s * G .. (s + 1) * G - 1`. An epoch is one pass, unless several datasets are mixed by weights.

Properties that hold:
- every clip has exactly one position in a pass; the last `clips % G` positions of an epoch, which fill no global
  batch, are dropped (another epoch drops others);
- rank `r` of `W` holds the positions `p % W == r` of every global batch: the same number on each rank;
- the global batches, in order, are the same for every `W` that divides `lanes` and `G`;
- a shard is cut by at most the lane borders in it: shards read are at most `shards + lanes - 1`, all ranks together;
- a batch mixes clips of `lanes` places in the epoch;
- an epoch costs the shuffling of its shards: a shard's clips are shuffled when they are first asked for.

Example, 7 clips, 2 lanes, G = 2:  lane 0 = a b c d, lane 1 = e f g
    positions  a e b f c g d    batches  (a e) (b f) (c g)   dropped  d

Mixed by weights, every lane takes from the datasets in turn, by their shares (shares.py). A dataset goes through
passes of its own, at its own pace and through the epochs: its clip `t` in lane `l` has the position
`(t * lanes + l) % clips` of its pass `(t * lanes + l) // clips`. So here too a clip comes once in each pass, and what
was said of lanes and shards holds of each pass. An epoch has `clips // lanes` clips a lane, those of all
datasets together (at least one). A clip may come twice in an epoch, or not at all; the pair of its pass and
itself is unique: that is what its draws are keyed by.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from reelmae.pipeline.errors import ConfigError
from reelmae.pipeline.loading.order.philox import STREAM_ORDER, raw_bits
from reelmae.pipeline.loading.order.shares import Shares

# second counter words of the order's random numbers
_OF_SHARDS, _OF_CLIPS = 1, 2


@dataclass(frozen=True)
class Part:
    """Shards `start` to `stop` - 1 of an index, which are shuffled as one dataset, and its weight."""

    start: int
    stop: int
    weight: float = 1.0


class Pass:
    """One pass through the shards of a part: N positions, each of its clips at one of them."""

    def __init__(self, shard_start: np.ndarray, part: Part, *, seed: int, number: int, lanes: int) -> None:
        self._seed, self._number, self._lanes = seed, number, lanes
        self._shard_start = shard_start
        shuffled = _shuffled(part.stop - part.start, seed, (number, _OF_SHARDS, part.start))
        self._shards = (part.start + shuffled).astype(np.int32)
        ends = np.cumsum(np.diff(shard_start[part.start : part.stop + 1])[shuffled])
        self._starts = np.concatenate([[0], ends]).astype(np.int64)
        self._lane_starts = lane_starts(int(self._starts[-1]), lanes)
        # each lane is within one shard at a time, and positions are asked for in order: twice that many are enough
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
        return first + _shuffled(stop - first, self._seed, (self._number, _OF_CLIPS, shard))


class Epoch:
    """The positions 0 … len - 1 of one epoch over the `parts` of an index whose shards begin at `shard_start`.

    `shard_start` is int64 [S + 1]. Safe to be asked by several threads at once.
    """

    def __init__(self, shard_start: np.ndarray, parts: Sequence[Part], *, seed: int, epoch: int, lanes: int) -> None:
        self._epoch, self._lanes = epoch, lanes
        self._sizes = np.array([shard_start[p.stop] - shard_start[p.start] for p in parts], np.int64)
        self._clips = int(self._sizes.sum())
        self._rows = max(1, self._clips // lanes)  # clips a lane takes in an epoch, if mixed
        self._shares = Shares([p.weight for p in parts], seed=seed, lanes=lanes) if len(parts) > 1 else None

        def make(part: int, number: int) -> Pass:
            return Pass(shard_start, parts[part], seed=seed, number=number, lanes=lanes)

        # lanes are not in step to the clip: at a pass' end two are played, of a small dataset more
        self._pass = lru_cache(maxsize=4 * len(parts))(make)

    def __len__(self) -> int:
        return self._clips if self._shares is None else self._rows * self._lanes

    def clips_at(self, positions: np.ndarray) -> np.ndarray:
        """int64: the clips at these positions, as rows of the index."""
        clips = np.empty(len(positions), np.int64)
        for at, played, places in self._played(positions):
            clips[at] = played.clips_at(places)
        return clips

    def shards_at(self, positions: np.ndarray) -> np.ndarray:
        """int32: the shards of those clips; quick for many positions, as no clips are shuffled."""
        shards = np.empty(len(positions), np.int32)
        for at, played, places in self._played(positions):
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

    def _played(self, positions: np.ndarray) -> Iterator[tuple[np.ndarray | slice, Pass, np.ndarray]]:
        """(which of the positions, the pass they are of, their positions within it)."""
        if self._shares is None:
            yield slice(None), self._pass(0, self._epoch), positions
            return
        part, number, place = self._places(positions)
        for at in _groups(number * len(self._sizes) + part):
            yield at, self._pass(int(part[at[0]]), int(number[at[0]])), place[at]


def rank_positions(*, step: int, batch_videos: int, rank: int, world: int) -> np.ndarray:
    """int64 [batch_videos]: the positions that `rank` takes in global batch `step` of an epoch."""
    return step * batch_videos * world + rank + world * np.arange(batch_videos, dtype=np.int64)


def _shuffled(n: int, seed: int, words: tuple[int, int, int]) -> np.ndarray:
    """int64 [n]: 0 … n - 1 in an order drawn for these words."""
    return np.argsort(raw_bits(n, seed=seed, stream=STREAM_ORDER, words=words), kind="stable")


def _groups(values: np.ndarray) -> list[np.ndarray]:
    """For each distinct value where it stands, int64 each."""
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
