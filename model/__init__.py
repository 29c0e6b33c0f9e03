"""Masked autoencoders for video: tensors in, tensors out. `weights` reads and writes checkpoints, others' too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reelmae.pipeline.lazy import export

if TYPE_CHECKING:
    from reelmae.model.classifier import Classifier, ClassifierConfig
    from reelmae.model.config import (
        MAEConfig,
        MotionConfig,
        ViTConfig,
        mae_config,
        motion_config,
        slowfast_config,
        videomae_config,
    )
    from reelmae.model.mae import MaskedAutoencoder
    from reelmae.model.weights import load_model

__all__ = [
    "Classifier",
    "ClassifierConfig",
    "MAEConfig",
    "MaskedAutoencoder",
    "MotionConfig",
    "ViTConfig",
    "load_model",
    "mae_config",
    "motion_config",
    "slowfast_config",
    "videomae_config",
]

__getattr__, __dir__ = export(
    __name__,
    {
        "classifier": (
            "Classifier",
            "ClassifierConfig",
        ),
        "config": (
            "MAEConfig",
            "MotionConfig",
            "ViTConfig",
            "mae_config",
            "motion_config",
            "slowfast_config",
            "videomae_config",
        ),
        "mae": ("MaskedAutoencoder",),
        "weights": ("load_model",),
    },
)
