"""`--dry-run`: what a job would do, and about how long it would take; nothing is written to DST.

The sources are listed and planned as in the job. A fair draw of SAMPLE of them is sharded to a temporary folder,
and its time and counts are scaled to all of them. The sample's time includes the start-up, so a long job is faster
than the estimate. Where few long videos are among many short ones, the estimate is rough.
"""

from __future__ import annotations

from collections import Counter
from pathlib import PurePosixPath
from typing import Any

import pyarrow.compute as pc

from reelmae.pipeline.errors import NothingKeptError
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.ffmpeg import find_ffmpeg
from reelmae.pipeline.ingest.job import shard
from reelmae.pipeline.ingest.plan import parts
from reelmae.pipeline.ingest.plan.deal import sources_per_task
from reelmae.pipeline.ingest.plan.sources import list_sources, source_url
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.scratch import scratch_folder
from reelmae.pipeline.storage.store import Store

SAMPLE = 16
KINDS = 8  # the most common file name extensions that are listed


def estimate(
    src: str,
    dst: str,
    config: ShardConfig | None = None,
    *,
    workers: int | None = None,
    append: bool = False,
    limit: int | None = None,
    src_access: Access | None = None,
    dst_access: Access | None = None,
) -> dict[str, Any]:
    """Counts of the listing and the plan; under "estimate", seconds, clips, bytes and rejects scaled from the sample.

    DST is read and not claimed. src_access, dst_access: how `src` and `dst` are reached. Raises the errors of `shard`, for the same reasons.
    """
    config = (config or ShardConfig()).resolve()
    url, store = source_url(src, src_access), Store(dst, dst_access)
    there = parts.read_plan(store)
    if there is not None:
        parts.refuse_mismatch(store, there, there.parts[0].src if append else url, config, find_ffmpeg())
    listing = list_sources(src, config, src_access)
    table, known = listing.table, 0 if there is None else there.sources
    if there is not None:
        for urls in parts.sources_of(store, there, ["url"]):
            seen = pc.is_in(table.column("url"), value_set=urls.column("url"))
            table = table.filter(pc.invert(seen))
    new = min(limit or table.num_rows, table.num_rows)
    kinds = Counter(PurePosixPath(url.as_py()).suffix.lower() or "none" for url in table.column("url"))
    sizes = table.filter(pc.greater_equal(table.column("size"), 0)).column("size")
    rows = pc.sum(pc.list_value_length(table.column("rows"))).as_py()
    return {
        "src": url,
        "dst": store.url(),
        "listed_sources": listing.table.num_rows,
        "sources_in_dst": known,
        "new_sources": new,
        "rows_of_manifest": rows or 0,
        "columns": listing.columns,
        "source_bytes": int(pc.sum(sizes).as_py() or 0) if len(sizes) == table.num_rows else None,
        "kinds": dict(kinds.most_common(KINDS)),
        "tasks": -(-new // sources_per_task(new, config.sources_per_task)) if new else 0,
        "estimate": _estimate_from_sample(src, src_access, config, new, workers) if new else {},
    }


def _estimate_from_sample(
    src: str, access: Access | None, config: ShardConfig, sources: int, workers: int | None
) -> dict[str, Any]:
    n = min(SAMPLE, sources)
    small = config.model_copy(update={"sources_per_task": 1})
    with scratch_folder() as folder:
        try:
            found = shard(src, f"{folder}/dst", small, workers=workers, limit=n, src_access=access)
        except NothingKeptError as e:
            return {"of_sources": n, "note": f"every source of the sample was rejected: {e}"}
    scale = sources / n
    return {
        "of_sources": n,
        "seconds": round(found.seconds * scale, 1),
        "clips": round(found.clips * scale),
        "clip_hours": round(found.clip_seconds * scale / 3600, 3),
        "bytes": round(found.bytes * scale),
        "rejected_sources": round((found.sources - found.sources_kept) * scale),
        "rejected_in_sample": found.rejected,
    }
