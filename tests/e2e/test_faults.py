"""Whatever fails between us and the store, the bytes and batches are those of an undisturbed run, or one line says why not.

The faults are made by a proxy (tests/servers/fault_proxy.py) in front of a real S3 server. Pauses and deadlines are
shortened where a test would only wait; nothing else is.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import s3_jobs
from fault_proxy import PASSING, FaultProxy, Faults
from s3_servers import S3Server

from reelmae.pipeline.errors import StorageError
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.loading.loader import ClipLoader
from reelmae.tools.bench.seaweed import free_ports

Faulty = Callable[..., FaultProxy]
KINDS = [(kind,) for kind in (*PASSING, "wrong_etag")]
ALL = [PASSING]
# what the summary says of them; an ETag counts for nothing where the server tells a checksum
RETRIES = {"503": r"retries:\s.*SlowDown", "stall": r"retries:\s.*timed out", "wrong_etag": ""}
READS = [("500",), ("503",), ("reset",), ("stall",), ("truncate",), ("flip",), PASSING]


def _name(kinds: tuple[str, ...]) -> str:
    return kinds[0] if len(kinds) == 1 else "all"


# --- one request in ten fails


@pytest.mark.parametrize("kinds", KINDS + ALL, ids=_name)
def test_sharding_through_faults_writes_the_same_bytes(
    kinds: tuple[str, ...], undisturbed: Any, s3_server: S3Server, faulty: Faulty
) -> None:
    dst = f"faults/shard-{_name(kinds)}"
    proxy = faulty(*kinds)
    done = s3_jobs.shard(undisturbed.src, s3_server.url(dst), proxy.s3)
    assert done.status == 0, done
    assert set(proxy.counts) <= set(kinds) and 2 * len(proxy.counts) >= len(kinds), proxy.counts
    assert s3_jobs.files_at(s3_server, dst) == undisturbed.files
    assert re.search(RETRIES.get(kinds[0], "retries:"), done.out), done


@pytest.mark.parametrize("kinds", READS, ids=_name)
def test_loading_through_faults_plays_the_same_batches(
    kinds: tuple[str, ...], undisturbed: Any, faulty: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_jobs.make_hasty(monkeypatch)
    proxy = faulty(*kinds)
    assert s3_jobs.same(s3_jobs.read(undisturbed.dst, proxy.s3), undisturbed.batches)
    assert proxy.counts, proxy.requests


@pytest.mark.parametrize("kinds", [("flip",), PASSING], ids=_name)
def test_loading_into_a_cache_through_faults_plays_the_same_batches(
    kinds: tuple[str, ...], undisturbed: Any, faulty: Faulty, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    s3_jobs.make_hasty(monkeypatch)
    proxy = faulty(*kinds)
    assert s3_jobs.same(s3_jobs.read(undisturbed.dst, proxy.s3, cache=tmp_path / "cache"), undisturbed.batches)
    assert proxy.counts, proxy.requests


def test_verify_through_flipped_bytes_raises_no_false_alarm(undisturbed: Any, faulty: Faulty) -> None:
    proxy = faulty("flip")
    done = s3_jobs.run(["verify", undisturbed.dst, "--deep"], proxy.s3)
    assert done.status == 0, done
    assert proxy.counts.total() > 1


def test_flipped_bytes_of_sources_that_have_no_checksum_make_no_wrong_clips(
    nine_videos: Path, undisturbed: Any, s3_server: S3Server, faulty: Faulty
) -> None:
    """Their ETag, which is the MD5, is all that there is."""
    s3_jobs.upload(nine_videos, s3_server, "faults/bare", checksums=False)
    clean, dst = "faults/bare-clean", "faults/bare-flipped"
    src = s3_server.url("faults/bare")
    assert s3_jobs.shard(src, s3_server.url(clean), s3_server).status == 0
    proxy = faulty("flip", share=0.34, path="faults/bare/")
    done = s3_jobs.shard(src, s3_server.url(dst), proxy.s3)
    assert done.status == 0, done
    assert proxy.counts["flip"] >= 2
    assert s3_jobs.files_at(s3_server, dst) == s3_jobs.files_at(s3_server, clean)


@pytest.mark.parametrize("kind", ["expired", "skew"])
def test_refusals_that_pass_cost_no_video(kind: str, undisturbed: Any, s3_server: S3Server, faulty: Faulty) -> None:
    """Half of the fetches: a token that is renewed late, a clock that is being set."""
    dst = f"faults/{kind}"
    proxy = faulty(kind, share=0.5, method="GET", path="/nine/raw/")
    done = s3_jobs.shard(undisturbed.src, s3_server.url(dst), proxy.s3)
    assert done.status == 0, done
    assert proxy.counts[kind] > 5
    assert s3_jobs.files_at(s3_server, dst) == undisturbed.files


# --- a store is away


AWAY_S = 4.0


def test_a_source_bucket_that_is_away_for_a_while_loses_no_video(
    undisturbed: Any, s3_server: S3Server, faulty: Faulty
) -> None:
    """Once it has been listed; the destination answers all the time."""
    dst = "faults/src-away"
    proxy = faulty("reset", share=1, path="/nine/raw/")
    process = s3_jobs.start(["shard", undisturbed.src, s3_server.url(dst), *s3_jobs.FLAGS], proxy.s3)
    proxy.wait_for("reset")
    time.sleep(AWAY_S)
    proxy.faults = None
    done = s3_jobs.end(process)
    assert done.status == 0, done
    assert s3_jobs.files_at(s3_server, dst) == undisturbed.files
    assert re.search(rf"waiting for {undisturbed.src}\S* since \d\d:\d\d:\d\d: connection re(set|fused)", done.err), (
        done
    )
    assert "answers again after" in done.err, done


def test_a_source_bucket_reached_by_its_own_options_may_be_away_too(
    undisturbed: Any, s3_server: S3Server, faulty: Faulty, tmp_path: Path
) -> None:
    """Two endpoints with their own keys; the source's is down when the job has fetched its first video."""
    dst = "faults/src-down"
    proxy = faulty("stall", share=1, path="nine/raw/", most=1)
    flags = ["--src-storage-options", _options(tmp_path / "src", proxy.s3)]
    flags += ["--dst-storage-options", _options(tmp_path / "dst", s3_server)]
    process = s3_jobs.start(["shard", undisturbed.src, s3_server.url(dst), *s3_jobs.FLAGS, *flags], None)
    proxy.wait_for_requests(3, path="nine/raw/", method="GET")
    proxy.down()
    time.sleep(AWAY_S)
    proxy.up()
    done = s3_jobs.end(process)
    assert done.status == 0, done
    assert s3_jobs.files_at(s3_server, dst) == undisturbed.files
    assert "waiting for" in done.err, done


def _options(path: Path, server: S3Server) -> str:
    path.write_text(json.dumps(server.options()))
    return f"@{path}"


@pytest.mark.parametrize("which", ["src", "both"])
def test_a_store_away_for_longer_than_the_patience_is_one_line_and_a_rerun_completes(
    which: str, undisturbed: Any, s3_server: S3Server, faulty: Faulty
) -> None:
    dst = f"faults/impatient-{which}"
    proxy = faulty()
    args = ["shard", undisturbed.src, s3_server.url(dst), *s3_jobs.FLAGS]
    proxy.faults = Faults(("reset",), share=1, path="nine/raw/")
    process = s3_jobs.start([*args, "--patience", "0.05"], proxy.s3)
    proxy.wait_for("reset")
    if which == "both":
        proxy.down()
    done = s3_jobs.end(process)
    assert done.status == 1, done
    assert re.search(rf"{undisturbed.src}.*connection re(set|fused)", done.told), done
    assert not any("commits/" in name for name in s3_jobs.files_at(s3_server, dst))
    proxy.faults = None
    if which == "both":
        proxy.up()
    again = s3_jobs.run(args, proxy.s3)
    assert again.status == 0, again
    assert s3_jobs.files_at(s3_server, dst) == undisturbed.files


def test_a_loader_waits_for_a_store_that_comes_back(
    undisturbed: Any, faulty: Faulty, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = faulty()
    index = ClipIndex.open(undisturbed.dst, access=proxy.s3.access())
    with ClipLoader(index, s3_jobs.LOADER) as loader:
        batches = iter(loader)
        first = [next(batches)]
        proxy.down()
        again = threading.Timer(AWAY_S, proxy.up)
        again.start()
        rest = list(islice(batches, s3_jobs.BATCHES - 1))
        again.join()
        assert not loader.stats.bad
    assert s3_jobs.same(first + rest, undisturbed.batches)
    assert any("waiting for" in r.getMessage() and r.levelno == logging.WARNING for r in caplog.records)


def test_a_loader_ends_with_one_line_when_its_patience_ends(undisturbed: Any, faulty: Faulty) -> None:
    proxy = faulty()
    index = ClipIndex.open(undisturbed.dst, access=proxy.s3.access(patience_s=2))
    with ClipLoader(index, s3_jobs.LOADER) as loader:
        batches = iter(loader)
        next(batches)
        proxy.down()
        with pytest.raises(StorageError, match=rf"{undisturbed.dst}.*connection refused") as raised:
            list(islice(batches, 100))
    assert "\n" not in str(raised.value)


def _losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_pretraining_waits_for_a_store_that_comes_back(
    undisturbed: Any, s3_server: S3Server, faulty: Faulty, tmp_path: Path
) -> None:
    proxy = faulty("stall", share=1, path="/shards/0")  # no clip comes before the store goes away
    small = ["run.steps=4", "run.log_every=1", "model.depth=1", "model.decoder_depth=1", "loader.batch_videos=2"]
    args = ["pretrain", "demo", f"data.url={undisturbed.dst}", "loader.workers=1", "loader.prefetch=1", *small]
    other = s3_jobs.start([*args, f"run.out={tmp_path / 'undisturbed'}"], s3_server)
    process = s3_jobs.start([*args, f"run.out={tmp_path / 'run'}"], proxy.s3)
    proxy.wait_for("stall")
    proxy.down()
    proxy.faults = None
    time.sleep(AWAY_S)
    proxy.up()
    done = s3_jobs.end(process)
    assert done.status == 0, done
    assert s3_jobs.end(other).status == 0
    assert "waiting for" in done.err, done
    assert _losses(tmp_path / "run") == _losses(tmp_path / "undisturbed")


# --- a server that accepts and never answers


def test_a_job_tells_that_a_server_never_answers_and_ends(
    undisturbed: Any, s3_server: S3Server, faulty: Faulty
) -> None:
    proxy = faulty("stall", share=1)
    args = ["shard", undisturbed.src, s3_server.url("faults/never"), *s3_jobs.FLAGS, "--patience", "0.05"]
    done = s3_jobs.run(args, proxy.s3)
    assert done.status == 1, done
    assert re.search(r"waiting for s3://\S+ since \d\d:\d\d:\d\d: timed out", done.err), done
    assert "timed out" in done.told


def test_a_loader_tells_that_a_server_never_answers_and_ends(
    undisturbed: Any, faulty: Faulty, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    s3_jobs.make_hasty(monkeypatch)
    proxy = faulty()
    index = ClipIndex.open(undisturbed.dst, access=proxy.s3.access(patience_s=2))
    with ClipLoader(index, s3_jobs.LOADER.model_copy(update={"workers": 0})) as loader:
        batches = iter(loader)
        next(batches)
        proxy.faults = Faults(("stall",), share=1)
        with pytest.raises(StorageError, match="timed out"):
            list(islice(batches, 100))
    assert any("waiting for" in r.getMessage() for r in caplog.records)


def test_a_loader_that_waits_for_a_dead_server_can_be_closed(undisturbed: Any, faulty: Faulty) -> None:
    proxy = faulty()
    index = ClipIndex.open(undisturbed.dst, access=proxy.s3.access(patience_s=3600))
    with ClipLoader(index, s3_jobs.LOADER) as loader:
        next(iter(loader))
        proxy.faults = Faults(("stall",), share=1)
        proxy.wait_for("stall")
    assert not [t.name for t in threading.enumerate() if t.name.startswith("reelmae")]


# --- the cause is told as it is


def test_each_cause_has_its_own_line(undisturbed: Any, s3_server: S3Server, faulty: Faulty, tmp_path: Path) -> None:
    skewed, denied = faulty("skew", share=1), faulty("denied", share=1)
    nobody = s3_server.at(f"http://127.0.0.1:{free_ports(1)}")
    cases = {
        "wrong keys": (undisturbed.src, _with_secret(s3_server, "wrong"), "keys are not accepted"),
        "refused": (undisturbed.src, nobody, "connection refused"),
        "skewed clock": (undisturbed.src, skewed.s3, "clock"),
        "no rights": (undisturbed.src, denied.s3, "permission denied"),
        "no bucket": ("s3://no-such-bucket/raw", s3_server, "no such bucket"),
        "empty prefix": (s3_server.url("no/such/folder"), s3_server, "no such folder"),
    }
    started = {
        name: s3_jobs.start(["shard", src, str(tmp_path / name), "--patience", "0"], server, hasty=False)
        for name, (src, server, _) in cases.items()
    }
    told = {}
    for name, (src, _, words) in cases.items():
        done = s3_jobs.end(started[name])
        assert done.status in (1, 2), (name, done)
        told[name] = done.told
        assert words in done.told, (name, done)
        assert src in done.told, (name, done)
    assert len(set(told.values())) == len(cases)


def _with_secret(server: S3Server, secret: str) -> S3Server:
    return S3Server(server.endpoint, server.bucket, server.key, secret)
