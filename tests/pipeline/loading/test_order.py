from collections.abc import Callable

import numpy as np
import pytest

from reelmae.pipeline.errors import ConfigError
from reelmae.pipeline.loading import order


def shards(*sizes: int) -> np.ndarray:
    return np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)


MANY = shards(*(5 + i % 7 for i in range(120)))
FEW = shards(40, 3, 57)


@pytest.mark.parametrize("shard_of_clip", [MANY, FEW, shards(5), shards(1)])
def test_every_clip_is_in_exactly_one_lane(shard_of_clip: np.ndarray, epoch_lanes: Callable) -> None:
    lanes = epoch_lanes(shard_of_clip, seed=3, epoch=5, lanes=16)
    assert sorted(np.concatenate(lanes)) == list(range(len(shard_of_clip)))


@pytest.mark.parametrize("shard_of_clip", [MANY, FEW, shards(5)])
def test_lanes_are_balanced_to_within_one_clip(shard_of_clip: np.ndarray, epoch_lanes: Callable) -> None:
    sizes = [len(lane) for lane in epoch_lanes(shard_of_clip, seed=0, epoch=0, lanes=16)]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("global_batch", [8, 24, 64, 72])
@pytest.mark.parametrize("shard_of_clip", [MANY, FEW])
def test_an_epoch_holds_each_clip_once_and_drops_only_the_last_batch(
    shard_of_clip: np.ndarray, global_batch: int, global_batches: Callable
) -> None:
    batches = global_batches(shard_of_clip, seed=1, epoch=0, global_batch=global_batch, lanes=16)
    assert batches.shape == (len(shard_of_clip) // global_batch, global_batch)
    assert len(np.unique(batches)) == batches.size


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("shard_of_clip", [MANY, FEW])
def test_ranks_together_play_the_same_global_batches_for_every_world(
    shard_of_clip: np.ndarray, world: int, global_batches: Callable
) -> None:
    expected = global_batches(shard_of_clip, seed=1, epoch=2, global_batch=24, lanes=16)
    sequence = order.epoch_sequence(shard_of_clip, seed=1, epoch=2)
    for step, batch in enumerate(expected):
        parts = [
            order.rank_batch(sequence, step=step, batch_videos=24 // world, lanes=16, rank=r, world=world)
            for r in range(world)
        ]
        assert np.stack(parts, axis=1).reshape(-1).tolist() == batch.tolist()


@pytest.mark.parametrize("world", [2, 4, 8])
def test_a_rank_plays_its_own_lanes_and_no_others(world: int, epoch_lanes: Callable) -> None:
    lanes = epoch_lanes(MANY, seed=1, epoch=2, lanes=16)
    sequence = order.epoch_sequence(MANY, seed=1, epoch=2)
    for rank in range(world):
        own = set(np.concatenate(lanes[rank::world]).tolist())
        for step in range(len(MANY) // 24):
            played = order.rank_batch(
                sequence, step=step, batch_videos=24 // world, lanes=16, rank=rank, world=world
            )
            assert set(played.tolist()) <= own


def test_shards_are_split_no_more_than_the_lane_borders_force(epoch_lanes: Callable) -> None:
    lanes = epoch_lanes(MANY, seed=1, epoch=0, lanes=16)
    assert sum(len(np.unique(MANY[lane])) for lane in lanes) <= 120 + 16 - 1


def test_order_depends_on_seed_and_epoch_and_nothing_else() -> None:
    first = order.epoch_sequence(MANY, seed=1, epoch=0)
    assert (first == order.epoch_sequence(MANY.copy(), seed=1, epoch=0)).all()
    assert (first != order.epoch_sequence(MANY, seed=1, epoch=1)).any()
    assert (first != order.epoch_sequence(MANY, seed=2, epoch=0)).any()


def test_clips_of_a_shard_are_shuffled_too() -> None:
    inside = [order.epoch_sequence(shards(50), seed=0, epoch=e).tolist() for e in range(3)]
    assert all(s != sorted(s) for s in inside)
    assert inside[0] != inside[1] != inside[2]


def test_the_worked_example_of_the_docstring() -> None:
    sequence = np.arange(7)  # a … g
    assert order.clips_at(sequence, np.arange(7), lanes=2).tolist() == [0, 4, 1, 5, 2, 6, 3]


def test_an_order_of_a_million_clips_is_quick_enough_to_be_made_each_epoch() -> None:
    sequence = order.epoch_sequence(np.repeat(np.arange(4000, dtype=np.int32), 250), seed=0, epoch=0)
    assert len(np.unique(sequence)) == 1_000_000


def test_fewer_clips_than_a_global_batch_names_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"7 clips.*global batch of 16.*at most 3"):
        order.check_sizes(n_clips=7, batch_videos=8, lanes=64, rank=0, world=2)


def test_a_world_that_does_not_divide_the_lanes_is_refused_with_a_number_that_works() -> None:
    with pytest.raises(ConfigError, match=r"lanes=64.*6 ranks.*like 66"):
        order.check_sizes(n_clips=700, batch_videos=8, lanes=64, rank=0, world=6)
