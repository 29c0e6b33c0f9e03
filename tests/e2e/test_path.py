"""The whole path on a tiny bucket, through the command line: raw files → shards → verified → pretrained → pictures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

REELMAE = [sys.executable, "-m", "reelmae.tools.cli"]


def run(*args: object) -> dict[str, Any]:
    result = subprocess.run([*REELMAE, *map(str, args), "--json"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from reelmae.tools.synth.bucket import make_bucket

    folder = tmp_path_factory.mktemp("raw")
    make_bucket(folder, videos=10, broken=3, seconds=2.0)
    return folder


def test_a_raw_bucket_becomes_an_encoder_and_pictures(bucket: Path, tmp_path: Path) -> None:
    files = [p for p in bucket.rglob("*") if p.is_file()]
    shards, out = tmp_path / "shards", tmp_path / "run"

    made = run("shard", bucket, shards, "--short-side", 64)
    assert made["sources"] == len(files)
    assert made["sources_kept"] + sum(made["rejected"].values()) == len(files)
    assert made["clips"] == len(pq.read_table(shards / "index.parquet")) >= made["sources_kept"] >= 10

    assert run("verify", shards, "--deep")["faults"] == []

    again = run("shard", bucket, shards, "--short-side", 64)
    assert (again["clips"], again["bytes"]) == (made["clips"], made["bytes"])

    small = ["loader.batch_videos=4", "loader.workers=1", "model.depth=1", "model.decoder_depth=1"]
    steps = ["run.steps=6", "run.log_every=1"]
    trained = run("pretrain", "demo", f"data.url={shards}", f"run.out={out}", *steps, *small)
    assert trained["steps"] == 6
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(0.2 < row["loss"] < 5 for row in rows)

    pictures = run("reconstruct", out, shards, "--out", tmp_path / "pictures", "--clips", 2)
    with Image.open(pictures["png"]) as png:
        assert png.format == "PNG"
    with Image.open(pictures["animation"]) as animation:
        assert animation.n_frames > 1

    report = run("report", out)
    assert Path(report["report"]).stat().st_size > 10_000
