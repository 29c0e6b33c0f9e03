"""What cannot work is refused in one line that names the node and the remedy, before any task runs."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import s3_jobs
from ray_cluster import HeldFfmpeg, Node, RayCluster

from reelmae.pipeline.ingest.ffmpeg import find_ffmpeg
from reelmae.tools.bench.seaweed import free_ports

Run = Callable[..., s3_jobs.Ended]
WITHOUT_RAY = "import sys\nsys.modules['ray'] = None\nfrom reelmae.tools.cli import main\nsys.exit(main())"
HASTY = "import sys\nimport reelmae.pipeline.runners.ray_join as join\njoin.JOIN_S = 6\n"
HASTY += "from reelmae.tools.cli import main\nsys.exit(main())"


@pytest.fixture(scope="module")
def bare(ffmpeg: HeldFfmpeg, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """A head without cores. Who adds a node takes it away again."""
    with RayCluster(tmp_path_factory.mktemp("bare"), environment=ffmpeg.environment()) as cluster:
        yield cluster


def _refused(done: s3_jobs.Ended, status: int, *words: str) -> None:
    """It failed so, and said all of this in its only line."""
    assert done.status == status, done
    assert [line for line in done.err.splitlines() if not line.startswith("{")] == [done.told]
    assert done.out == ""
    for word in words:
        assert word in done.told, done


def test_no_ray(run: Run, bucket: Path, tmp_path: Path) -> None:
    done = run(bucket, tmp_path / "dst", None, program=WITHOUT_RAY)
    _refused(done, 2, "--runner ray", "pip install 'reelmae[ray]'")
    assert not (tmp_path / "dst").exists()


def test_nothing_listens(run: Run, bucket: Path, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_ports(1)}"
    for given in (address, f"ray://{address}"):
        _refused(run(bucket, tmp_path / "dst", given), 1, address, "check the address")
        assert not (tmp_path / "dst").exists()


def test_something_else_listens(run: Run, bucket: Path, tmp_path: Path) -> None:
    """One that greets and hangs up."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:

        def greet() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        try:
            address = f"127.0.0.1:{server.getsockname()[1]}"
            done = run(bucket, tmp_path / "dst", address, program=HASTY)
            _refused(done, 1, address, "check the address")
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:99999", "[::1", "ray://"])
def test_an_address_that_is_none(address: str, run: Run, bucket: Path, tmp_path: Path) -> None:
    done = run(bucket, tmp_path / "dst", address)
    _refused(done, 2, "--ray-address", address, "HOST:PORT")
    assert not (tmp_path / "dst").exists()


def test_an_address_without_the_runner(bucket: Path, tmp_path: Path) -> None:
    args = ["shard", str(bucket), str(tmp_path / "dst"), "--ray-address", "127.0.0.1:6379"]
    _refused(s3_jobs.run(args, None), 2, "--ray-address 127.0.0.1:6379", "--runner ray")


def test_a_cluster_without_what_a_task_needs(bare: RayCluster, run: Run, bucket: Path, tmp_path: Path) -> None:
    done = run(bucket, tmp_path / "dst", bare.address)
    _refused(done, 1, bare.address, "a task needs (1 cores, 1.0 GiB)", socket.gethostname(), "0 cores")
    assert not (tmp_path / "dst").exists()


def _refused_for_node(
    cluster: RayCluster, node: Node, run: Run, bucket: Path, dst: Path, *words: str, status: int = 1, **how: Path
) -> None:
    try:
        done = run(bucket, dst, cluster.address, **how)
    finally:
        cluster.kill(node)
    _refused(done, status, f"node {socket.gethostname()} (127.0.0.1, {node.shown})", *words)
    assert list(dst.glob("commits/*")) + list(dst.glob("shards/*")) == []
    assert not (dst / "claim.json").exists()


def test_a_node_with_another_ffmpeg(bare: RayCluster, run: Run, bucket: Path, tmp_path: Path) -> None:
    other = tmp_path / "ffmpeg"
    old = 'case "$*" in *-version*) echo "ffmpeg version 3.1 of a museum"; exit ;; esac'
    other.write_text(f'#!/bin/sh\n{old}\nexec "{find_ffmpeg().path}" "$@"\n')
    other.chmod(0o755)
    node = bare.add_node(environment={"REELMAE_FFMPEG": str(other)})
    words = ("'ffmpeg version 3.1 of a museum' there", f"{find_ffmpeg().version!r} here", "install the same")
    _refused_for_node(bare, node, run, bucket, tmp_path / "dst", *words, status=2)
    assert not (tmp_path / "dst").exists()


def test_a_node_with_another_version_of_ours(bare: RayCluster, run: Run, bucket: Path, tmp_path: Path) -> None:
    facts = tmp_path / "old" / "reelmae-0.0.1.dist-info" / "METADATA"
    facts.parent.mkdir(parents=True)
    facts.write_text("Metadata-Version: 2.1\nName: reelmae\nVersion: 0.0.1\n")
    node = bare.add_node(environment={"PYTHONPATH": str(tmp_path / "old")})
    words = ("has reelmae 0.0.1", "install the same")
    # elsewhere: the driver's folder is searched first by its workers, and there may lie a checkout
    _refused_for_node(bare, node, run, bucket, tmp_path / "dst", *words, status=2, cwd=tmp_path)
    assert not (tmp_path / "dst").exists()


def test_a_node_without_reelmae(bare: RayCluster, run: Run, bucket: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken" / "reelmae" / "__init__.py"
    broken.parent.mkdir(parents=True)
    broken.write_text("raise ModuleNotFoundError('No module named reelmae')\n")
    node = bare.add_node(environment={"PYTHONPATH": str(tmp_path / "broken")})
    words = ("cannot run reelmae", "No module named reelmae", "install reelmae[ray]")
    _refused_for_node(bare, node, run, bucket, tmp_path / "dst", *words)
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("unseen", ["sources", "dataset"])
def test_a_node_that_does_not_see(unseen: str, bare: RayCluster, run: Run, bucket: Path, tmp_path: Path) -> None:
    """Its file system is another there, as on a machine that has not mounted the share."""
    (tmp_path / "share").mkdir()
    dst = tmp_path / "share" / "dst"
    node = bare.add_node_without(bucket if unseen == "sources" else tmp_path / "share")
    words = {"sources": ("does not see", "give a SRC that all nodes share")}
    words |= {"dataset": (str(dst), "give a DST that all nodes share")}
    _refused_for_node(bare, node, run, bucket, dst, *words[unseen])


def test_the_refused_job_goes_on_when_the_node_is_gone(
    bare: RayCluster, run: Run, bucket: Path, plain: object, tmp_path: Path
) -> None:
    dst = tmp_path / "dst"
    node = bare.add_node_without(bucket)
    _refused_for_node(bare, node, run, bucket, dst, "does not see")
    good = bare.add_node()
    try:
        done = run(bucket, dst, bare.address)
    finally:
        bare.kill(good)
    assert done.status == 0, done
    assert s3_jobs.files_in(dst) == plain.files  # type: ignore[attr-defined]
