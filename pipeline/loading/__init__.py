"""Shards → batches on the device: which clips, in which order, how they are fetched, decoded and masked.

index = ClipIndex.open(url)
with ClipLoader(index, LoaderConfig()) as loader:
    for batch in loader:
        ..."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reelmae.pipeline.lazy import export

if TYPE_CHECKING:
    from reelmae.pipeline.loading.batch import ClipBatch
    from reelmae.pipeline.loading.config import LoaderConfig
    from reelmae.pipeline.loading.index.clips import ClipIndex
    from reelmae.pipeline.loading.index.mixture import mix
    from reelmae.pipeline.loading.index.selection import Selection
    from reelmae.pipeline.loading.loader import ClipLoader
    from reelmae.pipeline.loading.order.draws import SamplePolicy
    from reelmae.pipeline.loading.order.masks import DecoderMaskPolicy, MaskPolicy
    from reelmae.pipeline.loading.sweep import ClipSweep

__all__ = [
    "ClipBatch",
    "ClipIndex",
    "ClipLoader",
    "ClipSweep",
    "DecoderMaskPolicy",
    "LoaderConfig",
    "MaskPolicy",
    "SamplePolicy",
    "Selection",
    "mix",
]

__getattr__, __dir__ = export(
    __name__,
    {
        "batch": ("ClipBatch",),
        "index.clips": ("ClipIndex",),
        "loader": ("ClipLoader",),
        "sweep": ("ClipSweep",),
        "order.masks": (
            "DecoderMaskPolicy",
            "MaskPolicy",
        ),
        "config": ("LoaderConfig",),
        "order.draws": ("SamplePolicy",),
        "index.selection": ("Selection",),
        "index.mixture": ("mix",),
    },
)
