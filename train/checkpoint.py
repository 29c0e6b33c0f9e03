"""Checkpoints of a run: OUT/checkpoints/step_000500.pt. The model alone is read by reelmae.model.load_model.

Properties that hold:
- A file under its final name is complete: it is written under another name, synced, and renamed.
- Everything in it loads with `weights_only=True`: tensors, numbers, text, lists and dicts.
- The last `KEEP` stay; older ones are removed after a newer one is in place.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from reelmae.model.weights.runs import FORMAT, checkpoints
from reelmae.pipeline.errors import InputError, StorageFullError
from reelmae.pipeline.storage.store import whole_file

KEEP = 2


def save(out: Path, step: int, content: dict[str, Any]) -> Path:
    """Write the checkpoint of `step` and remove those older than the last `KEEP`."""
    final = out / "checkpoints" / f"step_{step:06d}.pt"
    try:
        with whole_file(final) as part, part.open("wb") as f:
            torch.save({"format": FORMAT, "step": step, **content}, f)
    except (OSError, RuntimeError) as e:  # torch's writer turns a failed write into a RuntimeError
        raise StorageFullError(
            f"{final}: could not be written ({e}); free some space and run again (it resumes)"
        ) from e
    for old in checkpoints(out)[:-KEEP]:
        old.unlink()
    return final


def load(path: str | Path, device: torch.device | str = "cpu", *, mmap: bool = False) -> dict[str, Any]:
    """What `save` wrote; InputError where the file is missing or something else. `mmap`: tensors are read when used."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; give OUT/checkpoints/step_000500.pt or another of a run")
    if not zipfile.is_zipfile(path):  # torch.load's errors on other files say little
        raise InputError(f"{path}: is not a checkpoint of reelmae")
    try:
        content = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as e:
        raise InputError(
            f"{path}: is not a checkpoint of reelmae ({(str(e) or type(e).__name__).splitlines()[0]})"
        ) from e
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(
            f"{path}: is not a checkpoint of reelmae of format {FORMAT}; reelmae import-weights reads other checkpoints"
        )
    return content
