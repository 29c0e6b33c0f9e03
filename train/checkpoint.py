"""Checkpoints of a run: OUT/checkpoints/step_000500.pt.

Properties that hold:
- A file under its final name is complete: it is written beside it, synced, and renamed.
- Everything in it loads with `weights_only=True`: tensors, numbers, text, lists and dicts.
- The last `KEEP` stay; older ones are removed after a newer one is in place.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from reelmae.model.mae import MaskedAutoencoder
from reelmae.pipeline.errors import InputError, StorageFullError
from reelmae.pipeline.storage.store import whole_file
from reelmae.train.config import PretrainConfig, from_json

FORMAT = 2
KEEP = 2
_NAME = re.compile(r"^step_(\d+)\.pt$")


def checkpoints(out: Path) -> list[Path]:
    """Checkpoints of the run at `out`, oldest first."""
    found = [(int(m.group(1)), p) for p in (out / "checkpoints").glob("step_*.pt") if (m := _NAME.match(p.name))]
    return [path for _, path in sorted(found)]


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


def load(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What `save` wrote; InputError where the file is missing or something else."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; give OUT/checkpoints/step_000500.pt or another of a run")
    if not zipfile.is_zipfile(path):  # what torch makes of other files is anybody's guess
        raise InputError(f"{path}: is no checkpoint of reelmae")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as e:
        raise InputError(f"{path}: is no checkpoint of reelmae ({(str(e) or type(e).__name__).splitlines()[0]})") from e
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(
            f"{path}: is no checkpoint of reelmae of format {FORMAT}; another's is read by reelmae import-weights"
        )
    return content


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[MaskedAutoencoder, PretrainConfig]:
    """The model of a checkpoint, in eval mode, and the config of its run."""
    content = load(path, device)
    config = from_json(content["config"])
    model = MaskedAutoencoder(config.model.mae()).to(device)
    model.load_state_dict(content["model"])
    return model.eval(), config
