"""Weights in files: of our runs and exports, and of other codes.

load_model        from any of them to a model
save_safetensors  to a file of ours
save_as           to a file in another code's layout
"""

from reelmae.model.weights.files import Checkpoint, read_checkpoint, save_as, save_safetensors
from reelmae.model.weights.models import load, load_model
from reelmae.model.weights.place import ImportReport, finetuning_patterns, load_into
from reelmae.model.weights.runs import find_checkpoint
from reelmae.pipeline.errors import WeightsError

__all__ = [
    "Checkpoint",
    "ImportReport",
    "WeightsError",
    "find_checkpoint",
    "finetuning_patterns",
    "load",
    "load_into",
    "load_model",
    "read_checkpoint",
    "save_as",
    "save_safetensors",
]
