"""Commit records of jobs that never ran, with the columns and sizes of a finished job's.

Of 20 sources one is rejected, and each other gave one clip. Of 100 clips one has the bytes of an earlier clip, and three
look like one; which they are follows from their numbers, so what a join must count is known. Hashes of different
clips differ as those of different videos do: in about half of their bits, but for the bit of a picture's mean, which is
always 1.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from reelmae.pipeline.schema import (
    BLOCK,
    BLOCK_CHECK,
    BLOCKS_FROM,
    CLIP,
    COMMITS,
    FORMAT,
    REJECT,
    Reason,
    clip_key,
    commit_name,
    shard_name,
)
from reelmae.pipeline.storage.scratch import scratch_folder
from reelmae.pipeline.storage.store import Store
from reelmae.tools.bench.index import constant, text_array

REJECTED = 20  # of so many sources the last one
_REPEATED, _COPIED = 25, 100  # of so many clips the last one looks like an earlier one, and has the bytes of one
_FLIPS = 8  # bits at most in which the hashes of two that look alike differ
_NO_ROWS = pa.table({f.name: pa.nulls(0, f.type) for f in COMMITS}, schema=COMMITS)


def expected_counts(sources: int) -> dict[str, int]:
    """What a join of the commits of these sources, numbered from 0, must count; near repeats are marked."""
    clips = sources - sources // REJECTED
    return {
        "sources": sources,
        "sources_kept": clips,
        "clips": clips,
        "duplicates": clips // _REPEATED,
        "rejected": sources - clips,
    }


def make_commit(task: int, first: int, urls: Sequence[str]) -> pa.Table:
    """The commit record of a task. Its sources have the numbers `first`, `first` + 1 and so on among those of the job."""
    number = np.arange(first, first + len(urls))
    is_reject = number % REJECTED == REJECTED - 1
    shard = shard_name(task, 0, FORMAT)
    kept, rejected = ([urls[int(i)] for i in np.flatnonzero(which)] for which in (~is_reject, is_reject))
    clips = _clip_rows((number - number // REJECTED)[~is_reject], kept, shard) if kept else _NO_ROWS
    table = pa.concat_tables([clips, _reject_rows(rejected)])
    return table.replace_schema_metadata({"shards": json.dumps({shard: 1 << 28})})


def write_commit(store: Store, task: int, first: int, urls: Sequence[str]) -> None:
    """Write `make_commit` to the dataset, whole or not at all."""
    with scratch_folder() as folder:
        path = folder / "commit.parquet"
        pq.write_table(make_commit(task, first, urls), path)
        store.publish(path, commit_name(task, FORMAT))


def _reject_rows(urls: list[str]) -> pa.Table:
    n = len(urls)
    own = {
        "kind": pa.repeat(REJECT, n),
        "source": pa.array(urls, pa.string()),
        "reason": pa.repeat(Reason.TRUNCATED.value, n),
        "detail": pa.repeat("17 of 300 frames decoded", n),
    }
    return _rows(own, n)


def _rows(own: dict[str, pa.Array], n: int) -> pa.Table:
    return pa.Table.from_arrays(
        [own[f.name] if f.name in own else pa.nulls(n, f.type) for f in COMMITS], schema=COMMITS
    )


def _clip_rows(clip_N: np.ndarray, urls: list[str], shard: str) -> pa.Table:
    """Rows of the clips with these numbers, at least one."""
    n = len(clip_N)
    rng = np.random.default_rng(int(clip_N[0]))
    size_N = rng.integers(200_000, 1_200_000, n)
    origin_N = _origin(clip_N)
    digest_N4 = _words(np.where(clip_N % _COPIED == _COPIED - 1, origin_N, clip_N), 0)
    blocks = [rng.bytes(-(-size // BLOCK) * BLOCK_CHECK) if size >= BLOCKS_FROM else None for size in size_N.tolist()]
    own = {
        "kind": pa.repeat(CLIP, n),
        "key": pa.array([clip_key(url, 0) for url in urls]),
        "shard": pa.repeat(shard, n),
        "offset": pa.array(np.cumsum(size_N + 2048) - size_N),
        "size": pa.array(size_N),
        "sha256": text_array(np.frombuffer(digest_N4.tobytes().hex().encode(), np.uint8).reshape(n, 64)),
        "source": pa.array(urls),
        "span_end_s": pa.array(rng.random(n) * 20),
        "frames": pa.array(rng.integers(120, 301, n), pa.int32()),
        "fps": pa.array(rng.choice([24.0, 25.0, 30.0], n)),
        "motion": pa.array(rng.random(n) * 40, pa.float32()),
        "luma": pa.array(rng.random(n) * 255, pa.float32()),
        "contrast": pa.array(rng.random(n) * 90, pa.float32()),
        "phash": pa.array([row.tobytes() for row in _hashes(clip_N, origin_N)], pa.binary(32)),
        "blocks": pa.array(blocks, pa.binary()),
        "source_seconds": pa.array(rng.random(n) * 600),
    }
    nothing = ("reason", "detail", "label", "duplicate_of")
    same = {f.name: constant(f.type, n) for f in COMMITS if f.name not in own and f.name not in nothing}
    return _rows(same | own, n)


def _origin(clip_N: np.ndarray) -> np.ndarray:
    """The clip itself; of one that repeats, the earlier clip, which repeats none."""
    earlier_N = (_mix(clip_N) >> np.uint64(1)).astype(np.int64) % np.maximum(clip_N, 1)
    return np.where(clip_N % _REPEATED == _REPEATED - 1, earlier_N - earlier_N % _REPEATED, clip_N)


def _hashes(clip_N: np.ndarray, origin_N: np.ndarray) -> np.ndarray:
    """Perceptual hashes: uint8 [N, 32]."""
    words_N4, row_N = _words(origin_N, 1), np.arange(len(clip_N))
    for flip in range(_FLIPS):
        place_N = _mix(clip_N * _FLIPS + flip)
        bit_N = np.where(origin_N == clip_N, np.uint64(0), np.uint64(1) << (place_N % np.uint64(64)))
        words_N4[row_N, (place_N >> np.uint64(62)).astype(np.int64)] ^= bit_N
    words_N4 |= np.uint64(1 << 63)
    return words_N4.astype(">u8").view(np.uint8).reshape(-1, 32)


def _words(clip_N: np.ndarray, kind: int) -> np.ndarray:
    """Four random words of each clip: uint64 [N, 4]."""
    return _mix(clip_N[:, None] * 8 + 4 * kind + np.arange(4))


def _mix(value_N: np.ndarray) -> np.ndarray:
    """A random uint64 of each whole number, the same whenever it is asked for (splitmix64)."""
    mixed_N = (value_N.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed_N = (mixed_N ^ (mixed_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed_N = (mixed_N ^ (mixed_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed_N ^ (mixed_N >> np.uint64(31))
