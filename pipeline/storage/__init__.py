"""Where files lie: a local folder or any fsspec URL, read, listed and published whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reelmae.pipeline.lazy import export

if TYPE_CHECKING:
    from reelmae.pipeline.storage.access import Access, parse_options
    from reelmae.pipeline.storage.store import Store

__all__ = [
    "Access",
    "Store",
    "parse_options",
]

__getattr__, __dir__ = export(
    __name__,
    {
        "access": ("Access", "parse_options"),
        "store": ("Store",),
    },
)
