"""A job on a cluster from a bucket to a bucket of a real S3 server, and what is killed while it uploads."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import s3_jobs
from fault_proxy import FaultProxy
from ray_cluster import FLAGS, HeldFfmpeg, RayCluster, kill
from s3_servers import S3Server
from watched import SECRET, watch

Faulty = Callable[..., FaultProxy]
Options = Callable[..., list[str]]
BIG = ("--profile", "copy", "--clip-seconds", "0")  # one task


@pytest.fixture(scope="module")
def nodes(ffmpeg: HeldFfmpeg, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """A cluster with one node; who kills it starts another."""
    with RayCluster(tmp_path_factory.mktemp("nodes"), environment=ffmpeg.environment()) as cluster:
        cluster.add_node()
        yield cluster


@pytest.fixture(scope="module")
def small(bucket: Path, s3_server: S3Server) -> dict[str, bytes]:
    """The files of a local job from small/raw that nobody disturbs."""
    s3_jobs.upload(bucket, s3_server, "small/raw")
    done = s3_jobs.run(["shard", s3_server.url("small/raw"), s3_server.url("small/plain"), *FLAGS], s3_server)
    assert done.status == 0, done
    return s3_jobs.files_at(s3_server, "small/plain")


@pytest.fixture(scope="module")
def big(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The same from big/raw. Its only shard is uploaded in parts."""
    folder = tmp_path_factory.mktemp("noisy") / "raw"
    s3_jobs.write_noisy_videos(folder)
    s3_jobs.upload(folder, s3_server, "big/raw")
    done = s3_jobs.run(["shard", s3_server.url("big/raw"), s3_server.url("big/plain"), *BIG], s3_server)
    assert done.status == 0, done
    return s3_jobs.files_at(s3_server, "big/plain")


def test_the_same_bytes_and_no_key_anywhere(
    nodes: RayCluster,
    small: dict[str, bytes],
    start: Callable[..., Any],
    options: Options,
    s3_server: S3Server,
    tmp_path: Path,
) -> None:
    """Keys that are given as options reach the workers, and no file, log, command line or environment on the way."""
    job = start(s3_server.url("small/raw"), s3_server.url("small/ray"), nodes.address, *options())
    with watch(job.pid, *nodes.raylets()) as watched:
        done = s3_jobs.end(job)
    assert done.status == 0, done
    assert s3_jobs.files_at(s3_server, "small/ray") == small
    assert any(command.startswith(b"ray::run_task") for command in watched.commands)
    assert any(program.startswith("ffmpeg") for program in watched.programs())
    assert watched.with_secret() == []
    assert SECRET.decode() not in done.out + done.err
    logs = [path for path in nodes.session.rglob("*") if path.is_file()]
    assert any(path.name.startswith("worker-") and path.suffix == ".err" for path in logs)
    below = (Path(root, name) for root, _, names in os.walk(nodes.tmp) for name in names)
    temporary = [path for path in below if path.is_file()]
    assert [path for path in [*logs, *temporary] if SECRET in _read(path)] == []


def _read(path: Path) -> bytes:
    """What a file holds; nothing where it has gone: workers that end remove theirs."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def test_a_node_whose_store_fails_says_so_at_the_driver(
    nodes: RayCluster,
    small: dict[str, bytes],
    start: Callable[..., Any],
    options: Options,
    s3_server: S3Server,
    faulty: Faulty,
) -> None:
    """With its name; and the retries are counted."""
    proxy = faulty("503", share=1, method="PUT", path="shards/")
    job = start(s3_server.url("small/raw"), s3_server.url("small/away"), nodes.address, *options(proxy.s3))
    told = next((line for line in job.stderr if "waiting for" in line), "")
    proxy.faults = None
    done = s3_jobs.end(job)
    assert done.status == 0, done
    assert told.startswith(f"reelmae: {socket.gethostname()}: waiting for {s3_server.url('small/away')}"), told
    assert "retries:" in done.out, done
    assert s3_jobs.files_at(s3_server, "small/away") == small


HELD = {"tar": "partNumber=2", "commit": "commits/"}


@pytest.mark.parametrize(
    ("held", "killed"), [("tar", "worker"), ("tar", "driver"), ("commit", "node"), ("commit", "driver")]
)
def test_killed_during_an_upload(
    held: str,
    killed: str,
    nodes: RayCluster,
    big: dict[str, bytes],
    start: Callable[..., Any],
    options: Options,
    s3_server: S3Server,
    faulty: Faulty,
) -> None:
    name = f"big/{held}-{killed}"
    proxy = faulty("stall", share=1, method="PUT", path=HELD[held])
    args = (s3_server.url("big/raw"), s3_server.url(name), nodes.address)
    job = start(*args, *options(proxy.s3), config=BIG)
    proxy.wait_for("stall", seconds=180)
    workers = nodes.workers()
    assert workers
    if killed == "driver":
        kill(job.pid)
        job.communicate()
        s3_jobs.wait_until_gone(workers)
        proxy.faults = None
        assert set(s3_jobs.files_at(s3_server, name)) < {*big, "claim.json"}
        job = start(*args, *options(), config=BIG)
    elif killed == "node":
        other = next(node for node in nodes.nodes() if node.workers())
        nodes.kill(other)
        s3_jobs.wait_until_gone(workers)
        proxy.faults = None
        nodes.add_node()
    else:
        kill(*workers)
        proxy.faults = None
    done = s3_jobs.end(job)
    assert done.status == 0, done
    assert s3_jobs.files_at(s3_server, name) == big
    assert s3_jobs.open_uploads(s3_server, name) == []
