"""`reelmae bench loaders DATA …`: reelmae's loader against two that a user would write (see baselines), in one run.

All loaders play the same clips with the same draws, on one thread of this process. They take turns batch by batch. A
round is one epoch or several whole ones, and the next round has other draws. The first round is not counted: it pays for
imports, caches and memory that is touched for the first time. Compared are samples per processor second, since other
work on the machine changes them less than samples per second. Datasets after the first must hold the same clips, stored
in another way, so that a loader on one can be compared with a loader on another. A figure is the median of the rounds; a
ratio is the ratio of two medians.

A dataset of more than `--videos` clips is played in part. Each loader then plays equally many clips, but not the same.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import torch

from reelmae.pipeline.errors import InputError, ReelmaeError
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.loading.loader import ClipLoader
from reelmae.pipeline.storage.access import Access
from reelmae.tools.bench import baselines
from reelmae.tools.bench.baselines import Batch, Wanted
from reelmae.tools.bench.config import BenchLoadersConfig
from reelmae.tools.bench.load import loader_config
from reelmae.tools.machine import machine, versions

OURS = "reelmae"
Pair = tuple[str, str]  # dataset, loader
Round = dict[Pair, "_Count"]


def bench_loaders(config: BenchLoadersConfig, access: Access | None = None) -> dict[str, Any]:
    """Measure; raises InputError if the datasets do not hold the same clips."""
    indexes = {data: ClipIndex.open(data, access=access) for data in config.data}
    _check_same(indexes)
    torchcodec, reason = baselines.has_torchcodec()
    names = [OURS, *(n for n in baselines.LOADERS if torchcodec or n != "webdataset_torchcodec")]
    batch, batches = _sizes(len(indexes[config.data[0]]), config)
    pairs = [(data, name) for data in indexes for name in names]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with contextlib.ExitStack() as stack:
            players = _players(indexes, pairs, Wanted(config.repeats, config.sample, batch), stack)
            _, *rounds = [_round(players, batches) for _ in range(1 + config.rounds)]
    finally:
        torch.set_num_threads(threads)
    if config.videos >= len(indexes[config.data[0]]):
        _check_played(rounds)
    rows = [_row(data, name, [played[data, name] for played in rounds]) for data, name in pairs]
    return {
        "rows": rows,
        "ratios": _ratios(rows, "webdataset_torchcodec" if torchcodec else "webdataset_pyav"),
        "torchcodec": reason,
        "batch_videos": batch,
        "config": config.model_dump(mode="json"),
        "machine": machine(),
        "versions": versions() | baselines.versions(),
    }


def _sizes(clips: int, config: BenchLoadersConfig) -> tuple[int, int]:
    """Videos of a batch, and batches of a round. If epochs are played whole, every batch is full."""
    if clips > config.videos:
        batch = min(config.batch_videos, config.videos)
        return batch, config.videos // batch
    batch = max(n for n in range(1, config.batch_videos + 1) if clips % n == 0)
    return batch, config.videos // clips * clips // batch


def _check_same(indexes: dict[str, ClipIndex]) -> None:
    first, *others = indexes
    keys = _keys(indexes[first])
    for other in others:
        if different := keys ^ _keys(indexes[other]):
            raise InputError(
                f"{other}: does not hold the same clips as {first} ({min(different)} and {len(different) - 1} more are in "
                "one only); shard both from the same sources with the same cuts, or measure each on its own"
            )


def _keys(index: ClipIndex) -> set[str]:
    return {index.key(clip) for clip in range(len(index))}


def _check_played(rounds: list[Round]) -> None:
    """Only the same work can be compared."""
    for played in rounds:
        if len({tuple(sorted(player.keys)) for player in played.values()}) > 1:
            raise ReelmaeError("the loaders did not play the same clips: one is damaged; run reelmae verify")


def _ours(index: ClipIndex, wanted: Wanted) -> Generator[Batch]:
    """reelmae's loader in this process, counted as the baselines count."""
    config = loader_config(
        backend="av",
        device="cpu",
        workers=0,
        batch_videos=wanted.batch_videos,
        repeats=wanted.repeats,
        sample=wanted.sample,
        seed=wanted.seed,
    )
    with ClipLoader(index, config) as loader:
        decoded = 0
        for batch in loader:
            frames, decoded = loader.stats.frames_decoded - decoded, loader.stats.frames_decoded
            yield Batch([index.key(int(c)) for c in batch.clip_B[:: wanted.repeats]], batch.clips_BCTHW, frames)


@dataclass
class _Count:
    """What a loader has done in a round."""

    keys: list[str] = field(default_factory=list)
    clips: int = 0
    frames_used: int = 0
    frames_decoded: int | None = 0
    """None: the loader does not count them."""
    cpu_seconds: float = 0.0
    seconds: float = 0.0


def _players(
    indexes: dict[str, ClipIndex], pairs: list[Pair], wanted: Wanted, stack: contextlib.ExitStack
) -> dict[Pair, Generator[Batch]]:
    """A loader for each pair; `stack` closes them."""
    players = {}
    for data, name in pairs:
        make = _ours if name == OURS else baselines.LOADERS[name]
        players[data, name] = make(indexes[data], wanted)
        stack.callback(players[data, name].close)
    return players


def _round(players: dict[Pair, Generator[Batch]], batches: int) -> Round:
    """Batch by batch in turn, so that other work on the machine disturbs all loaders alike."""
    played = {pair: _Count() for pair in players}
    for _ in range(batches):
        for pair, player in players.items():
            _play(player, played[pair])
    return played


def _play(player: Generator[Batch], count: _Count) -> None:
    """One batch."""
    cpu, began = time.process_time(), time.perf_counter()
    batch = next(player)
    count.cpu_seconds += time.process_time() - cpu
    count.seconds += time.perf_counter() - began
    count.keys += batch.keys
    count.clips += len(batch.clips_BCTHW)
    count.frames_used += len(batch.clips_BCTHW) * batch.clips_BCTHW.shape[2]
    if count.frames_decoded is not None:
        frames = batch.frames_decoded
        count.frames_decoded = None if frames is None else count.frames_decoded + frames


def _row(data: str, name: str, played: list[_Count]) -> dict[str, Any]:
    per_cpu_s = [p.clips / p.cpu_seconds for p in played]
    decoded = [p.frames_decoded for p in played if p.frames_decoded is not None]
    return {
        "data": data,
        "loader": name,
        "clips_per_cpu_s": statistics.median(per_cpu_s),
        "clips_per_s": statistics.median(p.clips / p.seconds for p in played),
        "decoded_per_used": sum(decoded) / sum(p.frames_used for p in played) if decoded else None,
        "clips_in_a_round": played[0].clips,
        "clips_per_cpu_s_of_rounds": per_cpu_s,
    }


def _ratios(rows: list[dict[str, Any]], seeking: str) -> list[dict[str, Any]]:
    """For each dataset: our rate over those of (a) and (b) on it, and over those of (a) and (b) on the first dataset."""
    rate = {(row["data"], row["loader"]): row["clips_per_cpu_s"] for row in rows}
    first = rows[0]["data"]
    return [
        {
            "data": data,
            "to_mae_st": rate[data, OURS] / rate[data, "mae_st"],
            f"to_{seeking}": rate[data, OURS] / rate[data, seeking],
            "to_mae_st_on_first": rate[data, OURS] / rate[first, "mae_st"],
            f"to_{seeking}_on_first": rate[data, OURS] / rate[first, seeking],
        }
        for data, name in rate
        if name == OURS
    ]
