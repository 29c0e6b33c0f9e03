"""A bucket on a real S3 server: the same clips come from it as from a local copy, and a run trains on it."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from reelmae.pipeline.errors import TooManyBadClipsError
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.job import shard
from reelmae.pipeline.loading.config import LoaderConfig
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.loading.loader import ClipLoader
from reelmae.pipeline.loading.order.draws import SamplePolicy
from reelmae.pipeline.storage.store import Store
from reelmae.train.config import load_recipe
from reelmae.train.pretraining import pretrain


def _copy(here: Path, there: str) -> None:
    store = Store(there)
    for path in sorted(p for p in here.rglob("*") if p.is_file()):
        store.publish(path, path.relative_to(here).as_posix())


def test_clips_from_s3_are_those_of_a_local_copy_and_a_run_trains_on_them(
    tiny_bucket: Path, s3_server: Any, tmp_path: Path
) -> None:
    local, remote = tmp_path / "shards", s3_server.url("trained/shards")
    shard(str(tiny_bucket), str(local), ShardConfig(short_side=64, clip_seconds=1))
    _copy(local, remote)

    config = LoaderConfig(
        batch_videos=4, workers=1, sample=SamplePolicy(frames=4, size=32), patch=(2, 8, 8), device="cpu"
    )
    batches = []
    for url in (str(local), remote):
        with ClipLoader(ClipIndex.open(url), config) as loader:
            batches.append(list(islice(loader, 3)))
            assert not loader.stats.bad
    for a, b in zip(*batches, strict=True):
        assert torch.equal(a.clips_BCTHW, b.clips_BCTHW)
        assert torch.equal(a.ids_keep_BK, b.ids_keep_BK)

    truncated = Store(remote)
    shard_name = ClipIndex.open(remote).shard(0)
    truncated.publish_bytes(truncated.read_bytes(shard_name)[:2000], shard_name)
    # most of this dataset is in one shard: all its clips are bad ones, and the storage is not to blame
    with (
        pytest.raises(TooManyBadClipsError, match="the file is damaged"),
        ClipLoader(ClipIndex.open(remote), config.model_copy(update={"max_bad_fraction": 0.0})) as loader,
    ):
        list(islice(loader, 3))
    _copy(local, remote)

    small = ["loader.batch_videos=2", "model.depth=1", "model.decoder_depth=1"]
    summary = pretrain(
        load_recipe("demo", [f"data.url={remote}", f"run.out={tmp_path / 'run'}", "run.steps=2", *small])
    )
    assert summary.steps == 2
    assert not summary.bad_clips
