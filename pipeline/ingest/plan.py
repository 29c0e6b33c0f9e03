"""Pure: listed sources and a seed → the order they are processed in and their tasks.

The order is a shuffle, so that every shard is a fair mix of the bucket and reading one end to end is close to
random. Tasks are runs of that order. Neither depends on the number of workers or machines.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from reelmae.pipeline.schema import SOURCES


def sources_per_task(n_sources: int, wanted: int | None) -> int:
    """How many sources a task holds: `wanted`, else a 64th of them, but 8 to 256."""
    return wanted or min(256, max(8, -(-n_sources // 64)))


def plan(sources: pa.Table, *, seed: int, per_task: int) -> pa.Table:
    """The sources (columns url, size, etag, label, sorted by url) in processing order, with their task (SOURCES)."""
    n = sources.num_rows
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(n)
    tasks = pa.array(np.arange(n, dtype=np.int32) // per_task, pa.int32())
    return sources.take(pa.array(order)).append_column("task", tasks).cast(SOURCES)


def label_ids(labels: set[str]) -> dict[str, int]:
    """label → id, ids in the order of the sorted names."""
    return {name: i for i, name in enumerate(sorted(labels))}
