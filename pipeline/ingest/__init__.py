"""Raw buckets → shards: `shard(src, dst, ShardConfig())`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reelmae.pipeline.lazy import export

if TYPE_CHECKING:
    from reelmae.pipeline.ingest.config import ShardConfig
    from reelmae.pipeline.ingest.job import shard

__all__ = [
    "ShardConfig",
    "shard",
]

__getattr__, __dir__ = export(
    __name__,
    {
        "config": ("ShardConfig",),
        "job": ("shard",),
    },
)
