"""`reelmae import-weights` and `reelmae export`: others' checkpoints to files of ours, and ours to others'.

Properties that hold:
- a result says what was placed, what was resized and what was left, by name; tensors that differ in the number of their
  block only are one line (`blocks.0-11.norm1.weight`); anything else that does not fit is an error and nothing is written;
- a file under its final name is complete.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors import SafetensorError

from reelmae.model.config import ViTConfig
from reelmae.model.weights import (
    WeightsError,
    fed,
    load,
    read_checkpoint,
    save_as,
    save_safetensors,
)
from reelmae.pipeline.errors import ConfigError, InputError, StorageError
from reelmae.pipeline.storage.store import whole_file
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
    than `frames` and `size`. `encoder_only`: SRC's decoder or head is left unread. `hints`: fields of the config that shapes do
    not tell, or others than SRC's (None: not given).
    InputError where SRC cannot be read or anything of it has no place.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise ConfigError(f"{out}: give a name that ends in .safetensors")
    try:
        foreign = read_checkpoint(src)
        given = {name: value for name, value in hints.items() if value is not None}
        model, report = load(foreign, allow=allow, grid=grid, encoder_only=encoder_only, **given)
        config = model.config
        assert isinstance(config, ViTConfig)
    except WeightsError as e:
        raise InputError(str(e)) from e
    if report.missing:  # allowed by a pattern that meant the file: an initial value is nobody's weight
        raise InputError(f"{src}: holds no {', '.join(report.missing)}; give a whole checkpoint")
    _write(out, lambda part: save_safetensors(part, model))
    return {
        "out": str(out),
        "layout": foreign.layout,
        "model": type(model).__name__,
        "config": asdict(config),
        "placed": _ranges(report.placed),
        "resized": {name: f"{list(old)} → {list(new)}" for name, (old, new) in report.resized.items()},
        "left": _ranges(report.left),
    }


def _ranges(names: Sequence[str]) -> list[str]:
    """Names that are alike but for a number as one: `blocks.0-2,5.norm1.weight`."""
    numbers: dict[tuple[str, str], list[int]] = {}
    for name in names:
        match = re.fullmatch(r"(.*\.)(0|[1-9]\d*)(\..*)", name)
        key = (match[1], match[3]) if match else (name, "")
        numbers.setdefault(key, []).extend([int(match[2])] if match else [])
    return [head + _runs(sorted(found)) + tail for (head, tail), found in numbers.items()]


def _runs(numbers: list[int]) -> str:
    """0, 1, 2, 5 → 0-2,5."""
    firsts = [n for n in numbers if n - 1 not in numbers]
    lasts = [n for n in numbers if n + 1 not in numbers]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(firsts, lasts, strict=True))


def export(
    checkpoint: str | Path, out: str | Path, *, format: Format = "safetensors", encoder_only: bool = False
) -> dict[str, Any]:
    """Write a model of ours (a checkpoint, a run's folder, a safetensors file) for others; returns what was written, and how
    it is to be fed: `pixel_mean` and `pixel_std`, by which pixels in 0 … 1 are normalised.

    `safetensors`: under our names with the config. Another `format` is the layout of that code, written as torch.save does
    under the key that it reads, or as safetensors where OUT ends so; `timm` is the encoder alone, or the classifier.
    ConfigError where the layout has no place for the model. InputError on a checkpoint of another code: it does not say its
    heads and clip, `import_weights` makes one of ours of it.
    """
    if format not in get_args(Format):
        raise ConfigError(f"format={format}: give one of {', '.join(get_args(Format))}")
    path, out = find_checkpoint(Path(checkpoint)), Path(out)
    if format == "safetensors" and out.suffix != ".safetensors":
        raise ConfigError(f"{out}: give a name that ends in .safetensors, or another --format")
    try:
        foreign = read_checkpoint(path)
        if foreign.config is None:
            raise InputError(
                f"{path}: holds no config of ours (its layout is {foreign.layout!r}); make a file of it that does "
                f"first: reelmae import-weights {path} OUT.safetensors"
            )
        config = foreign.config
        model, _ = load(foreign)
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
    ours = format == "safetensors"
    mean, std = (config.pixel_mean, config.pixel_std) if ours else fed(format)
    return {
        "checkpoint": str(path),
        "out": str(out),
        "format": format,
        "bytes": out.stat().st_size,
        "pixel_mean": list(mean),
        "pixel_std": list(std),
    }


def _write(out: Path, save: Any) -> None:
    try:
        with whole_file(out) as part:
            save(part)
    except (RuntimeError, SafetensorError) as e:  # what torch and safetensors make of a failing write
        raise StorageError(f"{out}: could not be written ({e}); free some space and run again") from e
