"""Frozen features of a whole shard dataset: one vector for each view of each clip, in one parquet file.

    checkpoint ── encoder ─┐
    shards ── ClipSweep ───┴── encoder(views) ── mean of the tokens, or class token ── OUT.parquet + OUT.json

Properties that hold:
- every clip of the index is in the file once for each view, or in the summary's `bad` with the reason; rows are in the
  index's order, views of a clip together;
- nothing is random: windows are spread evenly and crops are central, so two runs give the same features, up to the
  rounding of a batch's arithmetic;
- pixels are normalised as the model was trained on them;
- the files are written whole or not at all;
- a run that is killed resumes: the same call goes on after the last part (feature_parts.py), and gives the same bytes.

Tokens are not written: one clip has thousands of them. What needs them (an attentive probe) runs the encoder itself.

Legend: V clip, R view of it, B batch of views, C channel, T frame, H height, W width, D width of the encoder.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from reelmae.model.classifier import Classifier
from reelmae.model.config import ViTConfig
from reelmae.model.mae import MaskedAutoencoder
from reelmae.model.weights import find_checkpoint, load_model
from reelmae.model.weights.models import Model
from reelmae.pipeline.devices import resolve_device
from reelmae.pipeline.errors import ConfigError, InputError
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.loading.index.selection import Selection
from reelmae.pipeline.loading.order.draws import SampleOptions, SamplePolicy
from reelmae.pipeline.loading.sweep import ClipSweep
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.store import whole_file
from reelmae.train.config import load_config
from reelmae.train.feature_parts import FeatureParts
from reelmae.train.precision import Precision, autocast_dtype

Pool = Literal["mean", "cls"]
OnProgress = Callable[[int, int], None]
"""Called with the number of clips that are done, bad ones included, and the number of all clips."""
ROWS_TO_WRITE = 4096  # features in one row group; a part has about as many, or what PART_SECONDS gave
PART_SECONDS = 60.0  # the most work that a killed run loses


def features(
    checkpoint: str | Path,
    data: str,
    out: str | Path,
    *,
    views: int = 1,
    pool: Pool = "mean",
    fps: float | None = None,
    where: str | None = None,
    batch: int = 8,
    workers: int | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    access: Access | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Write OUT (parquet: key, label, label_id, view, feature) and the summary beside it (.json); returns the summary.

    The same call after a crash goes on where it stopped. Until OUT is there, a hidden folder beside it holds what is done.

    `checkpoint`: a run's folder, one of its checkpoints, or a .safetensors of `reelmae export` or `import-weights`.
    `data`: a shard dataset, reached by `access`. `where` selects clips of it; duplicates are included.
    `views`: windows of each clip, sampled as in the checkpoint's own training, or at `fps` frames a second where that is
    given. A file of weights alone does not know its training: it is sampled at the method's 7.5 frames a second.
    `pool`: the mean of the encoder's tokens, or its class token; for a classifier, what its head reads.
    `batch`: views that go through the encoder at a time.

    Raises ConfigError and InputError on bad arguments, StorageError where the dataset's store fails for longer than
    its patience, DatasetError where no clip can be decoded.
    """
    out = Path(out)
    _check(out, views=views, batch=batch, fps=fps)
    on = resolve_device(device)
    path = find_checkpoint(checkpoint)
    # exported weights do not say how clips were sampled in their training
    trained = SampleOptions() if path.suffix == ".safetensors" else load_config(path).loader.sample
    model = load_model(path, device=on)
    if pool == "cls" and (isinstance(model, Classifier) or not model.config.cls_token):
        what = "reads the mean of the tokens" if isinstance(model, Classifier) else "has no class token"
        raise ConfigError(f"pool='cls': the model {what}; give pool=mean")
    index = ClipIndex.open(data, Selection(where=where, duplicates=True), access=access)
    if not len(index):
        raise InputError(f"{data}: holds no clip")
    encode = partial(_encode, model, pool, batch, autocast_dtype(precision, on))
    stride, fps = (trained.stride, trained.fps) if fps is None else (None, fps)
    sample = SamplePolicy(frames=model.config.frames, size=model.config.size, stride=stride, fps=fps)
    facts = {
        "checkpoint": str(checkpoint),
        "checkpoint_sha256": _file_digest(path),
        "data": data,
        "index": index.digest,
        "where": where,
        "pool": pool,
        "views": views,
        "dim": model.config.dim,
        "sample": {name: getattr(sample, name) for name in ("frames", "size", "stride", "fps")},
    }
    began = time.monotonic()
    schema = table_schema(facts)
    # the same files elsewhere are the same; another batch or device rounds in another way
    same = {name: value for name, value in facts.items() if name not in ("checkpoint", "data")}
    same |= {"labels": _labels_digest(index), "batch": batch, "device": str(on), "precision": precision}
    parts = FeatureParts(out, same, schema)
    before = parts.clips
    if on_progress is not None and parts.rows:
        on_progress(parts.rows, len(index))
    if parts.rows < len(index):
        size = max(1, batch // views)
        with ClipSweep(index, sample, views=views, batch_videos=size, workers=workers, first=parts.rows) as sweep:
            for rows in _add_parts(parts, sweep, encode, schema):
                if on_progress is not None:
                    on_progress(rows, len(index))
    with whole_file(out) as file:
        parts.join(file, ROWS_TO_WRITE)
    seconds = time.monotonic() - began
    summary = {
        **facts,
        "out": str(out),
        "clips": parts.clips,
        "clips_before": before,
        "bad_clips": len(parts.bad),
        "seconds": seconds,
        "clips_per_s": (parts.clips - before) / seconds,
        "device": str(on),
        "retries": index.store.access.retries.counts(),
        "bad": parts.bad,
    }
    with whole_file(out.with_suffix(".json")) as part:
        part.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    parts.remove()
    return summary


def _check(out: Path, *, views: int, batch: int, fps: float | None) -> None:
    if out.suffix != ".parquet" or out.is_dir():
        raise ConfigError(f"out={out}: give a file that ends in .parquet; the summary goes beside it")
    for name, value in (("views", views), ("batch", batch)):
        if value < 1:
            raise ConfigError(f"{name}={value}: give at least 1")
    if fps is not None and not fps > 0:
        raise ConfigError(f"fps={fps}: give more than 0")


# --- encoding ----------------------------------------------------------------------------------------------------


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


@torch.no_grad()
def _encode(model: Model, pool: Pool, batch: int, autocast: torch.dtype | None, pixels_BCTHW: np.ndarray) -> np.ndarray:
    """float32 [B, D] of uint8 pixels, `batch` views at a time."""
    device = next(model.parameters()).device
    found = []
    for some in torch.from_numpy(pixels_BCTHW).split(batch):
        clips_BCTHW = normalise(some.to(device), model.config)  # bytes travel, not floats
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            found.append(pool_tokens(model, clips_BCTHW, pool).float().cpu())
    return torch.cat(found).numpy()


# --- writing -----------------------------------------------------------------------------------------------------


@dataclass
class _Held:
    """Batches whose features are not in a part yet."""

    tables: list[pa.Table] = field(default_factory=list)
    clips: int = 0
    since: float = field(default_factory=time.monotonic)

    def is_full(self) -> bool:
        """Whether it is time to write a part."""
        rows = sum(len(table) for table in self.tables)
        return rows >= ROWS_TO_WRITE or time.monotonic() - self.since >= PART_SECONDS


def _add_parts(
    parts: FeatureParts, sweep: ClipSweep, encode: Callable[[np.ndarray], np.ndarray], schema: pa.Schema
) -> Iterator[int]:
    """Encode the clips of the sweep and write them in parts; the number of rows of the index that are done, each batch."""
    index, held = sweep.index, _Held()
    names = {number: name for name, number in index.labels.items()}

    def write(stop: int) -> None:
        keys = (index.key(row) for row in range(parts.rows, stop)) if sweep.bad else ()
        bad = {key: sweep.bad[key] for key in keys if key in sweep.bad}
        parts.add(stop, held.tables, held.clips, bad)

    for batch in sweep:
        pixels_BCTHW = batch.pixels_VRCTHW.reshape(-1, *batch.pixels_VRCTHW.shape[2:])
        held.tables.append(_rows(index, names, batch.clip_V, encode(pixels_BCTHW), schema))
        held.clips += len(batch.clip_V)
        if held.is_full():
            write(batch.stop)
            held = _Held()
        yield batch.stop
    if parts.rows < len(index):
        write(len(index))
        yield len(index)


def _file_digest(path: Path) -> str:
    """sha256 of the file, in hex: which weights they are, whatever its name."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _labels_digest(index: ClipIndex) -> str:
    """sha256 of the clips' labels, in hex: the digest of an index does not name them."""
    names = json.dumps(index.labels, sort_keys=True).encode()
    return hashlib.sha256(names + index.label_id.tobytes()).hexdigest()


def table_schema(facts: dict[str, Any]) -> pa.Schema:
    """The columns; `facts` go with them as JSON, under `reelmae`."""
    return pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("label", pa.string()),  # null = unlabelled
            pa.field("label_id", pa.int32(), nullable=False),  # -1 = unlabelled
            pa.field("view", pa.int32(), nullable=False),  # 0 … views - 1, in the order of time
            pa.field("feature", pa.list_(pa.float32(), facts["dim"]), nullable=False),
        ],
        metadata={"reelmae": json.dumps(facts)},
    )


def _rows(
    index: ClipIndex, names: dict[int, str], clip_V: np.ndarray, features_BD: np.ndarray, schema: pa.Schema
) -> pa.Table:
    views, dim = len(features_BD) // len(clip_V), features_BD.shape[1]
    clip_B = np.repeat(clip_V, views)
    label_B = index.label_id[clip_B]
    columns = [
        pa.array([index.key(int(clip)) for clip in clip_B], pa.string()),
        pa.array([names.get(int(label)) for label in label_B], pa.string()),
        pa.array(label_B, pa.int32()),
        pa.array(np.tile(np.arange(views, dtype=np.int32), len(clip_V))),
        pa.FixedSizeListArray.from_arrays(pa.array(features_BD.reshape(-1), pa.float32()), dim),
    ]
    return pa.Table.from_arrays(columns, schema=schema)
