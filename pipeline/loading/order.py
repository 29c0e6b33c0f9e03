"""Pure: which clips make up which global batch.

The epoch's shards are shuffled, the clips within each shard too, and the resulting sequence is cut into
`lanes` runs of equal length (to within one clip); with fewer shards than lanes a run is part of a shard.
Lane `l` is played by rank `l % world`. Position `p` of the epoch is the clip `p // lanes` of lane
`p % lanes`, and global batch `s` is the positions `s * G .. (s + 1) * G - 1`.

Properties that hold:
- every clip has exactly one position in an epoch; the last `clips % G` positions, which fill no global
  batch, are dropped (another epoch drops others);
- rank `r` of `W` holds the positions `p % W == r` of every global batch: the same number on each rank;
- the global batches, in order, are the same for every `W` that divides `lanes` and `G`;
- a shard is cut by at most the lane borders in it: shards read are at most `shards + lanes - 1`, all ranks together;
- a batch mixes clips of `lanes` places in the epoch.

Example, 7 clips, 2 lanes, G = 2:  lane 0 = a b c d, lane 1 = e f g
    positions  a e b f c g d    batches  (a e) (b f) (c g)   dropped  d
"""

from __future__ import annotations

import numpy as np

from reelmae.pipeline.errors import ConfigError
from reelmae.pipeline.loading.philox import STREAM_ORDER, raw_bits


def epoch_sequence(shard_of_clip: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """int64 [N]: the clips of an epoch, shard after shard, shards and clips within them shuffled."""
    n = len(shard_of_clip)
    n_shards = int(shard_of_clip.max()) + 1 if n else 0
    shuffled = np.argsort(raw_bits(n, seed=seed, stream=STREAM_ORDER, words=(epoch, 0, 0)), kind="stable")
    shards = np.argsort(
        raw_bits(n_shards, seed=seed, stream=STREAM_ORDER, words=(epoch, 1, 0)), kind="stable"
    )
    # uint16 where it fits: numpy sorts it by radix, ten times faster
    place = np.empty(n_shards, dtype=np.uint16 if n_shards < 1 << 16 else np.int64)
    place[shards] = np.arange(n_shards)
    return shuffled[np.argsort(place[shard_of_clip[shuffled]], kind="stable")]


def lane_starts(n_clips: int, lanes: int) -> np.ndarray:
    """int64 [lanes + 1]: where each lane starts in the epoch's sequence; lanes differ by at most one clip."""
    base, extra = divmod(n_clips, lanes)
    lane = np.arange(lanes + 1, dtype=np.int64)
    return lane * base + np.minimum(lane, extra)


def clips_at(sequence: np.ndarray, positions: np.ndarray, lanes: int) -> np.ndarray:
    """int64: the clips at these positions (0 … N - 1) of an epoch whose sequence is given."""
    return sequence[lane_starts(len(sequence), lanes)[positions % lanes] + positions // lanes]


def rank_batch(
    sequence: np.ndarray, *, step: int, batch_videos: int, lanes: int = 64, rank: int = 0, world: int = 1
) -> np.ndarray:
    """int64 [batch_videos]: the clips that `rank` takes in global batch `step` of the epoch."""
    positions = step * batch_videos * world + rank + world * np.arange(batch_videos, dtype=np.int64)
    return clips_at(sequence, positions, lanes)


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
