from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from reelmae.pipeline.errors import ConfigError
from reelmae.pipeline.loading.order import epochs


def shards(*sizes: int) -> np.ndarray:
    return np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)


MANY = shards(*(5 + i % 7 for i in range(120)))
FEW = shards(40, 3, 57)
EVERY = [MANY, FEW, shards(5), shards(1)]


def lanes_of(epoch: epochs.Epoch, lanes: int) -> list[np.ndarray]:
    return [epoch.clips_at(np.arange(lane, len(epoch), lanes)) for lane in range(lanes)]


def rank_batches(epoch: epochs.Epoch, global_batch: int, rank: int, world: int) -> np.ndarray:
    """int64 [steps, G / W]"""
    ranks = [
        epochs.rank_positions(step=step, batch_videos=global_batch // world, rank=rank, world=world)
        for step in range(len(epoch) // global_batch)
    ]
    return np.stack([epoch.clips_at(positions) for positions in ranks])


@pytest.mark.parametrize("shard_of_clip", EVERY)
def test_every_clip_has_one_position(shard_of_clip: np.ndarray, epoch_of: Callable) -> None:
    epoch = epoch_of(shard_of_clip, seed=3, epoch=5, lanes=16)
    assert len(epoch) == len(shard_of_clip)
    assert sorted(epoch.clips_at(np.arange(len(epoch)))) == list(range(len(shard_of_clip)))


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("shard_of_clip", [MANY, FEW])
def test_an_epoch_plays_each_clip_once_and_drops_only_the_last_batch(
    shard_of_clip: np.ndarray, world: int, epoch_of: Callable
) -> None:
    epoch = epoch_of(shard_of_clip, seed=1, epoch=4, lanes=16)
    played = np.concatenate([rank_batches(epoch, 24, rank, world).reshape(-1) for rank in range(world)])
    assert len(np.unique(played)) == len(played) == len(shard_of_clip) // 24 * 24


@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("shard_of_clip", [MANY, FEW])
def test_ranks_together_play_the_same_global_batches_for_every_world(
    shard_of_clip: np.ndarray, world: int, epoch_of: Callable
) -> None:
    alone = rank_batches(epoch_of(shard_of_clip, seed=1, epoch=2, lanes=16), 24, 0, 1)
    parts = [rank_batches(epoch_of(shard_of_clip, seed=1, epoch=2, lanes=16), 24, r, world) for r in range(world)]
    assert np.stack(parts, axis=2).reshape(alone.shape).tolist() == alone.tolist()


@pytest.mark.parametrize("world", [2, 4, 8])
def test_a_rank_plays_its_own_lanes_and_no_others(world: int, epoch_of: Callable) -> None:
    epoch = epoch_of(MANY, seed=1, epoch=2, lanes=16)
    lanes = lanes_of(epoch, 16)
    for rank in range(world):
        own = set(np.concatenate(lanes[rank::world]).tolist())
        assert set(rank_batches(epoch, 24, rank, world).reshape(-1).tolist()) <= own


@pytest.mark.parametrize("shard_of_clip", EVERY)
def test_lanes_are_balanced_to_within_one_clip(shard_of_clip: np.ndarray) -> None:
    sizes = np.diff(epochs.lane_starts(len(shard_of_clip), 16))
    assert sizes.sum() == len(shard_of_clip)
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("shard_of_clip", [MANY, FEW, shards(500)])
def test_shards_are_split_no_more_than_the_lane_borders_force(shard_of_clip: np.ndarray, epoch_of: Callable) -> None:
    lanes = lanes_of(epoch_of(shard_of_clip, seed=1, lanes=16), 16)
    assert sum(len(np.unique(shard_of_clip[lane])) for lane in lanes) <= len(np.unique(shard_of_clip)) + 15


def test_a_lane_plays_a_shard_in_one_go(epoch_of: Callable) -> None:
    for lane in lanes_of(epoch_of(MANY, lanes=16), 16):
        changes = sum(a != b for a, b in pairwise(MANY[lane].tolist()))
        assert changes == len(np.unique(MANY[lane])) - 1


@pytest.mark.parametrize("shard_of_clip", EVERY)
def test_the_shards_are_those_of_the_clips(shard_of_clip: np.ndarray, epoch_of: Callable) -> None:
    epoch = epoch_of(shard_of_clip, seed=2, epoch=1, lanes=16)
    positions = np.arange(len(epoch))[::-1]
    assert epoch.shards_at(positions).tolist() == shard_of_clip[epoch.clips_at(positions)].tolist()


def test_clips_are_the_same_whatever_was_asked_for_before(epoch_of: Callable) -> None:
    whole = epoch_of(MANY, seed=1, lanes=16).clips_at(np.arange(len(MANY)))
    other = epoch_of(MANY, seed=1, lanes=16)
    for position in np.random.default_rng(0).permutation(len(MANY))[:200]:
        assert other.clips_at(np.array([position])) == whole[position]


def test_order_depends_on_seed_and_epoch_and_nothing_else(epoch_of: Callable) -> None:
    def sequence(**of: int) -> list[int]:
        return epoch_of(MANY, **of).clips_at(np.arange(len(MANY))).tolist()

    assert sequence(seed=1, epoch=0) == sequence(seed=1, epoch=0)
    assert sequence(seed=1, epoch=0) != sequence(seed=1, epoch=1)
    assert sequence(seed=1, epoch=0) != sequence(seed=2, epoch=0)
    assert epoch_of(MANY, epoch=3).passes_at(np.arange(5)).tolist() == [3] * 5


def test_shards_and_clips_within_them_are_shuffled_anew_each_epoch(epoch_of: Callable) -> None:
    epochs = [epoch_of(MANY, epoch=e, lanes=1).clips_at(np.arange(len(MANY))) for e in range(3)]
    in_order_of_use = [list(dict.fromkeys(MANY[clips].tolist())) for clips in epochs]
    assert all(s != sorted(s) for s in in_order_of_use)
    assert in_order_of_use[0] != in_order_of_use[1] != in_order_of_use[2]
    inside = [clips[MANY[clips] == 6].tolist() for clips in epochs]  # 11 clips
    assert all(s != sorted(s) for s in inside)
    assert inside[0] != inside[1] != inside[2]


def test_two_shards_of_a_size_are_shuffled_differently(epoch_of: Callable) -> None:
    clips = epoch_of(shards(50, 50), lanes=1).clips_at(np.arange(100))
    assert clips[clips < 50].tolist() != (clips[clips >= 50] - 50).tolist()


def test_the_worked_example_of_the_docstring() -> None:
    starts, positions = epochs.lane_starts(7, 2), np.arange(7)
    assert (starts[positions % 2] + positions // 2).tolist() == [0, 4, 1, 5, 2, 6, 3]  # a e b f c g d


def test_fewer_clips_than_a_global_batch_names_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"7 clips.*global batch of 16.*at most 3"):
        epochs.check_sizes(n_clips=7, batch_videos=8, lanes=64, rank=0, world=2)


def test_a_world_that_does_not_divide_the_lanes_is_refused_with_a_number_that_works() -> None:
    with pytest.raises(ConfigError, match=r"lanes=64.*6 ranks.*like 66"):
        epochs.check_sizes(n_clips=700, batch_videos=8, lanes=64, rank=0, world=6)
