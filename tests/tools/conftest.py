"""A tiny run made by the real parts, once for all tests of the tools: raw bucket → shards → three training steps."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


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
