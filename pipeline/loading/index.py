"""The index of a shard dataset as columns: what can be played, where its bytes lie, what it looks like.

Properties that hold:
- a dataset without `dataset.json` is not opened: the job that writes it has not finished;
- `digest` names the content and the order of the clips (keys and sha256 of their bytes), whatever the parquet's
  own layout; a resumed run compares it;
- memory is about 70 bytes a clip: numpy columns, shards and codecs as numbers, keys in one arrow array.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from reelmae.pipeline import schema
from reelmae.pipeline.errors import DatasetError, InputError
from reelmae.pipeline.storage import Store

_NUMBERS: dict[str, type[np.generic]] = {
    "offset": np.int64,
    "size": np.int64,
    "frames": np.int32,
    "fps": np.float64,
    "width": np.int32,
    "height": np.int32,
    "label_id": np.int32,
}
_COLUMNS = ["key", "shard", "codec", "sha256", "duplicate_of", *_NUMBERS]


@dataclass(frozen=True, eq=False)
class ClipIndex:
    """N clips of one dataset, in shard order. Columns are read-only arrays of length N."""

    store: Store
    digest: str  # hex
    keys: pa.Array  # large_string
    shard_names: list[str]
    shard_of_clip: np.ndarray  # int32, into shard_names
    codec_names: list[str]
    codec_of_clip: np.ndarray  # int8, into codec_names
    offset: np.ndarray  # int64, bytes within the shard
    size: np.ndarray  # int64, bytes
    frames: np.ndarray  # int32
    fps: np.ndarray  # float64
    width: np.ndarray  # int32
    height: np.ndarray  # int32
    label_id: np.ndarray  # int32, -1 = unlabelled
    left_out: int  # clips that repeat another, marked so by the sharding job
    labels: dict[str, int]

    @classmethod
    def open(cls, url: str, *, duplicates: bool = False) -> ClipIndex:
        """Read the index of the dataset at `url` (a folder or any fsspec URL).

        Clips that repeat another (column `duplicate_of`) are left out unless `duplicates`.
        Raises InputError where no finished dataset of this format is there, DatasetError where its index is
        not what dataset.json says.
        """
        store = Store(url)
        about = _read_about(store, url)
        with tempfile.TemporaryDirectory(prefix="reelmae-index-") as folder:
            path = _local_copy(store, schema.INDEX, Path(folder), url)
            columns, digest = _read_columns(path, url, duplicates)
        if (there := len(columns["offset"]) + columns["left_out"]) != about["clips"]:
            raise DatasetError(
                f"{url}: {schema.INDEX} has {there} clips, {schema.DATASET_JSON} says {about['clips']}; "
                "run reelmae verify on it"
            )
        labels = json.loads(store.read_bytes(schema.LABELS)) if store.exists(schema.LABELS) else {}
        return cls(store=store, digest=digest, labels=labels, **columns)

    def __len__(self) -> int:
        return len(self.offset)

    def __repr__(self) -> str:
        return f"ClipIndex({self.store.url()!r}, {len(self)} clips in {len(self.shard_names)} shards, {self.digest[:12]})"

    def key(self, clip: int) -> str:
        """The clip's key."""
        return self.keys[clip].as_py()

    def shard(self, clip: int) -> str:
        """Path of the clip's shard within the store."""
        return self.shard_names[self.shard_of_clip[clip]]


def _read_about(store: Store, url: str) -> dict[str, Any]:
    """dataset.json, checked."""
    try:
        about = json.loads(store.read_bytes(schema.DATASET_JSON))
    except FileNotFoundError as e:
        if not store.exists():
            raise InputError(f"{url}: no such folder or bucket; check the path") from e
        raise InputError(
            f"{url}: has no {schema.DATASET_JSON}, so it is no shard dataset or its job has not finished; "
            "run reelmae shard again with the same arguments (it resumes)"
        ) from e
    except ValueError as e:
        raise InputError(
            f"{url}: its {schema.DATASET_JSON} is not JSON ({e}); run reelmae shard again"
        ) from e
    found = about.get("format") if isinstance(about, dict) else None
    if found != schema.FORMAT:
        raise InputError(
            f"{url}: dataset format {found!r}, this version reads {schema.FORMAT}; shard the bucket anew"
        )
    return about


def _local_copy(store: Store, name: str, folder: Path, url: str) -> Path:
    """The file itself where the store is local, else a copy in `folder`."""
    try:
        if store.is_local:
            if not store.local_path(name).is_file():
                raise FileNotFoundError(name)
            return store.local_path(name)
        store.download(name, folder / "index")
        return folder / "index"
    except FileNotFoundError as e:
        raise InputError(f"{url}: has no {name}; run reelmae shard again (it resumes)") from e


def _read_columns(path: Path, url: str, duplicates: bool) -> tuple[dict[str, Any], str]:
    """The columns of ClipIndex and the digest, in one pass over the row groups."""
    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            missing = set(_COLUMNS) - set(file.schema_arrow.names)
            if missing:
                raise InputError(
                    f"{url}: {schema.INDEX} lacks the columns {sorted(missing)}; shard the bucket anew"
                )
            batches = file.iter_batches(batch_size=1 << 16, columns=_COLUMNS)
            if not duplicates:
                batches = (batch.filter(pc.is_null(batch["duplicate_of"])) for batch in batches)
            return _collect(batches, file.metadata.num_rows)
    except pa.ArrowInvalid as e:
        raise InputError(f"{url}: {schema.INDEX} is no parquet file ({e}); run reelmae shard again") from e


def _collect(batches: Iterable[Any], n: int) -> tuple[dict[str, Any], str]:
    numbers: dict[str, np.ndarray] = {name: np.empty(n, dtype) for name, dtype in _NUMBERS.items()}
    codes: dict[str, np.ndarray] = {"shard": np.empty(n, np.int32), "codec": np.empty(n, np.int8)}
    names: dict[str, dict[str, int]] = {"shard": {}, "codec": {}}
    keys = []
    digests = [hashlib.sha256(), hashlib.sha256()]
    at = 0
    for batch in batches:
        rows = slice(at, at + len(batch))
        at += len(batch)
        for name, column in numbers.items():
            column[rows] = batch[name].to_numpy(zero_copy_only=False)
        for name, column in codes.items():
            encoded = batch[name].dictionary_encode()
            known = names[name]
            local = np.array([known.setdefault(v, len(known)) for v in encoded.dictionary.to_pylist()])
            column[rows] = local[encoded.indices.to_numpy()] if len(local) else 0
        for digest, name in zip(digests, ("key", "sha256"), strict=True):
            digest.update(_text_bytes(batch[name]))
        keys.append(batch["key"].cast(pa.large_string()))
    columns: dict[str, Any] = {name: _frozen(column[:at]) for name, column in numbers.items()}
    columns["shard_of_clip"], columns["codec_of_clip"] = (
        _frozen(codes["shard"][:at]),
        _frozen(codes["codec"][:at]),
    )
    columns["left_out"] = n - at
    columns["shard_names"], columns["codec_names"] = list(names["shard"]), list(names["codec"])
    columns["keys"] = pa.concat_arrays(keys) if keys else pa.array([], pa.large_string())
    whole = hashlib.sha256(b"".join(d.digest() for d in digests))
    return columns, whole.hexdigest()


def _text_bytes(column: Any) -> bytes:
    """All strings of an arrow column, each followed by a newline."""
    if not len(column):
        return b""
    whole: Any = pa.ListArray.from_arrays([0, len(column)], column)
    joined: Any = pc.binary_join(whole, "\n")
    return joined[0].as_buffer().to_pybytes() + b"\n"


def _frozen(column: np.ndarray) -> np.ndarray:
    column.flags.writeable = False
    return column
