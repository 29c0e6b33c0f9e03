"""`reelmae bench index`: time and memory from start to the first batch's order and draws, with ten million clips.

The index is generated: random hashes, the columns, row groups and compression of a finished job, every hundredth clip a
duplicate of another. A new process opens it, so that time and peak memory are those of one rank that starts: import torch
and the loader, open the index, order the first batch, draw its samples.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from reelmae.pipeline.errors import ReelmaeError
from reelmae.pipeline.schema import CLIPS, DATASET_JSON, FORMAT, INDEX, LABELS, shard_name
from reelmae.tools.bench.config import BenchIndexConfig
from reelmae.tools.bench.processes import memory_bytes
from reelmae.tools.machine import machine, versions

_ROWS = 50_000  # of a row group, as a job writes them
_OF_SHARD, _OF_SOURCE, _LABELS, _REPEATS = 500, 4, 400, 100
_BATCH, _REPEATED = 64, 4


def bench_index(config: BenchIndexConfig) -> dict[str, Any]:
    """Measure in `rounds` new processes; the file is in the page cache for all. Raises ReelmaeError if one fails."""
    rounds = []
    with tempfile.TemporaryDirectory(prefix="reelmae-") as folder:
        write_index(Path(folder), config.clips)
        index_bytes = Path(folder, INDEX).stat().st_size
        for _ in range(config.rounds):
            argv = [sys.executable, "-m", "reelmae.tools.bench.index", folder]
            child = subprocess.run(argv, capture_output=True, text=True, check=False)
            if child.returncode:
                raise ReelmaeError(f"opening {config.clips} clips failed: {child.stderr.strip()[-2000:]}")
            rounds.append(json.loads(child.stdout))
    return {
        **config.model_dump(),
        "index_bytes": index_bytes,
        "measured": sorted(rounds, key=lambda found: found["seconds"]["total"])[len(rounds) // 2],  # median
        "seconds_of_rounds": [found["seconds"]["total"] for found in rounds],
        "machine": machine(),
        "versions": versions(),
    }


def write_index(folder: Path, clips: int) -> None:
    """A dataset without shards at `folder`: index, labels, dataset.json."""
    rng = np.random.default_rng(0)
    with pq.ParquetWriter(folder / INDEX, CLIPS) as writer:
        for first in range(0, clips, _ROWS):
            writer.write_table(_rows(rng, np.arange(first, min(first + _ROWS, clips))))
    (folder / LABELS).write_text(json.dumps({_label(i): i for i in range(_LABELS)}))
    (folder / DATASET_JSON).write_text(json.dumps({"format": FORMAT, "clips": clips}))


def _label(i: int) -> str:
    return f"some_label_{i:03d}"


def _rows(rng: np.random.Generator, clip: np.ndarray) -> pa.Table:
    """Rows of these clips. The first of them begins a source and a shard."""
    n = len(clip)
    sizes = rng.integers(200_000, 900_000, n)
    ends = np.cumsum(sizes + 2048)
    shard = clip // _OF_SHARD
    sources = np.frombuffer(rng.bytes(8 * n).hex().encode(), np.uint8).reshape(n, 16)[np.arange(n) // _OF_SOURCE]
    ordinals = np.frombuffer(b"".join(b"_%04d" % i for i in range(_OF_SOURCE)), np.uint8).reshape(-1, 5)
    keys = text_array(np.hstack([sources, ordinals[clip % _OF_SOURCE]]))
    label = rng.integers(0, _LABELS, n)
    names = [shard_name(int(s), 0, FORMAT) for s in range(int(shard[0]), int(shard[-1]) + 1)]
    own = {
        "key": keys,
        "shard": pa.array(names).take(pa.array(shard - shard[0])),
        "offset": pa.array(ends - sizes - (ends - sizes - 2048)[(shard - shard[0]) * _OF_SHARD]),
        "size": pa.array(sizes),
        "sha256": text_array(np.frombuffer(rng.bytes(32 * n).hex().encode(), np.uint8).reshape(n, 64)),
        "source": text_array(np.hstack([_tile("s3://bucket/raw/", n), sources, _tile(".mp4", n)])),
        "frames": pa.array(rng.integers(120, 301, n), pa.int32()),
        "fps": pa.array(rng.choice([24.0, 25.0, 30.0], n)),
        "width": pa.array(rng.choice([256, 320, 448], n), pa.int32()),
        "height": pa.array(rng.choice([256, 320, 448], n), pa.int32()),
        "label": pa.array([_label(i) for i in range(_LABELS)]).take(pa.array(label)),
        "label_id": pa.array(label, pa.int32()),
        "motion": pa.array(rng.random(n) * 40, pa.float32()),
        "duplicate_of": pa.array(keys.to_numpy(zero_copy_only=False), mask=clip % _REPEATS != _REPEATS - 1),
    }
    columns = [own[f.name] if f.name in own else constant(f.type, n) for f in CLIPS]
    return pa.Table.from_arrays(columns, schema=CLIPS)


def constant(kind: pa.DataType, n: int) -> pa.Array:
    """A column of one value, for what opening does not look at."""
    if pa.types.is_string(kind):
        return pa.repeat(pa.scalar("h264"), n)
    if pa.types.is_fixed_size_binary(kind) or pa.types.is_binary(kind):
        return pa.nulls(n, kind)
    return pa.array(np.ones(n), kind)


def _tile(text: str, n: int) -> np.ndarray:
    return np.tile(np.frombuffer(text.encode(), np.uint8), (n, 1))


def text_array(letters: np.ndarray) -> pa.Array:
    """Strings of equal length from uint8 [n, length]."""
    n, width = letters.shape
    ends = pa.py_buffer(np.arange(0, (n + 1) * width, width, dtype=np.int32))
    return pa.StringArray.from_buffers(n, ends, pa.py_buffer(np.ascontiguousarray(letters)))


def measure(folder: str) -> dict[str, Any]:
    """Start as a rank does, in this process: seconds, processor seconds and peak memory of each stage."""
    seconds: dict[str, float] = {}
    cpu_seconds: dict[str, float] = {}
    peaks: dict[str, int] = {}
    at = [time.perf_counter(), time.process_time()]

    def lap(stage: str) -> None:
        now = [time.perf_counter(), time.process_time()]
        seconds[stage], cpu_seconds[stage] = now[0] - at[0], now[1] - at[1]
        peaks[stage] = memory_bytes("VmHWM")
        at[:] = now

    import reelmae.pipeline.loading.loader  # noqa: F401  as a rank does
    from reelmae.pipeline.loading.config import LoaderConfig
    from reelmae.pipeline.loading.index.clips import ClipIndex
    from reelmae.pipeline.loading.order import epochs
    from reelmae.pipeline.loading.order.draws import draw

    lap("import")
    index = ClipIndex.open(folder)
    lap("open")
    config = LoaderConfig(batch_videos=_BATCH, repeats=_REPEATED)
    epoch = epochs.Epoch(index.shard_start, index.parts, seed=config.seed, epoch=0, lanes=config.lanes)
    positions = epochs.rank_positions(step=0, batch_videos=_BATCH, rank=0, world=1)
    for clip in epoch.clips_at(positions).tolist():
        for repeat in range(_REPEATED):
            draw(
                config.sample,
                seed=config.seed,
                epoch=0,
                clip=clip,
                repeat=repeat,
                **index.facts(clip),
            )
    lap("first_batch")
    return {
        "clips_played": len(index),
        "shards": len(index.shard_names),
        "seconds": seconds | {"total": sum(seconds.values())},
        "cpu_seconds": cpu_seconds,
        "peak_rss_bytes": peaks,
    }


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
