"""`reelmae import-weights` and `reelmae export`: others' checkpoints to files of ours, and ours to others'.

Properties that hold:
- a result says what was placed, what was resized and what was left; anything else that does not fit is an error and
  nothing is written;
- a file under its final name is complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors import SafetensorError

from reelmae.model.weights import (
    WeightsError,
    build,
    config_of,
    ends_with_norm,
    load_into,
    load_model,
    read_checkpoint,
    save_as,
    save_safetensors,
)
from reelmae.pipeline.errors import ConfigError, InputError, StorageError
from reelmae.pipeline.storage import whole_file
from reelmae.tools.reconstruct import find_checkpoint

Format = Literal["safetensors", "timm", "mae_st", "slowfast", "videomae"]


def import_weights(
    src: str | Path,
    out: str | Path,
    *,
    allow: Sequence[str] = (),
    grid: tuple[int, int, int] | None = None,
    encoder_only: bool = False,
    **hints: Any,
) -> dict[str, Any]:
    """Write the checkpoint SRC, of any layout that is known, as OUT.safetensors with its config; returns what became of it.

    `allow`: patterns of SRC's keys that may be left. `grid`: (T', H', W') of a joint table of positions for another clip
    than `frames` and `size`. `hints`: fields of the config that shapes do not tell, or others than SRC's (None: not given).
    InputError where SRC cannot be read or anything of it has no place.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise ConfigError(f"{out}: give a name that ends in .safetensors")
    try:
        foreign = read_checkpoint(src)
        config = config_of(foreign, **{name: value for name, value in hints.items() if value is not None})
        model = build(config, norm=ends_with_norm(foreign))
        if grid is None and foreign.config is not None:
            grid = foreign.config.grid_THW
        report = load_into(model, foreign.state, foreign.layout, allow=allow, grid=grid)
    except WeightsError as e:
        raise InputError(str(e) if str(src) in str(e) else f"{src}: {e}") from e
    if report.missing:  # allowed by a pattern that meant the file: an initial value is nobody's weight
        raise InputError(f"{src}: holds no {', '.join(report.missing)}; give a whole checkpoint")
    _write(out, lambda part: save_safetensors(part, model, encoder_only=encoder_only))
    return {
        "out": str(out),
        "layout": foreign.layout,
        "model": type(model).__name__ if not encoder_only else "Encoder",
        "config": asdict(config),
        "placed": len(report.placed),
        "resized": {name: f"{list(old)} → {list(new)}" for name, (old, new) in report.resized.items()},
        "left": report.left,
    }


def export(
    checkpoint: str | Path, out: str | Path, *, format: Format = "safetensors", encoder_only: bool = False
) -> dict[str, Any]:
    """Write a model of ours (a checkpoint, a run's folder, a safetensors file) for others; returns what was written.

    `safetensors`: under our names with the config. Another `format` is the layout of that code, written as torch.save does
    under the key that it reads, or as safetensors where OUT ends so; `timm` is the encoder alone, or the classifier.
    ConfigError where the layout has no place for the model.
    """
    if format not in get_args(Format):
        raise ConfigError(f"format={format}: give one of {', '.join(get_args(Format))}")
    path, out = find_checkpoint(Path(checkpoint)), Path(out)
    if format == "safetensors" and out.suffix != ".safetensors":
        raise ConfigError(f"{out}: give a name that ends in .safetensors, or another --format")
    try:
        model = load_model(path)
    except WeightsError as e:
        raise InputError(str(e)) from e

    def save(part: Path) -> None:
        if format == "safetensors":
            save_safetensors(part, model, encoder_only=encoder_only)
        else:
            plain = out.suffix == ".safetensors"
            save_as(part, model, format, encoder_only=encoder_only, as_safetensors=plain)

    try:
        _write(out, save)
    except WeightsError as e:
        raise ConfigError(f"{path}: {e}") from e
    return {"checkpoint": str(path), "out": str(out), "format": format, "bytes": out.stat().st_size}


def _write(out: Path, save: Any) -> None:
    try:
        with whole_file(out) as part:
            save(part)
    except (RuntimeError, SafetensorError) as e:  # what torch and safetensors make of a failing write
        raise StorageError(f"{out}: could not be written ({e}); free some space and run again") from e
