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
- a run that is killed resumes: the same call goes on after the last part (feature_parts.py), and gives the same bytes;
- with a runner, such as of a Ray cluster, blocks of rows are its tasks (feature_worker.py). Batches hold the same clips
  as without one, so machines of the same kind give the same bytes. This machine only collects features.

Tokens are not written: one clip has thousands of them. What needs them (an attentive probe) runs the encoder itself.

Legend: V clip, R view of it, B batch of views, C channel, T frame, H height, W width, D width of the encoder.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from reelmae.model.classifier import Classifier
from reelmae.model.weights import find_checkpoint, load_model
from reelmae.model.weights.models import Model
from reelmae.pipeline.devices import resolve_device
from reelmae.pipeline.errors import ClusterError, ConfigError, InputError
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.loading.index.selection import Selection
from reelmae.pipeline.loading.order.draws import SampleOptions, SamplePolicy
from reelmae.pipeline.runners.runner import Runner
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.store import whole_file
from reelmae.train.config import load_config
from reelmae.train.feature_parts import FeatureParts
from reelmae.train.feature_worker import (
    FeatureEncoder,
    FeatureSpec,
    FeatureWorker,
    Pool,
    file_digest,
    find_problem,
    find_versions,
    normalise,
    pool_tokens,
)
from reelmae.train.precision import Precision

__all__ = ["features", "normalise", "pool_tokens", "task_needs"]

OnProgress = Callable[[int, int], None]
"""Called with the number of clips that are done, bad ones included, and the number of all clips."""
ROWS_TO_WRITE = 4096  # features in one row group; a part has about as many, or what PART_SECONDS gave
PART_SECONDS = 60.0  # the most work that a killed run loses
BLOCK_FEATURES = 1024  # of a runner's task: some MB to send, and the most work that a killed worker loses
TASK_BYTES = 2 << 30  # of memory, beside the checkpoint
TASK_DECODERS = {"cuda": 4, "cpu": 1}  # processes of a runner's task, unless their number is given


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
    runner: Runner | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Write OUT (parquet: key, label, label_id, view, feature) and the summary beside it (.json); returns the summary.

    The same call after a crash goes on where it stopped, with a runner or without one. Until OUT is there, a hidden
    folder beside it holds what is done.

    `checkpoint`: a run's folder, one of its checkpoints, or a .safetensors of `reelmae export` or `import-weights`.
    `data`: a shard dataset, reached by `access`. `where` selects clips of it; duplicates are included.
    `views`: windows of each clip, sampled as in the checkpoint's own training, or at `fps` frames a second where that is
    given. A file of weights alone does not know its training: it is sampled at the method's 7.5 frames a second.
    `pool`: the mean of the encoder's tokens, or its class token; for a classifier, what its head reads.
    `batch`: views that go through the encoder at a time.
    `workers`: processes that decode: one per core. 0: this process decodes.
    `runner`: where clips are decoded and encoded instead of here, in blocks of some 1024 features. Its nodes must see
    `checkpoint` at the same path and reach `data`. `workers` is then of each task, by default 4 on CUDA, else 1.
    `device` is that of a task: auto is what this machine has, and on CUDA the runner gives each task a GPU (`task_needs`).

    Raises ConfigError and InputError on bad arguments, StorageError where the dataset's store fails for longer than
    its patience, DatasetError where no clip can be decoded, ClusterError where a node of the runner cannot take part.
    """
    out = Path(out)
    _check(out, views=views, batch=batch, fps=fps, workers=workers)
    on = resolve_device(device) if runner is None else _device_of_tasks(device)
    path = find_checkpoint(checkpoint)
    # exported weights do not say how clips were sampled in their training
    trained = SampleOptions() if path.suffix == ".safetensors" else load_config(path).loader.sample
    model = load_model(path, device=on if runner is None else "cpu")
    _check_pool(pool, model)
    index = ClipIndex.open(data, Selection(where=where, duplicates=True), access=access)
    if not len(index):
        raise InputError(f"{data}: holds no clip")
    stride, fps = (trained.stride, trained.fps) if fps is None else (None, fps)
    spec = FeatureSpec(
        checkpoint=str(path.absolute()),
        sha256=file_digest(path),
        data=index.store.url(),
        where=where,
        index=index.digest,
        sample=SamplePolicy(frames=model.config.frames, size=model.config.size, stride=stride, fps=fps),
        views=views,
        pool=pool,
        batch=batch,
        workers=workers,
        device=str(on),
        precision=precision,
        access=index.store.access,
    )
    facts = {
        "checkpoint": str(checkpoint),
        "checkpoint_sha256": spec.sha256,
        "data": data,
        "index": index.digest,
        "where": where,
        "pool": pool,
        "views": views,
        "dim": model.config.dim,
        "sample": {name: getattr(spec.sample, name) for name in ("frames", "size", "stride", "fps")},
    }
    # the same files elsewhere are the same; another batch or device rounds in another way
    same = {name: value for name, value in facts.items() if name not in ("checkpoint", "data")}
    same |= {"labels": _labels_digest(index), "batch": batch, "device": str(on), "precision": precision}
    began = time.monotonic()
    table = _Table(FeatureParts(out, same, table_schema(facts)), index, table_schema(facts))
    parts, before = table.parts, table.parts.clips
    _add_missing(table, model, spec, runner, on_progress or (lambda done, of: None))
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


def task_needs(checkpoint: str | Path, device: str = "auto", workers: int | None = None) -> dict[str, Any]:
    """What a task of `features` with a runner needs: keyword arguments `cores`, `memory_bytes`, `gpus` of RayRunner."""
    on = _device_of_tasks(device)
    return {
        "cores": max(1, _decoders(on, workers)),
        "memory_bytes": TASK_BYTES + find_checkpoint(checkpoint).stat().st_size,
        "gpus": 1 if on.type == "cuda" else 0,
    }


def _device_of_tasks(device: str) -> torch.device:
    """The device of a runner's tasks. This machine need not have it."""
    if device == "auto":
        return resolve_device(device)
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"device={device}: with a runner, give cpu, cuda or auto; a task sees no GPU but its own")
    return torch.device(device)


def _decoders(on: torch.device, workers: int | None) -> int:
    """Processes that decode for one task of a runner."""
    return TASK_DECODERS[on.type] if workers is None else workers


def _check(out: Path, *, views: int, batch: int, fps: float | None, workers: int | None) -> None:
    if out.suffix != ".parquet" or out.is_dir():
        raise ConfigError(f"out={out}: give a file that ends in .parquet; the summary goes beside it")
    for name, value, least in (("views", views, 1), ("batch", batch, 1), ("workers", workers, 0)):
        if value is not None and value < least:
            raise ConfigError(f"{name}={value}: give at least {least}")
    if fps is not None and not fps > 0:
        raise ConfigError(f"fps={fps}: give more than 0")


def _check_pool(pool: Pool, model: Model) -> None:
    if pool == "cls" and (isinstance(model, Classifier) or not model.config.cls_token):
        what = "reads the mean of the tokens" if isinstance(model, Classifier) else "has no class token"
        raise ConfigError(f"pool='cls': the model {what}; give pool=mean")


# --- encoding and writing --------------------------------------------------------------------------------------------


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


def _add_missing(
    table: _Table, model: Model, spec: FeatureSpec, runner: Runner | None, on_progress: OnProgress
) -> None:
    """Encode what is in no part yet."""
    total = len(table.index)
    if table.parts.rows:
        on_progress(table.parts.rows, total)
    if table.parts.rows < total:
        with closing(_encode_here(table, model, spec) if runner is None else _encode_on(runner, table, spec)) as added:
            for rows in added:
                on_progress(rows, total)


def _encode_here(table: _Table, model: Model, spec: FeatureSpec) -> Generator[int, None, None]:
    """Encode what is missing and write it in parts; the number of rows of the index that are done, each batch."""
    parts = table.parts
    with FeatureEncoder(model, table.index, spec) as encoder:
        for gap in parts.missing(len(table.index)):
            start, held = gap.start, _Held()
            for batch in encoder.encode(gap):
                held.tables.append(table.rows(batch.clip_V, batch.features_BD))
                held.clips += len(batch.clip_V)
                if held.is_full():
                    rows = range(start, batch.stop)
                    parts.add(rows, held.tables, held.clips, encoder.bad(rows))
                    start, held = batch.stop, _Held()
                yield parts.rows + batch.stop - start
            if start < gap.stop:
                rows = range(start, gap.stop)
                parts.add(rows, held.tables, held.clips, encoder.bad(rows))
                yield parts.rows


def _encode_on(runner: Runner, table: _Table, spec: FeatureSpec) -> Generator[int, None, None]:
    """Have what is missing encoded by a runner, a part for each task; the number of rows that are done, each task."""
    spec = replace(
        spec,
        blocks=tuple(_blocks(table.parts.missing(len(table.index)), spec)),
        workers=_decoders(torch.device(spec.device), spec.workers),
    )
    for node, problem in runner.ask_nodes(partial(find_problem, spec, find_versions())).items():
        if problem:
            raise ClusterError(f"node {node}: {problem}")
    with closing(runner.run(range(len(spec.blocks)), partial(FeatureWorker, spec))) as found:
        for block in found:
            clips = [table.rows(block.clip_V, block.features_BD)] if len(block.clip_V) else []
            table.parts.add(spec.blocks[block.task], clips, len(block.clip_V), block.bad)
            for cause, n in block.retries.items():
                spec.access.retries.add(cause, n)
            yield table.parts.rows


def _blocks(gaps: Iterable[range], spec: FeatureSpec) -> Iterator[range]:
    """These rows of the index, cut where blocks of one size begin: whole batches, some BLOCK_FEATURES features."""
    size = max(1, BLOCK_FEATURES // (spec.batch_videos * spec.views)) * spec.batch_videos
    for gap in gaps:
        start = gap.start
        while start < gap.stop:
            stop = min(gap.stop, (start // size + 1) * size)
            yield range(start, stop)
            start = stop


class _Table:
    """The table of features: the clips of an index, and the parts of what is done."""

    def __init__(self, parts: FeatureParts, index: ClipIndex, schema: pa.Schema) -> None:
        self.parts, self.index, self._schema = parts, index, schema
        self._names = {number: name for name, number in index.labels.items()}

    def rows(self, clip_V: np.ndarray, features_BD: np.ndarray) -> pa.Table:
        """The rows of these clips, with the features of their views."""
        views, dim = len(features_BD) // len(clip_V), features_BD.shape[1]
        clip_B = np.repeat(clip_V, views)
        label_B = self.index.label_id[clip_B]
        columns = [
            pa.array([self.index.key(int(clip)) for clip in clip_B], pa.string()),
            pa.array([self._names.get(int(label)) for label in label_B], pa.string()),
            pa.array(label_B, pa.int32()),
            pa.array(np.tile(np.arange(views, dtype=np.int32), len(clip_V))),
            pa.FixedSizeListArray.from_arrays(pa.array(features_BD.reshape(-1), pa.float32()), dim),
        ]
        return pa.Table.from_arrays(columns, schema=self._schema)


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


def _labels_digest(index: ClipIndex) -> str:
    """sha256 of the clips' labels, in hex: the digest of an index does not name them."""
    names = json.dumps(index.labels, sort_keys=True).encode()
    return hashlib.sha256(names + index.label_id.tobytes()).hexdigest()
