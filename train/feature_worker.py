"""Clips through an encoder: batches of an index's rows on this machine, blocks of rows on the workers of a runner.

    FeatureEncoder   index ── ClipSweep ── encoder(views) ── mean of the tokens, or class token      batch by batch
    FeatureWorker    the same for one block of rows, which is a task; made from a FeatureSpec alone, on any machine

A batch holds the same views whoever encodes it, so features do not depend on where they were made, as long as the
machines are of one kind. A worker opens the index and the checkpoint once, and says so where they are not those of
the machine that sent it.

Legend: V clip, R view of it, B batch of views, C channel, T frame, H height, W width, D width of the encoder.
"""

from __future__ import annotations

import copy
import hashlib
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from reelmae.model.classifier import Classifier
from reelmae.model.config import ViTConfig
from reelmae.model.mae import MaskedAutoencoder
from reelmae.model.weights import load_model
from reelmae.model.weights.models import Model
from reelmae.pipeline.devices import resolve_device
from reelmae.pipeline.errors import ConfigError, DatasetError, InputError, ReelmaeError, StorageError
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.loading.index.selection import Selection
from reelmae.pipeline.loading.order.draws import SamplePolicy
from reelmae.pipeline.loading.sweep import ClipSweep
from reelmae.pipeline.runners.runner import Watch
from reelmae.pipeline.storage import scratch
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.store import Store
from reelmae.train.precision import Precision, autocast_dtype

Pool = Literal["mean", "cls"]
LIBRARIES = ("reelmae", "torch", "av")  # whose versions decide about numbers
PATIENCE_S = 20.0  # of a node with a store that does not answer


@dataclass(frozen=True)
class FeatureSpec:
    """All that a FeatureWorker is made from. It names nothing of the machine it was made on but shared places."""

    checkpoint: str
    """Path of the weights."""
    sha256: str
    """Of the weights, in hex."""
    data: str
    """URL of the dataset."""
    where: str | None
    index: str
    """Digest of the index with these clips selected."""
    sample: SamplePolicy
    views: int
    pool: Pool
    batch: int
    """Views that go through the encoder at a time."""
    workers: int | None
    """Processes that decode."""
    device: str
    precision: Precision
    blocks: tuple[range, ...] = ()
    """Task → its rows of the index."""
    access: Access = field(default_factory=Access)
    """How the dataset is reached."""

    @property
    def batch_videos(self) -> int:
        """Clips that are decoded, and then encoded, together."""
        return max(1, self.batch // self.views)


@dataclass(frozen=True, eq=False)
class EncodedBatch:
    """The features of some clips with all their views."""

    clip_V: np.ndarray
    """int64, rows of the index."""
    features_BD: np.ndarray
    """float32, the views of a clip one after the other."""
    stop: int
    """All rows of the index before this one have come, or are bad."""


@dataclass(frozen=True, eq=False)
class FeatureBlock:
    """The features of one task's rows."""

    task: int
    clip_V: np.ndarray
    """int64, rows of the index that have features."""
    features_BD: np.ndarray
    """float32, the views of a clip one after the other."""
    bad: dict[str, str]
    """key → reason of the others."""
    retries: Mapping[str, int]
    """cause → requests to the store that were tried again."""


class FeatureEncoder:
    """Encodes the clips of an index with a model that is on its device. Close it, or use it as a context manager."""

    def __init__(self, model: Model, index: ClipIndex, spec: FeatureSpec) -> None:
        self.index = index
        self._model, self._spec = model, spec
        self._autocast = autocast_dtype(spec.precision, next(model.parameters()).device)
        self._sweep = ClipSweep(
            index, spec.sample, views=spec.views, batch_videos=spec.batch_videos, workers=spec.workers
        )

    def __enter__(self) -> FeatureEncoder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop decoding."""
        self._sweep.close()

    def encode(self, rows: range) -> Iterator[EncodedBatch]:
        """The features of these rows of the index, which begin at a multiple of `batch_videos`. Take all of them."""
        for batch in self._sweep.batches(rows):
            pixels_BCTHW = batch.pixels_VRCTHW.reshape(-1, *batch.pixels_VRCTHW.shape[2:])
            yield EncodedBatch(batch.clip_V, self._encode(pixels_BCTHW), batch.stop)

    def bad(self, rows: range) -> dict[str, str]:
        """key → reason of those of these rows that could not be decoded."""
        found = self._sweep.bad
        keys = (self.index.key(row) for row in rows) if found else ()
        return {key: found[key] for key in keys if key in found}

    @torch.no_grad()
    def _encode(self, pixels_BCTHW: np.ndarray) -> np.ndarray:
        """float32 [B, D] of uint8 pixels, `batch` views at a time."""
        device = next(self._model.parameters()).device
        found = []
        for some in torch.from_numpy(pixels_BCTHW).split(self._spec.batch):
            clips_BCTHW = normalise(some.to(device), self._model.config)  # bytes travel, not floats
            with torch.autocast(device.type, dtype=self._autocast, enabled=self._autocast is not None):
                found.append(pool_tokens(self._model, clips_BCTHW, self._spec.pool).float().cpu())
        return torch.cat(found).numpy()


class FeatureWorker:
    """Encodes blocks of rows, one after the other. Use as a context, in one thread; only `stop` may be called from others."""

    def __init__(self, spec: FeatureSpec) -> None:
        self._spec = spec
        self._stopping = threading.Event()
        self._access = copy.copy(spec.access)  # this worker's own count of retries, and its own waiting
        path = Path(spec.checkpoint)
        here = f"on {socket.gethostname()}"
        if not path.is_file():
            raise InputError(f"{path}: not found {here}; put the checkpoint where all nodes see it at the same path")
        if file_digest(path) != spec.sha256:
            raise InputError(f"{path}: holds other weights {here}; give the same file at that path on all nodes")
        try:
            device = resolve_device(spec.device)
        except ConfigError as e:
            raise ConfigError(f"{e} ({here}); a task needs a GPU of its runner") from e
        model = load_model(path, device=device)
        index = ClipIndex.open(spec.data, Selection(where=spec.where, duplicates=True), access=self._access)
        if index.digest != spec.index:
            raise DatasetError(f"{spec.data}: its clips have changed since the run began, seen {here}; run it again")
        self._encoder = FeatureEncoder(model, index, spec)

    def __enter__(self) -> FeatureWorker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._encoder.close()

    def stop(self) -> None:
        """End the waiting for the store and for decoders; `run` ends soon, with an error."""
        self._stopping.set()
        self._access.stop()
        if self._spec.workers != 0:  # who decodes in its own thread ends after its batch
            self._encoder.close()

    def run(self, task: int, watch: Watch[FeatureBlock] | None = None) -> FeatureBlock:
        """The features of a block of rows.

        StorageError where the store fails for longer than its patience, DatasetError where no clip can be decoded.
        """
        rows, before = self._spec.blocks[task], Counter(self._access.retries.counts())
        batches = []
        for batch in self._encoder.encode(rows):
            batches.append(batch)
            if self._stopping.is_set():
                raise ReelmaeError("stopped")
        return FeatureBlock(
            task,
            np.concatenate([np.empty(0, np.int64), *(batch.clip_V for batch in batches)]),
            np.concatenate([batch.features_BD for batch in batches]) if batches else np.empty((0, 1), np.float32),
            self._encoder.bad(rows),
            dict(Counter(self._access.retries.counts()) - before),
        )


def find_versions() -> dict[str, str]:
    """Library → its version here, without the name of its build, for those that decide about numbers."""
    return {name: version(name).partition("+")[0] for name in LIBRARIES}


def find_problem(spec: FeatureSpec, versions: Mapping[str, str]) -> str:
    """What keeps this machine from encoding clips as another one with these versions, in words; "" where nothing does."""
    scratch.sweep()
    here = find_versions()
    for name, wanted in versions.items():
        if here[name] != wanted:
            return f"has {name} {here[name]}, this machine {wanted}; install the same on all nodes"
    if not Path(spec.checkpoint).is_file():
        return f"does not see {spec.checkpoint}; put the checkpoint where all nodes see it at the same path"
    try:
        store = Store(spec.data, replace(spec.access, patience_s=min(spec.access.patience_s, PATIENCE_S)))
        if store.exists():
            return ""
    except (StorageError, InputError) as e:
        return f"cannot reach the dataset: {e}"
    return (
        f"does not see the dataset at {spec.data}; give DATA that all nodes share, such as a bucket or a network "
        "folder that is mounted at the same path"
    )


def normalise(pixels_BCTHW: Tensor, config: ViTConfig) -> Tensor:
    """uint8 → float32, normalised as in the model's training.

    The loader computes the same as one product and one sum (loading/batch.py), which may differ in the last bit.
    """
    shift, scale = (
        torch.tensor(v, device=pixels_BCTHW.device).view(3, 1, 1, 1) for v in (config.pixel_mean, config.pixel_std)
    )
    return (pixels_BCTHW.float() / 255 - shift) / scale


def pool_tokens(model: Model, clips_BCTHW: Tensor, pool: Pool) -> Tensor:
    """[B, D] of normalised clips: mean or class token of the encoder's output, or what a classifier's head reads."""
    if isinstance(model, Classifier):
        return model.features(clips_BCTHW)
    encoder = model.encoder if isinstance(model, MaskedAutoencoder) else model
    tokens_BLD = encoder(clips_BCTHW)
    return tokens_BLD[:, 0] if pool == "cls" else tokens_BLD[:, encoder.n_prefix :].mean(dim=1)


def file_digest(path: Path) -> str:
    """sha256 of the file, in hex: which weights they are, whatever its name."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
