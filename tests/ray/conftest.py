"""A cluster that tests share, a bucket, and what a local job that nobody disturbs makes of it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import s3_jobs
from ray_cluster import FLAGS, LOOPBACK, HeldFfmpeg, RayCluster
from s3_servers import S3Server, put_environment, restore_environment

from reelmae.tools.synth.bucket import make_bucket


@pytest.fixture(scope="session", autouse=True)
def loopback() -> Iterator[None]:
    """Ray listens on loopback only and reports nothing."""
    pytest.importorskip("ray", reason="Ray is not installed (pip install 'reelmae[ray]')")
    before = put_environment(LOOPBACK)
    yield
    restore_environment(before)


@pytest.fixture(scope="session")
def ffmpeg(tmp_path_factory: pytest.TempPathFactory) -> HeldFfmpeg:
    """The ffmpeg of all nodes, and of the drivers that `Driver` starts."""
    return HeldFfmpeg(tmp_path_factory.mktemp("ffmpeg"))


@pytest.fixture
def own_cluster(ffmpeg: HeldFfmpeg, tmp_path: Path) -> Iterator[RayCluster]:
    """A cluster of one test, with no node yet but its head, which has no cores."""
    with RayCluster(tmp_path / "cluster", environment=ffmpeg.environment()) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def cluster(ffmpeg: HeldFfmpeg, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """A head and two nodes of one core each. Who adds a node takes it away again."""
    with RayCluster(tmp_path_factory.mktemp("cluster"), environment=ffmpeg.environment(), client=True) as cluster:
        cluster.add_node()
        cluster.add_node()
        yield cluster


@pytest.fixture(scope="session")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten small videos and two files that are none."""
    folder = tmp_path_factory.mktemp("ten") / "raw"
    make_bucket(folder, videos=10, broken=2, seconds=1.0, seed=3)
    return folder


@dataclass(frozen=True)
class Plain:
    """A job on local workers that nobody disturbed."""

    ended: s3_jobs.Ended
    files: Mapping[str, bytes]


@pytest.fixture(scope="session")
def plain(bucket: Path, tmp_path_factory: pytest.TempPathFactory) -> Plain:
    """Of `bucket`."""
    dst = tmp_path_factory.mktemp("plain") / "dst"
    done = s3_jobs.run(["shard", str(bucket), str(dst), *FLAGS, "--json"], None)
    assert done.status == 0, done
    files = s3_jobs.files_in(dst)
    assert s3_jobs.facts(files)["sources_kept"] == 10
    return Plain(done, files)


@pytest.fixture
def start(ffmpeg: HeldFfmpeg, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """start(src, dst, address, *flags, config=FLAGS, **how) → the process of `reelmae shard SRC DST --runner ray`."""
    monkeypatch.setenv("REELMAE_FFMPEG", str(ffmpeg.path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    started: list[subprocess.Popen[str]] = []

    def start(
        src: object, dst: object, address: str | None, *flags: str, config: Sequence[str] = FLAGS, **how: Any
    ) -> subprocess.Popen[str]:
        where = ["--runner", "ray", *(["--ray-address", address] if address else [])]
        args = ["shard", str(src), str(dst), *config, *where, *flags]
        (tmp_path / "driver").mkdir(exist_ok=True)
        started.append(s3_jobs.start(args, None, tmpdir=tmp_path / "driver", **how))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.fixture
def run(start: Callable[..., Any]) -> Callable[..., s3_jobs.Ended]:
    """run(src, dst, address, *flags, **how) → that process, ended."""
    return lambda *args, **how: s3_jobs.end(start(*args, **how))


@pytest.fixture
def options(s3_server: S3Server, tmp_path: Path) -> Callable[..., list[str]]:
    """options(server=s3_server) → flags that give SRC's and DST's storage options in a file."""

    def flags(server: S3Server = s3_server) -> list[str]:
        path = tmp_path / "options.json"
        path.write_text(json.dumps(server.options()))
        return ["--src-storage-options", f"@{path}", "--dst-storage-options", f"@{path}"]

    return flags
