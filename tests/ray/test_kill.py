"""Workers, nodes and drivers killed at any moment: afterwards the bytes are those of a job that nobody disturbed."""

from __future__ import annotations

import ipaddress
import os
import random
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3_jobs
from fault_proxy import wait_until
from ray_cluster import LOOPBACK, HeldFfmpeg, RayCluster, command, kill

from reelmae.pipeline import schema

AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # Ray's own, end a minute after it was killed
Start = Callable[..., Any]


def _commits(dst: Path) -> int:
    return len(list(dst.glob("commits/*.parquet")))


def test_workers_killed_in_the_middle_of_their_tasks(
    cluster: RayCluster, ffmpeg: HeldFfmpeg, start: Start, bucket: Path, plain: Any, tmp_path: Path
) -> None:
    """Two that surely are within a source, then some at random."""
    draw, killed = random.Random(0), 0
    with ffmpeg.hold():
        job = start(bucket, tmp_path / "dst", cluster.address)
        kill(*ffmpeg.wait_for(2, job))
    while job.poll() is None:
        time.sleep(draw.uniform(0.5, 2))
        for pid in cluster.workers()[:1]:
            if killed < 3:
                kill(pid)
                killed += 1
    done = s3_jobs.end(job)
    assert done.status == 0, done
    assert s3_jobs.files_in(tmp_path / "dst") == plain.files


def test_a_node_killed_while_it_works(
    cluster: RayCluster, ffmpeg: HeldFfmpeg, start: Start, bucket: Path, plain: Any, tmp_path: Path
) -> None:
    node = cluster.add_node()
    try:
        with ffmpeg.hold():
            job = start(bucket, tmp_path / "dst", cluster.address)
            ffmpeg.wait_for(3, job)
            workers = node.workers()
            assert set(workers) & set(ffmpeg.held())
            cluster.kill(node)
            s3_jobs.wait_until_gone(workers)
    finally:
        cluster.kill(node)
    done = s3_jobs.end(job)
    assert done.status == 0, done
    assert s3_jobs.files_in(tmp_path / "dst") == plain.files


def test_a_node_that_joins_works_and_one_that_leaves_takes_nothing_along(
    own_cluster: RayCluster, ffmpeg: HeldFfmpeg, start: Start, bucket: Path, plain: Any, tmp_path: Path
) -> None:
    """One node begins, another takes its place while the job runs."""
    first = own_cluster.add_node()
    with ffmpeg.hold():
        job = start(bucket, tmp_path / "dst", own_cluster.address)
        ffmpeg.wait_for(1, job)
        second = own_cluster.add_node()
        held = ffmpeg.wait_for(2, job)
        assert {len(set(node.workers()) & set(held)) for node in (first, second)} == {1}  # no node does two at a time
        own_cluster.kill(first)
        wait_until(lambda: not set(first.workers()) & set(ffmpeg.held()), what="the first one's encodes end")
    done = s3_jobs.end(job)
    assert done.status == 0, done
    assert s3_jobs.files_in(tmp_path / "dst") == plain.files


def test_the_driver_killed_and_the_same_command_again(
    cluster: RayCluster, ffmpeg: HeldFfmpeg, start: Start, bucket: Path, plain: Any, tmp_path: Path
) -> None:
    """Ray ends what ran for it. The claim of the dead driver stops nobody on the same machine."""
    dst = tmp_path / "dst"
    job = start(bucket, dst, cluster.address)
    wait_until(lambda: _commits(dst), seconds=180, what="a commit")
    with ffmpeg.hold():
        held = ffmpeg.wait_for(1, job)
        kill(job.pid)
        job.communicate()
        s3_jobs.wait_until_gone(held)
        assert (dst / "claim.json").exists()
        before = {path: path.stat().st_mtime_ns for path in dst.glob("commits/*.parquet")}
    assert before
    assert not (dst / schema.DATASET_JSON).exists()
    done = s3_jobs.end(start(bucket, dst, cluster.address))
    assert done.status == 0, done
    assert s3_jobs.files_in(dst) == plain.files
    assert {path: path.stat().st_mtime_ns for path in before} == before  # what was done is not done again
    assert list((tmp_path / "driver").iterdir()) == []


def test_a_driver_that_lives_is_taken_over_only_when_told(
    cluster: RayCluster, ffmpeg: HeldFfmpeg, start: Start, bucket: Path, plain: Any, tmp_path: Path
) -> None:
    dst = tmp_path / "dst"
    with ffmpeg.hold():
        first = start(bucket, dst, cluster.address)
        ffmpeg.wait_for(1, first)
        refused = s3_jobs.end(start(bucket, dst, cluster.address))
        assert refused.status == 1, refused
        assert "--takeover" in refused.told
        second = start(bucket, dst, cluster.address, "--takeover")
        wait_until(
            lambda: str(second.pid) in (dst / "claim.json").read_text(),
            seconds=180,
            what="the second one holds the claim",
        )
    ended = s3_jobs.end(first)
    assert ended.status == 1, ended
    assert "taken over" in ended.told or "took it over" in ended.told
    done = s3_jobs.end(second)
    assert done.status == 0, done
    assert s3_jobs.files_in(dst) == plain.files


def test_ctrl_c(
    cluster: RayCluster, ffmpeg: HeldFfmpeg, start: Start, bucket: Path, plain: Any, tmp_path: Path
) -> None:
    dst = tmp_path / "dst"
    with ffmpeg.hold():
        job = start(bucket, dst, cluster.address)
        held = ffmpeg.wait_for(2, job)
        os.killpg(job.pid, signal.SIGINT)
        done = s3_jobs.end(job)
        assert done.status == 130, done
        assert done.told == "reelmae: interrupted; run the same command again to resume"
        assert ffmpeg.held() == []
    wait_until(lambda: cluster.workers() == [], what="no task runs")
    s3_jobs.wait_until_gone(held)
    assert not (dst / "claim.json").exists()
    done = s3_jobs.end(start(bucket, dst, cluster.address))
    assert done.status == 0, done
    assert s3_jobs.files_in(dst) == plain.files


def test_a_source_that_kills_its_worker_costs_its_own_row(
    cluster: RayCluster, ffmpeg: HeldFfmpeg, start: Start, bucket: Path, plain: Any, tmp_path: Path
) -> None:
    dst = tmp_path / "dst"
    poison = sorted(path for path in bucket.rglob("*") if path.stat().st_size > 1000 and path.is_file())[4]
    ffmpeg.poison(poison)
    try:
        done = s3_jobs.end(start(bucket, dst, cluster.address))
    finally:
        ffmpeg.poison(None)
    assert done.status == 0, done
    rejects = {row["source"]: row for row in pq.read_table(dst / schema.REJECTS_FILE).to_pylist()}
    (mine,) = (row for source, row in rejects.items() if source.endswith(poison.name))
    assert mine["reason"] == "crashed"
    assert re.search(r"5 workers died", mine["detail"]), mine
    assert set(rejects) - {mine["source"]} == set(_column(plain.files[schema.REJECTS_FILE], "source"))
    wanted = {clip for clip in _clips(plain.files[schema.INDEX]) if clip[0] != mine["source"]}
    assert _clips((dst / schema.INDEX).read_bytes()) == wanted


def _clips(index: bytes) -> set[tuple[str, str]]:
    return set(zip(_column(index, "source"), _column(index, "sha256"), strict=True))


def _column(data: bytes, name: str) -> list[Any]:
    return pq.read_table(pa.BufferReader(data), columns=[name]).column(name).to_pylist()


# --- no cluster: a Ray of this machine alone


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_ray_of_this_machine_ends_with_its_driver(
    how: signal.Signals,
    ffmpeg: HeldFfmpeg,
    start: Start,
    bucket: Path,
    plain: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It listens on loopback only. Killed or interrupted, nothing of it works on, and the same command resumes."""
    for name in LOOPBACK:  # the runner sets them itself
        monkeypatch.delenv(name)
    dst = tmp_path / "dst"
    with ffmpeg.hold():
        job = start(bucket, dst, None, "--workers", "2")
        ffmpeg.wait_for(2, job)
        below = list(s3_jobs.descendants(job.pid))
        assert any("raylet/raylet" in command(pid) for pid in below)
        assert [place for place in _listening(below) if not place.is_loopback] == []
        if how == signal.SIGINT:
            os.killpg(job.pid, how)
            assert s3_jobs.end(job).status == 130
        else:
            below = [pid for pid in below if not command(pid).startswith(AGENTS)]
            kill(job.pid)
            job.communicate()
        s3_jobs.wait_until_gone(below)
    if how == signal.SIGKILL:
        return
    done = s3_jobs.end(start(bucket, dst, None, "--workers", "2", "--json"))
    assert done.status == 0, done
    assert s3_jobs.files_in(dst) == plain.files
    assert list((tmp_path / "driver").iterdir()) == []


def _listening(pids: list[int]) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """The addresses of all TCP sockets on which one of these processes listens."""
    sockets = set()
    for pid in pids:
        with suppress(OSError):
            sockets |= {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                host = fields[1].partition(":")[0]
                words = [bytes.fromhex(host[i : i + 8])[::-1] for i in range(0, len(host), 8)]
                address = ipaddress.ip_address(b"".join(words))
                found.append(getattr(address, "ipv4_mapped", None) or address)
    assert found
    return found
