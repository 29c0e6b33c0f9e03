"""Where a run of `reelmae pretrain` keeps its checkpoints: OUT/checkpoints/step_000500.pt."""

from __future__ import annotations

import re
from pathlib import Path

from reelmae.pipeline.errors import WeightsError

FORMAT = 2
"""Version of what a checkpoint holds, under its key `format`. Others are refused."""

_NAME = re.compile(r"^step_(\d+)\.pt$")


def checkpoints(run: str | Path) -> list[Path]:
    """The checkpoints in a run's folder, oldest first. Empty where there is none."""
    found = [
        (int(m[1]), path) for path in (Path(run) / "checkpoints").glob("step_*.pt") if (m := _NAME.match(path.name))
    ]
    return [path for _, path in sorted(found)]


def find_checkpoint(path: str | Path) -> Path:
    """The file itself, or the newest checkpoint of a run's folder. WeightsError where there is neither."""
    path = Path(path)
    if path.is_dir():
        found = checkpoints(path)
        if not found:
            raise WeightsError(f"{path}: holds no checkpoints/step_*.pt; give a checkpoint or the folder of a run")
        return found[-1]
    if not path.is_file():
        raise WeightsError(f"{path}: no such file or folder; give a checkpoint or the folder of a run")
    return path
