"""Pretraining: recipes, the loop, schedules, checkpoints, metrics; frozen features of a dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reelmae.pipeline.lazy import export

if TYPE_CHECKING:
    from reelmae.train.config import load_recipe
    from reelmae.train.pretraining import pretrain

__all__ = [
    "load_recipe",
    "pretrain",
]

__getattr__, __dir__ = export(
    __name__,
    {
        "config": ("load_recipe",),
        "pretraining": ("pretrain",),
    },
)
