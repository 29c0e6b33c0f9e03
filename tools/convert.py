"""`reelmae import-weights` and `reelmae export`: checkpoints of other codes to files of ours, and ours to theirs.

Properties that hold:
- A result names the tensors that were placed, that were resized, and that were left out. Tensors that differ only in the
  number of their block are one line: `blocks.0-11.norm1.weight`.
- Whatever else does not fit is an error, and nothing is written.
- A file under its final name is complete.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors import SafetensorError

from reelmae.model.config import ViTConfig
from reelmae.model.weights import WeightsError, find_checkpoint, load, read_checkpoint, save_as, save_safetensors
from reelmae.model.weights.pixels import pixel_statistics
from reelmae.pipeline.errors import ConfigError, InputError, StorageError
from reelmae.pipeline.storage.store import whole_file

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
    """Write the checkpoint SRC, in any layout that we know, as OUT.safetensors with its config; returns what became of it.

    `allow`: patterns of tensors in SRC to ignore. `grid`: tokens along time, height and width of SRC's joint table of
    positions, if they are not those of `frames` and `size`. `encoder_only`: ignore SRC's decoder or head. `hints`: fields of
    the config that shapes do not tell, or that shall differ from SRC's; None means not given.
    Raises InputError if SRC cannot be read, or if a tensor in it has no place.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise ConfigError(f"{out}: give a name that ends in .safetensors")
    foreign = read_checkpoint(src)
    given = {name: value for name, value in hints.items() if value is not None}
    model, report = load(foreign, allow=allow, grid=grid, encoder_only=encoder_only, **given)
    config = model.config
    assert isinstance(config, ViTConfig)
    if report.missing:  # a pattern of `allow` matched tensors of the model too; their initial values are no weights
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
    """Names that differ only in a number, as one: `blocks.0-2,5.norm1.weight`."""
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
    """Write a model of ours for others; returns what was written, with `pixel_mean` and `pixel_std`: whoever uses the file
    normalises pixels in 0 … 1 by them.

    `checkpoint`: a run's folder, a checkpoint file, or our own safetensors file. `format`: safetensors keeps our names and the
    config. The others are the layout of that code, written by torch.save under the key that the code reads, or as
    safetensors if OUT's name ends so. timm holds an encoder or a classifier.
    Raises ConfigError if the layout has no place for the model, and InputError for a checkpoint of another code: it does not
    say its heads and clip, so `import_weights` must make one of ours of it first.
    """
    if format not in get_args(Format):
        raise ConfigError(f"format={format}: give one of {', '.join(get_args(Format))}")
    path, out = find_checkpoint(checkpoint), Path(out)
    if format == "safetensors" and out.suffix != ".safetensors":
        raise ConfigError(f"{out}: give a name that ends in .safetensors, or another --format")
    found = read_checkpoint(path)
    config = found.config
    if config is None:
        raise InputError(
            f"{path}: holds no config of ours (its layout is {found.layout!r}); import it first: "
            f"reelmae import-weights {path} OUT.safetensors"
        )
    model, _ = load(found)

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
    mean, std = (config.pixel_mean, config.pixel_std) if ours else pixel_statistics(format)
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
    except (RuntimeError, SafetensorError) as e:  # a failed write, as torch and safetensors report it
        raise StorageError(f"{out}: could not be written ({e}); free some space and run again") from e
