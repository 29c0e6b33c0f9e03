"""Killed while it uploads, or with another job at the same destination: the bytes are those of one undisturbed job."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import s3_jobs
from fault_proxy import FaultProxy
from s3_servers import S3Server

Faulty = Callable[..., FaultProxy]
BIG = ("--profile", "copy", "--clip-seconds", "0", "--workers", "2")


@pytest.fixture(scope="module")
def undisturbed_big(noisy_videos: Path, s3_server: S3Server) -> dict[str, bytes]:
    """The files of a job from kill/raw that nobody kills. Its shard is uploaded in parts."""
    s3_jobs.upload(noisy_videos, s3_server, "kill/raw")
    done = s3_jobs.run(["shard", s3_server.url("kill/raw"), s3_server.url("kill/undisturbed"), *BIG], s3_server)
    assert done.status == 0, done
    return s3_jobs.files_at(s3_server, "kill/undisturbed")


def _kill_group(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)


def _kill_job(process: subprocess.Popen[str]) -> None:
    os.kill(process.pid, signal.SIGKILL)


def _kill_children(process: subprocess.Popen[str]) -> None:
    for child in s3_jobs.descendants(process.pid):
        os.kill(child, signal.SIGKILL)


HELD = {"tar": "partNumber=2", "tar's end": "uploadId=", "commit": "commits/", "dataset": "dataset.json"}


KILLS = {"group": _kill_group, "job": _kill_job, "children": _kill_children}
BOTH = [*((held, kill) for held in ("tar", "commit") for kill in KILLS), ("tar's end", "job"), ("dataset", "group")]


@pytest.mark.parametrize(("held", "killed"), BOTH)
def test_killed_during_an_upload_a_rerun_ends_with_the_same_bytes(
    held: str,
    killed: str,
    undisturbed_big: dict[str, bytes],
    s3_server: S3Server,
    faulty: Faulty,
    tmp_path: Path,
) -> None:
    name, kill = f"kill/{list(HELD).index(held)}-{killed}", KILLS[killed]
    method = "POST" if held == "tar's end" else "PUT"  # the request that joins the parts
    proxy = faulty("stall", share=1, method=method, path=HELD[held])
    args = ["shard", s3_server.url("kill/raw"), s3_server.url(name), *BIG]
    process = s3_jobs.start(args, proxy.s3, hasty=killed == "children", tmpdir=tmp_path)
    proxy.wait_for("stall")
    below = list(s3_jobs.descendants(process.pid))
    kill(process)
    proxy.faults = None
    if killed == "children":  # costs nothing: the job goes on
        done = s3_jobs.end(process)
        assert done.status == 0, done
    else:
        process.communicate()
        s3_jobs.wait_until_gone(below)
        assert bool(s3_jobs.open_uploads(s3_server, name)) == held.startswith("tar")
        assert set(s3_jobs.files_at(s3_server, name)) < {*undisturbed_big, "claim.json"}
        done = s3_jobs.run(args, s3_server, tmpdir=tmp_path)
        assert done.status == 0, done
    assert s3_jobs.files_at(s3_server, name) == undisturbed_big
    assert s3_jobs.open_uploads(s3_server, name) == []
    assert list(tmp_path.iterdir()) == []


# --- two jobs, one destination


@pytest.fixture(scope="module")
def two_sources(nine_videos: Path, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two buckets that have no video in common."""
    paths = sorted(p for p in nine_videos.rglob("*") if p.is_file())
    for i, name in enumerate("ab"):
        folder = tmp_path_factory.mktemp(name)
        for path in paths[i::2]:
            there = folder / path.relative_to(nine_videos)
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, there)
        s3_jobs.upload(folder, s3_server, f"two/{name}")
    return s3_server.url("two/a"), s3_server.url("two/b")


@pytest.fixture(scope="module")
def alone(two_sources: tuple[str, str], s3_server: S3Server) -> list[dict[str, bytes]]:
    """What each of them gives by itself."""
    files = []
    for i, src in enumerate(two_sources):
        assert s3_jobs.shard(src, s3_server.url(f"two/alone-{i}"), s3_server).status == 0
        files.append(s3_jobs.files_at(s3_server, f"two/alone-{i}"))
    assert files[0] != files[1]
    return files


def _start(src: str, dst: str, server: S3Server, *flags: str, hasty: bool = True) -> subprocess.Popen[str]:
    return s3_jobs.start(["shard", src, dst, *s3_jobs.FLAGS, *flags], server, hasty=hasty)


@pytest.mark.parametrize("apart_s", [0.3, 1.2])
def test_of_two_jobs_with_different_sources_one_works_and_the_other_is_told(
    apart_s: float, two_sources: tuple[str, str], alone: list[dict[str, bytes]], s3_server: S3Server
) -> None:
    name = f"two/apart-{apart_s}"
    first = _start(two_sources[0], s3_server.url(name), s3_server)
    time.sleep(apart_s)
    second = _start(two_sources[1], s3_server.url(name), s3_server)
    ended = [s3_jobs.end(first), s3_jobs.end(second)]
    assert sorted(e.status == 0 for e in ended) == [False, True], ended
    works = [e.status for e in ended].index(0)
    assert s3_server.url(name) in ended[1 - works].told
    assert s3_jobs.files_at(s3_server, name) == alone[works]


LISTING = {"method": "GET", "path": "prefix=two/a"}  # of the first of the two sources


def _start_held(faulty: Faulty, src: str, dst: str, **where: str) -> tuple[FaultProxy, Any]:
    """A job that hangs at the first request of this kind, and the proxy that holds it."""
    proxy = faulty("stall", share=1, **where)
    job = _start(src, dst, proxy.s3)
    proxy.wait_for("stall")
    return proxy, job


@pytest.mark.parametrize("at", ["listing", "commit"])
def test_a_second_job_is_told_who_works_there_and_since_when(
    at: str, two_sources: tuple[str, str], alone: list[dict[str, bytes]], s3_server: S3Server, faulty: Faulty
) -> None:
    """However long the first one takes, and wherever it is."""
    name = f"two/held-{at}"
    where = {"listing": LISTING, "commit": {"method": "PUT", "path": "commits/"}}[at]
    proxy, first = _start_held(faulty, two_sources[0], s3_server.url(name), **where)
    second = s3_jobs.end(_start(two_sources[1], s3_server.url(name), s3_server))
    proxy.faults = None
    ended = s3_jobs.end(first)
    assert ended.status == 0, ended
    assert second.status != 0, second
    assert re.search(rf"{s3_server.url(name)}.*since.*--takeover", second.told), second
    assert s3_jobs.files_at(s3_server, name) == alone[0]


def test_a_job_that_another_has_taken_over_stops_and_writes_nothing_more(
    two_sources: tuple[str, str], alone: list[dict[str, bytes]], s3_server: S3Server, faulty: Faulty
) -> None:
    name = "two/taken"
    proxy, first = _start_held(faulty, two_sources[0], s3_server.url(name), **LISTING)
    second = s3_jobs.end(_start(two_sources[1], s3_server.url(name), s3_server, "--takeover"))
    proxy.faults = None
    ended = s3_jobs.end(first)
    assert second.status == 0, second
    assert ended.status != 0, ended
    assert s3_server.url(name) in ended.told
    assert s3_jobs.files_at(s3_server, name) == alone[1]


def test_a_claim_of_a_killed_job_stops_nobody(
    two_sources: tuple[str, str], alone: list[dict[str, bytes]], s3_server: S3Server, faulty: Faulty
) -> None:
    name = "two/killed"
    _, first = _start_held(faulty, two_sources[0], s3_server.url(name), **LISTING)
    _kill_job(first)
    first.communicate()
    assert list(s3_jobs.files_at(s3_server, name)) == ["claim.json"]
    second = s3_jobs.end(_start(two_sources[1], s3_server.url(name), s3_server))
    assert second.status == 0, second
    assert s3_jobs.files_at(s3_server, name) == alone[1]


def test_the_same_command_twice_at_once_ends_with_the_same_bytes(undisturbed: Any, s3_server: S3Server) -> None:
    name = "two/same"
    jobs = [_start(undisturbed.src, s3_server.url(name), s3_server) for _ in range(2)]
    ended = [s3_jobs.end(job) for job in jobs]
    assert any(e.status == 0 for e in ended), ended
    assert all(e.status == 0 or s3_server.url(name) in e.told for e in ended), ended
    assert s3_jobs.files_at(s3_server, name) == undisturbed.files
