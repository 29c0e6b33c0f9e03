"""Weights to begin a run from, in place of random ones.

Properties that hold: the file is one of reelmae's, so that its config says what no shape tells (heads, pixel statistics), and
that config must agree with the model. The report names what was loaded, resized and ignored. Nothing is dropped silently.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from reelmae.model.config import ViTConfig
from reelmae.model.weights import WeightsError, load_into, read_checkpoint

UNSEEN = ("heads", "pixel_mean", "pixel_std")  # of the encoder, in no tensor's shape
UNSEEN_IN_DECODER = ("decoder_heads", "decoder_cls")


def begin_from(model: nn.Module, path: str, allow: Sequence[str] = ()) -> str:
    """Put the weights of a file into `model`; returns a line that says what was loaded, resized and ignored.

    `allow`: patterns such as "decoder*" of names: file tensors to ignore, and model tensors to leave as initialised.
    WeightsError names what does not fit; the model is then as it was.
    """
    config = model.config
    assert isinstance(config, ViTConfig)
    try:
        checkpoint = read_checkpoint(path)
    except WeightsError as e:
        raise WeightsError(f"run.init={e}") from e
    if checkpoint.config is None:
        raise WeightsError(
            f"run.init={path}: is a checkpoint of another code ({checkpoint.layout}) and does not say its heads; "
            f"first make a file of ours from it: reelmae import-weights {path} OUT.safetensors"
        )
    with_decoder = any(n.startswith("decoder.") for n in checkpoint.state) and "decoder*" not in allow
    _check_agreement(path, checkpoint.config, config, UNSEEN + (UNSEEN_IN_DECODER if with_decoder else ()))
    try:
        report = load_into(model, checkpoint.state, checkpoint.layout, allow=allow, grid=checkpoint.config.grid_THW)
    except WeightsError as e:
        raise WeightsError(f"run.init={path}: {e}, in run.init_allow=[…]") from e
    notes = [f"began from {path}: {len(report.placed)} tensors placed"]
    if report.resized:
        resized = (f"{name} {list(old)} → {list(new)}" for name, (old, new) in report.resized.items())
        notes.append("resized: " + ", ".join(resized))
    if report.left:
        notes.append("left: " + ", ".join(report.left))
    if report.missing:
        notes.append("as initialised: " + ", ".join(report.missing))
    return "; ".join(notes)


def _check_agreement(path: str, theirs: ViTConfig, ours: ViTConfig, names: Sequence[str]) -> None:
    """WeightsError where the file's config and the model's differ in these fields, with the keys to give the run."""
    differ = [name for name in names if getattr(theirs, name) != getattr(ours, name)]
    if differ:
        facts = ", ".join(f"{n}={getattr(theirs, n)} (the model has {getattr(ours, n)})" for n in differ)
        keys = " ".join(f"model.{n}={_as_override(getattr(theirs, n))}" for n in differ)
        raise WeightsError(f"run.init={path}: is of a model with {facts}; give the run the same: {keys}")


def _as_override(value: Any) -> str:
    """The value as `section.key=value` takes it on the command line, without spaces."""
    return f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
