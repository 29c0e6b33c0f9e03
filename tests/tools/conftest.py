"""A tiny run made by the real parts, once for all tests of the tools: raw bucket → shards → three training steps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reelmae.pipeline import schema


@pytest.fixture(scope="session")
def raw_bucket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from reelmae.tools.synth import make_bucket

    folder = tmp_path_factory.mktemp("bucket")
    make_bucket(folder, videos=9, seconds=1.0, seed=3)
    return folder


@pytest.fixture(scope="session")
def tiny_run(raw_bucket: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Laid out as the demo's folder: shards/ and train/."""
    from reelmae.pipeline.ingest.config import ShardConfig
    from reelmae.pipeline.ingest.job import shard
    from reelmae.train.config import load
    from reelmae.train.pretrain import pretrain

    folder = tmp_path_factory.mktemp("tiny")
    shards, train = folder / "shards", folder / "train"
    shard(str(raw_bucket), str(shards), ShardConfig(short_side=64, labels="folder"))
    small = ("model.depth=1", "model.decoder_depth=1", "loader.batch_videos=4", "loader.workers=0")
    pretrain(
        load("demo", [f"data.url={shards}", f"run.out={train}", "run.steps=3", "run.log_every=1", *small])
    )
    return folder


@pytest.fixture
def run_copy(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of the tiny run's folder, to be changed at will."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def clip(source: str, ordinal: int = 0, **values: Any) -> dict[str, Any]:
    """A row of index.parquet: ten seconds of a source of a minute, but for `values`."""
    start = 10.0 * ordinal
    return {
        "key": schema.clip_key(source, ordinal), "shard": "shards/000000-00.tar", "offset": 512, "size": 1000,
        "sha256": f"{ordinal:064x}", "source": source, "span_start_s": start, "span_end_s": start + 10,
        "frames": 300, "fps": 30.0, "width": 320, "height": 256, "codec": "h264", "label": None, "label_id": -1,
        "wanted_start_s": start, "wanted_end_s": start + 10, "motion": 3.0, "luma": 120.0, "contrast": 40.0,
        "border": 0.0, "phash": None, "duplicate_of": None, "source_bytes": 1000, "source_container": "mov",
        "source_codec": "hevc", "source_width": 1920, "source_height": 1080, "source_fps": 30.0,
        "source_seconds": 60.0, "encoder": "x264", "colour": "none", **values,
    }  # fmt: skip


@pytest.fixture(scope="session")
def make_clip() -> Callable[..., dict[str, Any]]:
    """make_clip(source, ordinal, **values) → a row of the index"""
    return clip


@pytest.fixture(scope="session")
def make_tables() -> Callable[..., Path]:
    """make_tables(folder, clips, rejects, **about) → folder: the tables of a dataset, without its shards."""

    def write(
        folder: Path, clips: pa.Table | Sequence[dict[str, Any]], rejects: Sequence[tuple[Any, ...]] = (), **about: Any
    ) -> Path:  # fmt: skip
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
