"""Frozen features of a whole shard dataset: one vector for each view of each clip, in one parquet file.

    checkpoint ── encoder ─┐
    shards ── ClipSweep ───┴── encoder(views) ── mean of the tokens, or class token ── OUT.parquet + OUT.json

Properties that hold:
- every clip of the index is in the file once for each view, or in the summary's `bad` with the reason; rows are in the
  index's order, views of a clip together;
- nothing is random: windows are spread evenly and crops are central, so two runs give the same features, up to the
  rounding of a batch's arithmetic;
- pixels are normalised as the model was trained on them;
- the files are written whole or not at all.

Tokens are not written: one clip has thousands of them. What needs them (an attentive probe) runs the encoder itself.

Legend: V clip, R view of it, B batch of views, C channel, T frame, H height, W width, D width of the encoder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
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
from reelmae.pipeline.loading.sweep import ClipSweep, SweepBatch
from reelmae.pipeline.storage.store import whole_file
from reelmae.train.config import load_config
from reelmae.train.precision import Precision, autocast_dtype

Pool = Literal["mean", "cls"]
OnProgress = Callable[[int, int], None]
"""Called with the number of clips that are done, bad ones included, and the number of all clips."""
ROWS_TO_WRITE = 4096  # features collected for one row group


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
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Write OUT (parquet: key, label, label_id, view, feature) and the summary beside it (.json); returns the summary.

    `checkpoint`: a run's folder, one of its checkpoints, or a .safetensors of `reelmae export` or `import-weights`.
    `data`: a shard dataset. `where` selects clips of it; duplicates are included.
    `views`: windows of each clip, sampled as in the checkpoint's own training, or at `fps` frames a second where that is
    given. A file of weights alone does not know its training: it is sampled at the method's 7.5 frames a second.
    `pool`: the mean of the encoder's tokens, or its class token; for a classifier, what its head reads.
    `batch`: views that go through the encoder at a time.

    Raises ConfigError and InputError on bad arguments, DatasetError where no clip can be decoded.
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
    index = ClipIndex.open(data, Selection(where=where, duplicates=True))
    if not len(index):
        raise InputError(f"{data}: holds no clip")
    encode = partial(_encode, model, pool, batch, autocast_dtype(precision, on))
    stride, fps = (trained.stride, trained.fps) if fps is None else (None, fps)
    sample = SamplePolicy(frames=model.config.frames, size=model.config.size, stride=stride, fps=fps)
    facts = {
        "checkpoint": str(checkpoint),
        "data": data,
        "index": index.digest,
        "where": where,
        "pool": pool,
        "views": views,
        "dim": model.config.dim,
        "sample": {name: getattr(sample, name) for name in ("frames", "size", "stride", "fps")},
    }
    began = time.monotonic()
    sweep = ClipSweep(index, sample, views=views, batch_videos=max(1, batch // views), workers=workers)
    with sweep, whole_file(out) as part:
        clips = _write(part, facts, index, _report_batches(sweep, len(index), on_progress), encode)
    seconds = time.monotonic() - began
    summary = {
        **facts,
        "out": str(out),
        "clips": clips,
        "bad_clips": len(sweep.bad),
        "seconds": seconds,
        "clips_per_s": clips / seconds,
        "device": str(on),
        "bad": sweep.bad,
    }
    with whole_file(out.with_suffix(".json")) as part:
        part.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
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


def _report_batches(sweep: ClipSweep, total: int, on_progress: OnProgress | None) -> Iterator[SweepBatch]:
    """The sweep's batches; `on_progress` is called after each."""
    clips = 0
    for batch in sweep:
        yield batch
        clips += len(batch.clip_V)
        if on_progress is not None:
            on_progress(clips + len(sweep.bad), total)


def _write(
    part: Path,
    facts: dict[str, Any],
    index: ClipIndex,
    batches: Iterator[SweepBatch],
    encode: Callable[[np.ndarray], np.ndarray],
) -> int:
    """Write the parquet, row group by row group; returns the number of clips in it."""
    schema = table_schema(facts)
    names = {number: name for name, number in index.labels.items()}
    clips, rows = 0, 0
    held: list[pa.Table] = []
    with pq.ParquetWriter(part, schema) as writer:
        for batch in batches:
            pixels_BCTHW = batch.pixels_VRCTHW.reshape(-1, *batch.pixels_VRCTHW.shape[2:])
            held.append(_rows(index, names, batch.clip_V, encode(pixels_BCTHW), schema))
            clips += len(batch.clip_V)
            rows += len(held[-1])
            if rows >= ROWS_TO_WRITE:
                writer.write_table(pa.concat_tables(held))
                held, rows = [], 0
        if held:
            writer.write_table(pa.concat_tables(held))
    return clips


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
