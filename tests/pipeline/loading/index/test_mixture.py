import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from reelmae.pipeline.errors import ConfigError
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.loading.index.mixture import mix
from reelmae.pipeline.loading.order import epochs
from reelmae.pipeline.loading.order.shares import Shares

LANES = 16
SIZES = ((5, 9, 7) * 20, (3, 40), (2, 2, 2, 2))  # clips of the shards of three datasets: 420, 43 and 8
WEIGHTS = (0.6, 0.3, 0.1)


def mixed(epoch: int, *, sizes: Sequence[Sequence[int]] = SIZES, weights: Sequence[float] = WEIGHTS, seed: int = 1):
    """(Epoch, dataset of each clip)"""
    ends = np.cumsum([len(s) for s in sizes])
    parts = [epochs.ShardRange(int(e) - len(s), int(e), w) for s, e, w in zip(sizes, ends, weights, strict=True)]
    start = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
    made = epochs.Epoch(start, parts, seed=seed, epoch=epoch, lanes=LANES)
    return made, np.repeat(np.arange(len(sizes)), [sum(s) for s in sizes])


def played(epochs: int, **of) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(clip, its pass, its dataset) of whole epochs, one after the other."""
    clips, passes = [], []
    for e in range(epochs):
        epoch, dataset = mixed(e, **of)
        clips.append(epoch.clips_at(np.arange(len(epoch))))
        passes.append(epoch.passes_at(np.arange(len(epoch))))
    return np.concatenate(clips), np.concatenate(passes), dataset[np.concatenate(clips)]


def test_in_each_of_its_passes_a_dataset_plays_every_clip_once() -> None:
    clips, passes, dataset = played(9)
    for d, size in enumerate(sum(s) for s in SIZES):
        numbers = np.unique(passes[dataset == d])
        assert numbers.tolist() == list(range(len(numbers)))
        whole = 0
        for number in numbers:
            of_pass = clips[(dataset == d) & (passes == number)]
            assert len(np.unique(of_pass)) == len(of_pass)
            whole += len(of_pass) == size
        assert whole >= len(numbers) - (LANES // size + 3)  # all but those that the end cuts


def test_passes_differ_in_order() -> None:
    clips, passes, dataset = played(9)
    first, second = (clips[(dataset == 1) & (passes == n)].tolist() for n in (0, 1))
    assert sorted(first) == sorted(second)
    assert first != second


@pytest.mark.parametrize("weights", [WEIGHTS, (3, 1, 1), (1, 1000, 50), (1 / 3, 1 / 3, 1 / 3)])
def test_shares_over_an_epoch_are_the_weights(weights: tuple[float, ...]) -> None:
    """To a few clips; over many epochs to fewer still, in proportion: nothing adds up."""
    for number in (1, 20):
        _, _, dataset = played(number, weights=weights)
        wanted = np.array(weights) / sum(weights) * len(dataset)
        assert np.abs(np.bincount(dataset, minlength=3) - wanted).max() <= LANES


def test_every_stretch_has_about_the_right_shares() -> None:
    _, _, dataset = played(6)
    for length in (LANES, 4 * LANES, 16 * LANES):
        for start in range(0, len(dataset) - length, 5 * LANES):
            found = np.bincount(dataset[start : start + length], minlength=3) / length
            assert np.abs(found - WEIGHTS).max() <= 0.06 + 4 / length**0.75


def test_each_lane_keeps_to_the_shares() -> None:
    shares, steps = Shares(WEIGHTS, seed=0, lanes=LANES), np.arange(5000)
    for lane in range(LANES):
        dataset, turn = shares.at(np.full(5000, lane), steps)
        for d, weight in enumerate(WEIGHTS):
            assert turn[dataset == d].tolist() == list(range((dataset == d).sum()))
            ahead = np.cumsum(dataset == d) - weight * (steps + 1)
            assert ahead.max() - ahead.min() <= 2 + weight * 3


def test_the_example_of_shares() -> None:
    assert Shares([3, 1], seed=0, lanes=1).at(np.zeros(7, int), np.arange(7))[0].tolist() == [
        0,
        0,
        1,
        0,
        0,
        0,
        1,
    ]


def test_a_lane_plays_the_marks_in_their_order() -> None:
    shares, weights = Shares(WEIGHTS, seed=0, lanes=LANES), np.array(WEIGHTS)
    for lane in (0, 7):
        dataset, turn = shares.at(np.full(5000, lane), np.arange(5000))
        phase = shares._phase_LD[lane]
        assert ((phase > 0) & (phase < 1)).all()
        marks = (turn + phase[dataset]) / weights[dataset]
        assert (np.diff(marks) >= 0).all()
        assert 4990 < marks[-1] < 5010


def test_lanes_take_turns_at_different_times() -> None:
    shares = Shares([0.9, 0.1], seed=0, lanes=64)
    datasets = np.stack([shares.at(np.arange(64), np.full(64, step))[0] for step in range(10, 60)])
    assert (np.abs(datasets.mean(axis=1) - 0.1) < 0.08).all()  # of 64: never 12 of them at once


def test_steps_far_on_are_found_without_those_before() -> None:
    shares, far = Shares(WEIGHTS, seed=0, lanes=LANES), 10**10
    lane = np.arange(LANES)
    (a, turn_a), (b, turn_b) = (shares.at(lane, np.full(LANES, far + k)) for k in (0, 1))
    assert (np.abs(turn_a / (far * np.array(WEIGHTS)[a]) - 1) < 1e-6).all()
    assert (turn_b[a == b] == turn_a[a == b] + 1).all()


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_together_play_the_same_global_batches_for_every_world(world: int) -> None:
    for e in (0, 3):
        alone, _ = mixed(e)
        for step in range(len(alone) // 48):
            whole = alone.clips_at(epochs.rank_positions(step=step, batch_videos=48, rank=0, world=1))
            for rank in range(world):
                own = epochs.rank_positions(step=step, batch_videos=48 // world, rank=rank, world=world)
                assert mixed(e)[0].clips_at(own).tolist() == whole[rank::world].tolist()


def test_a_shard_is_read_by_one_lane_but_for_borders() -> None:
    clips, passes, dataset = played(9)
    lane = np.arange(len(clips)) % LANES
    shard = np.repeat(np.arange(sum(map(len, SIZES))), np.concatenate(SIZES))[clips]
    for d, number in product(range(3), range(int(passes.max()))):
        at = (dataset == d) & (passes == number)
        assert len(set(zip(shard[at].tolist(), lane[at].tolist(), strict=True))) <= len(SIZES[d]) + LANES - 1


def test_shards_are_those_of_the_clips_here_too() -> None:
    epoch, _ = mixed(2)
    positions = np.arange(len(epoch))[::3]
    shard_of_clip = np.repeat(np.arange(sum(map(len, SIZES))), np.concatenate(SIZES))
    assert epoch.shards_at(positions).tolist() == shard_of_clip[epoch.clips_at(positions)].tolist()


def test_a_clip_never_has_the_same_draws_twice() -> None:
    clips, passes, _ = played(9)  # draws are keyed by these two
    assert len(set(zip(clips.tolist(), passes.tolist(), strict=True))) == len(clips)


def test_a_dataset_smaller_than_the_lanes_is_played_over_and_over() -> None:
    clips, passes, dataset = played(1, sizes=((64,), (1,)), weights=(1, 1))
    assert (dataset == 1).sum() > 25
    assert passes[dataset == 1].max() >= 25
    assert set(clips[dataset == 1]) == {64}


# ---- joining indices


@pytest.fixture
def two(index_of_rows: Callable[..., str]) -> tuple[ClipIndex, ClipIndex]:
    first = index_of_rows(
        [{"label": "ab"[i % 2], "label_id": i % 2, "frames": 100 + i} for i in range(10)],
        labels={"a": 0, "b": 1},
    )
    second = index_of_rows(
        [{"source": f"other{i}", "label": "ca"[i % 2], "label_id": [1, 0][i % 2], "codec": "vp9"} for i in range(6)]
        + [{"source": "unlabelled", "codec": "vp9"}],
        labels={"a": 0, "c": 1},
    )
    return ClipIndex.open(first), ClipIndex.open(second)


def test_a_mixture_holds_both_row_by_row(two: tuple[ClipIndex, ClipIndex]) -> None:
    a, b = two
    both = mix([(a, None), (b, None)])
    assert len(both) == 17
    for name in ("offset", "size", "frames", "fps", "width", "height", "check"):
        assert getattr(both, name).tolist() == [*getattr(a, name), *getattr(b, name)], name
    assert [both.key(i) for i in range(17)] == [a.key(i) for i in range(10)] + [b.key(i) for i in range(7)]
    assert [both.shard(i) for i in (0, 9, 10, 16)] == [a.shard(0), a.shard(9), b.shard(0), b.shard(6)]
    assert [both.dataset(i) for i in range(17)] == [0] * 10 + [1] * 7
    assert [store.url() for store in both.stores] == [a.store.url(), b.store.url()]
    assert [both.codec_names[c] for c in both.codec_of_clip] == ["h264"] * 10 + ["vp9"] * 7
    assert both.shard_bytes.tolist() == [*a.shard_bytes, *b.shard_bytes]
    assert both.dataset_of_shard.tolist() == [0, 0, 0, 1, 1]


def test_labels_are_united_by_name(two: tuple[ClipIndex, ClipIndex]) -> None:
    both = mix([(two[0], None), (two[1], None)])
    assert both.labels == {"a": 0, "b": 1, "c": 2}
    assert both.label_id.tolist() == [0, 1] * 5 + [2, 0] * 3 + [-1]


def test_without_weights_every_clip_is_played_once(two: tuple[ClipIndex, ClipIndex]) -> None:
    both = mix([(two[0], None), (two[1], None)])
    epoch = epochs.Epoch(both.shard_start, both.parts, seed=0, epoch=0, lanes=4)
    assert sorted(epoch.clips_at(np.arange(len(epoch)))) == list(range(17))


def test_with_weights_shares_are_those(two: tuple[ClipIndex, ClipIndex]) -> None:
    both = mix([(two[0], 1), (two[1], 3)])
    dataset = []
    for e in range(20):
        epoch = epochs.Epoch(both.shard_start, both.parts, seed=0, epoch=e, lanes=4)
        dataset += [both.dataset(int(clip)) for clip in epoch.clips_at(np.arange(len(epoch)))]
    assert abs(np.mean(dataset) - 0.75) < 0.02


def test_the_digest_names_datasets_order_and_weights(two: tuple[ClipIndex, ClipIndex]) -> None:
    a, b = two
    mixtures: list[list[tuple[ClipIndex, float | None]]] = [
        [(a, None), (b, None)],
        [(b, None), (a, None)],
        [(a, 1), (b, 1)],
        [(a, 1), (b, 2)],
        [(a, None), (replace(b, digest="0"), None)],
    ]
    digests = [mix(datasets).digest for datasets in mixtures]
    assert len(set(digests)) == 5
    assert mix([(a, 2), (b, 4)]).digest == digests[3]
    assert mix([(a, 1)]).digest == a.digest
    json.dumps(digests)


def test_weights_for_some_only_are_refused(two: tuple[ClipIndex, ClipIndex]) -> None:
    with pytest.raises(ConfigError, match=r"rows1 has no weight, others have"):
        mix([(two[0], 1.0), (two[1], None)])


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(two: tuple[ClipIndex, ClipIndex], weight: float) -> None:
    with pytest.raises(ConfigError, match=rf"weight={weight} of .*rows1"):
        mix([(two[0], 1.0), (two[1], weight)])


def test_nothing_to_mix_is_refused() -> None:
    with pytest.raises(ConfigError, match="no dataset"):
        mix([])
