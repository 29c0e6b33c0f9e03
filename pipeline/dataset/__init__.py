"""A finished shard dataset: verify it, repair it, say what is in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reelmae.pipeline.lazy import export

if TYPE_CHECKING:
    from reelmae.pipeline.dataset.contents import facts
    from reelmae.pipeline.dataset.repairs import repair
    from reelmae.pipeline.dataset.verification import verify

__all__ = [
    "facts",
    "repair",
    "verify",
]

__getattr__, __dir__ = export(
    __name__,
    {
        "contents": ("facts",),
        "repairs": ("repair",),
        "verification": ("verify",),
    },
)
