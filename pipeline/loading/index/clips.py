"""The index of a shard dataset as columns: what can be played, where its bytes lie, what it looks like.

Properties that hold:
- a dataset without `dataset.json` is not opened: the job that writes it has not finished;
- `digest` names the content and the order of the clips that are played (keys and hashes of their bytes), whatever the
  parquet's own layout; a resumed run compares it;
- a shard's clips are consecutive rows, so that orders are made of shards: `shard_start`;
- memory is 59 bytes a clip; large clips of a remote store take 8 bytes more for each block of 64 KiB (1/8192 of them).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from reelmae.pipeline import schema
from reelmae.pipeline.errors import DatasetError, InputError
from reelmae.pipeline.loading.index.blocks import NO_CHECKS, BlockChecks
from reelmae.pipeline.loading.index.columns import ClipColumns, read_columns
from reelmae.pipeline.loading.index.keys import key_text
from reelmae.pipeline.loading.index.selection import Selection
from reelmae.pipeline.loading.order.epochs import ShardRange
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.checked import download_agreed, read_agreed
from reelmae.pipeline.storage.scratch import scratch_folder
from reelmae.pipeline.storage.store import Store

_EVERYTHING = Selection()


class ClipFacts(TypedDict):
    """What the draws of a clip depend on: its length, rate and size as stored."""

    frames: int
    fps: float
    height: int
    width: int


@dataclass(frozen=True, eq=False)
class ClipIndex:
    """N clips in S shards, of one dataset or (see mixture.py) of several. Arrays are read-only."""

    stores: tuple[Store, ...]
    """The files of each dataset."""
    parts: tuple[ShardRange, ...]
    """Shards that are shuffled as one dataset, and their weight."""
    digest: str
    """Names the content and the order of the clips, in hex."""
    shard_names: list[str]
    """[S]: path of each shard within its store."""
    shard_start: np.ndarray
    """int64 [S + 1]: shard s holds the rows shard_start[s] to shard_start[s + 1] - 1."""
    shard_bytes: np.ndarray
    """int64 [S]: bytes of the shard up to the end of its last clip."""
    dataset_of_shard: np.ndarray
    """int32 [S], into stores."""
    source_id: np.ndarray
    """uint64 [N]: the first half of the key."""
    ordinal: np.ndarray
    """uint16 [N]: the second half of the key."""
    check: np.ndarray
    """uint64 [N]: first 8 bytes of the clip's sha256, big endian."""
    codec_names: list[str]
    """The codecs of the clips, sorted."""
    codec_of_clip: np.ndarray
    """int8 [N], into codec_names."""
    offset: np.ndarray
    """int64 [N]: where the clip begins in its shard, in bytes."""
    size: np.ndarray
    """int64 [N]: bytes of the clip."""
    frames: np.ndarray
    """int32 [N]: stored frames."""
    fps: np.ndarray
    """float64 [N]: stored frames a second."""
    width: np.ndarray
    """int32 [N]: pixels."""
    height: np.ndarray
    """int32 [N]: pixels."""
    label_id: np.ndarray
    """int32 [N]; -1: unlabelled."""
    left_out: int
    """Clips that are not played because the sharding job marked them as duplicates."""
    unselected: int
    """Clips that are not played because the selection does not match them."""
    labels: dict[str, int]
    """Number of each label."""
    blocks: BlockChecks = NO_CHECKS
    """The checks of the blocks of large clips on remote stores."""

    @classmethod
    def open(cls, url: str, selection: Selection = _EVERYTHING, *, access: Access | None = None) -> ClipIndex:
        """Read the selected rows of the index of the dataset at `url` (a folder or any fsspec URL), reached by `access`.

        Raises InputError where there is no finished dataset of this format or no clip is selected, ConfigError where
        the selection is not valid, DatasetError where the index does not agree with dataset.json.
        """
        store = Store(url, access)
        about = _read_about(store, url)
        with scratch_folder("index-") as folder:
            path = _local_copy(store, schema.INDEX, Path(folder), url)
            # parts of clips are only read from remote stores
            blocks = not store.is_local and about["format"] > 1
            columns = read_columns(path, url, selection, access=access, blocks=blocks)
        if columns.clips != about["clips"]:
            raise DatasetError(
                f"{url}: {schema.INDEX} has {columns.clips} clips, {schema.DATASET_JSON} says {about['clips']}; "
                "run reelmae verify on it"
            )
        if columns.clips and not columns.shard_names:
            raise InputError(
                f"{url}: none of its {columns.clips} clips is left by {selection}; "
                f"{columns.repeats} of them as they repeat others"
            )
        labels = json.loads(read_agreed(store, schema.LABELS)) if store.exists(schema.LABELS) else {}
        return cls._from_columns(store, columns, labels)

    @classmethod
    def _from_columns(cls, store: Store, columns: ClipColumns, labels: dict[str, int]) -> ClipIndex:
        shards, rows = len(columns.shard_names), columns.rows
        return cls(
            stores=(store,),
            parts=(ShardRange(0, shards),),
            digest=_digest(rows),
            shard_names=columns.shard_names,
            shard_start=freeze(np.concatenate([[0], np.cumsum(columns.clips_of_shard, dtype=np.int64)])),
            shard_bytes=freeze(columns.bytes_of_shard),
            dataset_of_shard=freeze(np.zeros(shards, np.int32)),
            codec_names=columns.codec_names,
            left_out=columns.repeats,
            unselected=columns.clips - columns.repeats - len(rows["offset"]),
            labels=labels,
            blocks=columns.blocks,
            **{name: freeze(column) for name, column in rows.items()},
        )

    def __len__(self) -> int:
        return len(self.offset)

    def __repr__(self) -> str:
        urls = ", ".join(repr(store.url()) for store in self.stores)
        return f"ClipIndex({urls}, {len(self)} clips in {len(self.shard_names)} shards, {self.digest[:12]})"

    @property
    def store(self) -> Store:
        """The dataset's files, where there is but one."""
        assert len(self.stores) == 1, f"{len(self.stores)} datasets: take stores[dataset]"
        return self.stores[0]

    @property
    def shard_of_clip(self) -> np.ndarray:
        """int32 [N], into shard_names; made anew each time."""
        return np.repeat(np.arange(len(self.shard_names), dtype=np.int32), np.diff(self.shard_start))

    def shard_number(self, clip: int) -> int:
        """The clip's shard, into shard_names."""
        return int(np.searchsorted(self.shard_start, clip, side="right")) - 1

    def key(self, clip: int) -> str:
        """The clip's key."""
        return key_text(int(self.source_id[clip]), int(self.ordinal[clip]))

    def shard(self, clip: int) -> str:
        """Path of the clip's shard within its store."""
        return self.shard_names[self.shard_number(clip)]

    def dataset(self, clip: int) -> int:
        """The clip's dataset, into stores."""
        return int(self.dataset_of_shard[self.shard_number(clip)])

    def facts(self, clip: int) -> ClipFacts:
        """The clip's length, rate and size: keyword arguments of the functions that draw samples of it."""
        return {
            "frames": int(self.frames[clip]),
            "fps": float(self.fps[clip]),
            "height": int(self.height[clip]),
            "width": int(self.width[clip]),
        }

    def rows_beside(self, clip: int) -> range:
        """The rows that are shuffled together with this one: its dataset, where several are mixed by weights."""
        shard = self.shard_number(clip)
        part = next(p for p in self.parts if shard < p.stop)
        return range(int(self.shard_start[part.start]), int(self.shard_start[part.stop]))


def freeze(column: np.ndarray) -> np.ndarray:
    """Make the array read-only, and return it."""
    column.flags.writeable = False
    return column


def _digest(rows: dict[str, np.ndarray]) -> str:
    whole = hashlib.sha256()
    for name, kind in (("source_id", "<u8"), ("ordinal", "<u2"), ("check", "<u8")):
        whole.update(rows[name].astype(kind, copy=False).data)
    return whole.hexdigest()


def _read_about(store: Store, url: str) -> dict[str, Any]:
    """dataset.json, checked."""
    try:
        about = json.loads(read_agreed(store, schema.DATASET_JSON))
    except FileNotFoundError as e:
        if not store.exists():
            raise InputError(f"{url}: no such folder or bucket; check the path") from e
        raise InputError(
            f"{url}: has no {schema.DATASET_JSON}, so it is not a shard dataset or its job has not finished; "
            "run reelmae shard again with the same arguments (it resumes)"
        ) from e
    except ValueError as e:
        raise InputError(f"{url}: its {schema.DATASET_JSON} is not JSON ({e}); run reelmae shard again") from e
    words = schema.format_fault(about.get("format") if isinstance(about, dict) else None)
    if words:
        raise InputError(f"{url}: {words}")
    return about


def _local_copy(store: Store, name: str, folder: Path, url: str) -> Path:
    """The file itself where the store is local, else a copy in `folder`."""
    try:
        if store.is_local:
            if not store.local_path(name).is_file():
                raise FileNotFoundError(name)
            return store.local_path(name)
        download_agreed(store, name, folder / "index")
        return folder / "index"
    except FileNotFoundError as e:
        raise InputError(f"{url}: has no {name}; run reelmae shard again (it resumes)") from e
