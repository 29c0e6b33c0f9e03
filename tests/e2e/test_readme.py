"""The README's journeys, each command as it is written, in order. Slow: it shards, benches and trains for real."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from reelmae.pipeline.storage.store import Store
from reelmae.tools.synth.bucket import make_bucket

README = Path(__file__).resolve().parents[2] / "README.md"
JOURNEYS = ("## I have a bucket", "## I want to know what limits me", "## I want to pretrain")
ON_S3, BUCKET, OPTIONS = "### On S3", "your-bucket", "store.json"
FROM_TARS, ON_RAY, HEAD = "### From tars", "### On a Ray cluster", "head-node:6379"
REELMAE = [sys.executable, "-m", "reelmae.tools.cli"]


def block_of(heading: str, kind: str) -> str:
    """The first block of a kind (console, python) under a heading."""
    section = README.read_text(encoding="utf-8").split(f"\n{heading}\n")[1]
    block = re.search(rf"```{kind}\n(.*?)```", section, re.DOTALL)
    assert block is not None
    return block[1]


def commands_of(heading: str) -> list[str]:
    """The `$ reelmae …` lines of the first console block under a heading, without their comments."""
    return [line.removeprefix("$ ").split(" #")[0].strip() for line in block_of(heading, "console").splitlines()]


def run_as_written(command: str, folder: Path) -> None:
    name, *arguments = shlex.split(command)
    assert name == "reelmae", command
    done = subprocess.run([*REELMAE, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the demo has been: a small bucket in runs/demo/bucket."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "runs" / "demo").mkdir(parents=True)
    make_bucket(folder / "runs" / "demo" / "bucket", videos=14, seconds=2.5, seed=1)
    return folder


@pytest.mark.slow
def test_each_command_of_the_journeys_runs_as_written(folder: Path) -> None:
    for heading in JOURNEYS:
        commands = commands_of(heading)
        assert commands
        for command in commands:
            run_as_written(command, folder)
    for made in ("shards/report.html", "runs/mine/pictures/reconstruction.png", "runs/mine/features.parquet"):
        assert (folder / made).stat().st_size > 0, made
    assert (folder / "runs" / "mine" / "checkpoints" / "step_000040.pt").is_file()
    assert (folder / "runs" / "mine" / "encoder.safetensors").is_file()


@pytest.fixture
def raw_on_s3(folder: Path, s3_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server whose bucket has the demo's videos under `raw`; tmp_path has its options in a file, which is all that is needed."""
    s3_server = replace(s3_server, bucket=f"reelmae-{tmp_path.name.replace('_', '-')[:40]}")
    s3_server.make_bucket()
    raw, store = folder / "runs" / "demo" / "bucket", Store(s3_server.url("raw"), s3_server.access())
    for path in sorted(p for p in raw.rglob("*") if p.is_file()):
        store.publish(path, path.relative_to(raw).as_posix())
    for name in s3_server.environment():
        monkeypatch.delenv(name)
    (tmp_path / OPTIONS).write_text(json.dumps(s3_server.options()))
    return s3_server


@pytest.mark.slow
def test_the_journey_from_tars_runs_as_written(folder: Path) -> None:
    bucket, tars = folder / "runs" / "demo" / "bucket", folder / "tars"
    tars.mkdir()
    files = sorted(p for p in bucket.rglob("*") if p.is_file())
    for number in range(2):
        with tarfile.open(tars / f"{number:03d}.tar", "w") as tar:
            for path in files[number::2]:
                tar.add(path, path.relative_to(bucket).as_posix())
    for command in commands_of(FROM_TARS):
        run_as_written(command, folder)
    index = pq.read_table(folder / "from-tars" / "index.parquet", columns=["source"])
    assert index.num_rows and all(".tar#" in source for source in index.column("source").to_pylist())


@pytest.mark.slow
def test_the_journey_on_a_ray_cluster_runs_as_written(
    raw_on_s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray_cluster import LOOPBACK, RayCluster

    for name, value in LOOPBACK.items():  # before Ray is imported
        monkeypatch.setenv(name, value)
    pytest.importorskip("ray")
    with RayCluster(tmp_path / "ray") as cluster:
        cluster.add_node(2)
        for command in commands_of(ON_RAY):
            run_as_written(command.replace(BUCKET, raw_on_s3.bucket).replace(HEAD, cluster.address), tmp_path)


@pytest.mark.slow
def test_the_journey_on_s3_runs_as_written(raw_on_s3: Any, tmp_path: Path) -> None:
    """Only the name of the bucket is another, and the options are those of a server that is here."""
    s3_server = raw_on_s3
    for command in commands_of(ON_S3):
        run_as_written(command.replace(BUCKET, s3_server.bucket), tmp_path)
    code = block_of(ON_S3, "python").replace(BUCKET, s3_server.bucket)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("(4, 3, 16, 64, 64)") == 10
    assert (tmp_path / "shards.html").stat().st_size > 0
    assert (tmp_path / "runs" / "s3" / "checkpoints" / "step_000020.pt").is_file()
    secret = s3_server.secret.encode()
    for path in (p for p in tmp_path.rglob("*") if p.is_file() and p.name != OPTIONS):
        assert secret not in path.read_bytes(), path
