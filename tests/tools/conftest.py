"""Tables of a dataset, row by row as a test wants them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reelmae.pipeline import schema

Rows = Sequence[dict[str, Any]]


def clip(source: str, ordinal: int = 0, **values: Any) -> dict[str, Any]:
    """A row of index.parquet: ten seconds of a source of a minute, except for `values`."""
    start = 10.0 * ordinal
    return {
        "key": schema.clip_key(source, ordinal),
        "shard": "shards/000000-00.tar",
        "offset": 512,
        "size": 1000,
        "sha256": f"{ordinal:064x}",
        "source": source,
        "span_start_s": start,
        "span_end_s": start + 10,
        "frames": 300,
        "fps": 30.0,
        "width": 320,
        "height": 256,
        "codec": "h264",
        "label": None,
        "label_id": -1,
        "wanted_start_s": start,
        "wanted_end_s": start + 10,
        "motion": 3.0,
        "luma": 120.0,
        "contrast": 40.0,
        "border": 0.0,
        "phash": None,
        "duplicate_of": None,
        "source_bytes": 1000,
        "source_container": "mov",
        "source_codec": "hevc",
        "source_width": 1920,
        "source_height": 1080,
        "source_fps": 30.0,
        "source_seconds": 60.0,
        "encoder": "x264",
        "colour": "none",
        "blocks": None,
        **values,
    }


@pytest.fixture(scope="session")
def make_clip() -> Callable[..., dict[str, Any]]:
    """make_clip(source, ordinal, **values) → a row of the index"""
    return clip


@pytest.fixture(scope="session")
def make_tables() -> Callable[..., Path]:
    """make_tables(folder, clips, rejects, **about) → folder: the tables of a dataset, without its shards."""

    def write(folder: Path, clips: pa.Table | Rows, rejects: Sequence[tuple[Any, ...]] = (), **about: Any) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        columns = schema.with_columns(schema.CLIPS, about.get("columns", {}))
        table = clips if isinstance(clips, pa.Table) else pa.Table.from_pylist(clips, columns)
        pq.write_table(table, folder / schema.INDEX, row_group_size=7000)
        rows = [dict(zip(schema.REJECTS.names, reject, strict=True)) for reject in rejects]
        pq.write_table(pa.Table.from_pylist(rows, schema.REJECTS), folder / schema.REJECTS_FILE)
        (folder / schema.LABELS).write_text(json.dumps(about.pop("labels", {})))
        facts = {"format": schema.FORMAT, "src": "/raw", "bytes": 500, "shards": 1, "config": {}, **about}
        (folder / schema.DATASET_JSON).write_text(json.dumps(facts))
        return folder

    return write
