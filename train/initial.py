"""Weights to begin a run from, in place of random ones.

Properties that hold: the file is one of reelmae's, so that it says what no shape does (heads, how pixels are normalised), and
what it says must agree with the model; what is placed, resized and left is told; nothing is dropped silently.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from reelmae.model.config import ViTConfig
from reelmae.model.weights import WeightsError, load_into, read_checkpoint
from reelmae.pipeline.errors import InputError

UNSEEN = ("heads", "pixel_mean", "pixel_std")  # of the encoder, in no tensor's shape
UNSEEN_IN_DECODER = ("decoder_heads", "decoder_cls")


def begin_from(model: nn.Module, path: str, allow: Sequence[str] = ()) -> str:
    """Put the weights of a file into `model`; returns what became of them in a line or more.

    `allow`: patterns of tensors of the file that may be left, and of the model that may stay as they are. InputError names
    what does not fit; the model is then as it was.
    """
    config = model.config
    assert isinstance(config, ViTConfig)
    try:
        foreign = read_checkpoint(path)
        if foreign.config is None:
            raise InputError(
                f"run.init={path}: is of another code ({foreign.layout}) and does not say its heads; "
                f"make a file of it first: reelmae import-weights {path} OUT.safetensors"
            )
        with_decoder = any(n.startswith("decoder.") for n in foreign.state) and "decoder*" not in allow
        names = UNSEEN + (UNSEEN_IN_DECODER if with_decoder else ())
        differ = [
            f"{n}={getattr(foreign.config, n)} (the model has {getattr(config, n)})"
            for n in names
            if getattr(foreign.config, n) != getattr(config, n)
        ]
        if differ:
            raise InputError(f"run.init={path}: is of a model with {', '.join(differ)}; give the model the same")
        report = load_into(model, foreign.state, foreign.layout, allow=allow, grid=foreign.config.grid_THW)
    except WeightsError as e:
        raise InputError(f"run.init={path}: {e}, in run.init_allow=[…]") from e
    told = [f"began from {path}: {len(report.placed)} tensors placed"]
    if report.resized:
        resized = (f"{name} {list(old)} → {list(new)}" for name, (old, new) in report.resized.items())
        told.append("resized: " + ", ".join(resized))
    if report.left:
        told.append("left: " + ", ".join(report.left))
    if report.missing:
        told.append("as initialised: " + ", ".join(report.missing))
    return "; ".join(told)
