"""Weights of others, and ours for others: layouts, files, and the way into a model.

read_checkpoint ─ Foreign ─ load (config_of ─ build ─ load_into) ─ model, ImportReport        load_model: all of it
model ─ save_as (refed ─ from_ours) | save_safetensors
"""

from reelmae.model.weights.files import (
    Foreign,
    build,
    config_from_json,
    config_of,
    config_to_json,
    ends_with_norm,
    load,
    load_model,
    load_safetensors,
    read_checkpoint,
    save_as,
    save_safetensors,
)
from reelmae.model.weights.infer import infer_config
from reelmae.model.weights.layouts import LAYOUTS, WeightsError, detect, encoder_part, from_ours, to_ours
from reelmae.model.weights.pixels import fed, refed
from reelmae.model.weights.place import ImportReport, finetuning_allows, load_into

__all__ = [
    "LAYOUTS",
    "Foreign",
    "ImportReport",
    "WeightsError",
    "build",
    "config_from_json",
    "config_of",
    "config_to_json",
    "detect",
    "encoder_part",
    "ends_with_norm",
    "fed",
    "finetuning_allows",
    "from_ours",
    "infer_config",
    "load",
    "load_into",
    "load_model",
    "load_safetensors",
    "read_checkpoint",
    "refed",
    "save_as",
    "save_safetensors",
    "to_ours",
]
