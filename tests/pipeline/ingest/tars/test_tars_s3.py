"""Tars on a real S3 server: each byte read once, few requests, faults of the network survived, nothing but ranges."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import s3_jobs
from s3_servers import S3Server

from reelmae.pipeline import schema
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.job import shard
from reelmae.pipeline.ingest.plan.sources import list_sources
from reelmae.pipeline.ingest.run import members
from reelmae.pipeline.ingest.tars.scan import FIRST
from reelmae.pipeline.storage.s3 import S3Files

Make = Callable[..., Path]
WriteTar = Callable[..., Path]
SMALL = ShardConfig(short_side=48, clip_seconds=1, sources_per_task=4)
N = 6  # videos of each tar


@pytest.fixture(scope="session")
def tars(make_video: Make, write_tar: WriteTar, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tars of videos with their labels, with 40 KB of what is no video between them."""
    folder = tmp_path_factory.mktemp("tars")
    for t in range(2):
        content: list[tuple[str, bytes]] = []
        for i in range(N):
            video = make_video(folder / "made" / f"{t}{i}.mp4", frames=4, seed=10 * t + i).read_bytes()
            content += [(f"{i}.cls", f"{i % 2}".encode()), (f"{i}.mp4", video), (f"{i}n.bin", os.urandom(40_000))]
        write_tar(folder / "src" / f"{t}.tar", content)
    return folder / "src"


@pytest.fixture
def prefix(request: pytest.FixtureRequest, s3_server: S3Server, tars: Path) -> str:
    """The tars at the server, without checksums of ours."""
    name = request.node.name.replace("[", "-").replace("]", "")
    s3_jobs.upload(tars, s3_server, name, checksums=False)
    return name


class Reads:
    """Ranges of tars that were read from S3: key → (offset, size)."""

    def __init__(self) -> None:
        self.ranges: dict[str, list[tuple[int, int]]] = {}

    def of(self, name: str) -> list[tuple[int, int]]:
        return sorted(next((r for key, r in self.ranges.items() if key.endswith(f"/{name}")), []))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reads]:
    """What is read of tars while the test runs."""
    seen, real = Reads(), S3Files.read

    def read(self: S3Files, full: str, offset: int, size: int, number: int) -> Any:
        if full.endswith(".tar") and "/shards/" not in full:
            seen.ranges.setdefault(full, []).append((offset, size))
        return real(self, full, offset, size, number)

    monkeypatch.setattr(S3Files, "read", read)
    return seen


def _fates(dst: Path) -> dict[str, Any]:
    """Tar and member → label and sha256 of its clips, or the reason."""
    found: dict[str, Any] = {}
    for row in pq.read_table(dst / schema.INDEX).to_pylist():
        found.setdefault(row["source"].rpartition("/")[2], []).append((row["label"], row["sha256"]))
    for row in pq.read_table(dst / schema.REJECTS_FILE).to_pylist():
        found[row["source"].rpartition("/")[2]] = row["reason"], row["detail"]
    return found


def test_each_byte_is_read_once_and_only_what_is_wanted(
    prefix: str, reads: Reads, tars: Path, s3_server: S3Server, tmp_path: Path
) -> None:
    access = s3_server.access()
    listing = list_sources(s3_server.url(prefix), SMALL, access)
    planned = {name: reads.of(name) for name in ("0.tar", "1.tar")}
    for ranges in planned.values():
        assert sum(size for _, size in ranges) <= (N + 2) * 2 * FIRST
        assert len(ranges) <= 2 * N + 2
    reads.ranges.clear()
    videos = [row["url"] for row in listing.table.to_pylist() if row["url"].endswith(".mp4")]
    assert len(videos) == 2 * N
    shard(s3_server.url(prefix), str(tmp_path / "dst"), SMALL, src_access=access, workers=1)
    for name, of_plan in planned.items():
        of_tasks = reads.of(name)
        for part in of_plan:
            of_tasks.remove(part)
        again = [r for r in of_tasks if r[1] <= 512 or r[1] == 40_000]  # what is no video is read twice, by its range
        once = [r for r in of_tasks if r not in again]
        assert len(again) == 2 * N
        ends = [0, *(offset + size for offset, size in once)]
        assert all(begin >= end for (begin, _), end in zip(once, ends[:-1], strict=True))
        assert ends[-1] <= (tars / name).stat().st_size
        assert len(once) <= 2 * N * 2 // SMALL.sources_per_task + 2  # a piece for each task that the tar is in
    shard(str(tars), str(tmp_path / "local"), SMALL)
    assert _fates(tmp_path / "dst") == _fates(tmp_path / "local")
    assert [
        row["source"].startswith(s3_server.url(prefix))
        for row in pq.read_table(tmp_path / "dst/index.parquet").to_pylist()
    ]


@pytest.mark.parametrize("piece", [members.PIECE, 1000])
def test_a_store_that_fails_changes_nothing(
    piece: int,
    prefix: str,
    faulty: Callable[..., Any],
    s3_server: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    s3_jobs.make_hasty(monkeypatch)
    shard(s3_server.url(prefix), str(tmp_path / "calm"), SMALL, src_access=s3_server.access())
    monkeypatch.setattr(members, "PIECE", piece)
    proxy = faulty("500", "reset", "truncate", share=0.3, path=".tar")
    summary = shard(s3_server.url(prefix), str(tmp_path / "dst"), SMALL, src_access=proxy.s3.access())
    assert sum(summary.retries.values()) > 5
    assert s3_jobs.files_in(tmp_path / "dst") == s3_jobs.files_in(tmp_path / "calm")


def test_a_header_that_the_network_broke_is_read_again(
    write_tar: WriteTar, s3_server: S3Server, faulty: Callable[..., Any], tmp_path: Path
) -> None:
    write_tar(tmp_path / "src/a.tar", [(f"{i}.mp4", b"") for i in range(1000)])
    s3_jobs.upload(tmp_path / "src", s3_server, "flips", checksums=False)
    calm = list_sources(s3_server.url("flips"), SMALL, s3_server.access()).table
    access = faulty("flip", share=1.0, most=3, path="a.tar").s3.access()
    assert list_sources(s3_server.url("flips"), SMALL, access).table.equals(calm)
    assert access.retries.counts()["checksum"] >= 1


def test_a_member_that_the_network_damaged_is_read_again_by_its_range(
    prefix: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SMALL.model_copy(update={"sources_per_task": 100})
    shard(s3_server.url(prefix), str(tmp_path / "calm"), config, src_access=s3_server.access())
    real, broken = S3Files.read, []

    def read(self: S3Files, full: str, offset: int, size: int, number: int) -> Any:
        data = bytes(real(self, full, offset, size, number))
        if size > 100_000 and (at := data.find(b"ftyp")) > 0:  # a piece: its first video looks like none
            broken.append(full)
            return data[:at] + b"xxxx" + data[at + 4 :]
        return data

    monkeypatch.setattr(S3Files, "read", read)
    summary = shard(s3_server.url(prefix), str(tmp_path / "dst"), config, src_access=s3_server.access(), workers=1)
    assert len(broken) == 2
    assert summary.retries == {"checksum": 2}
    assert s3_jobs.files_in(tmp_path / "dst") == s3_jobs.files_in(tmp_path / "calm")


def test_lists_and_manifests_reach_tars_on_s3(prefix: str, s3_server: S3Server, tars: Path, tmp_path: Path) -> None:
    url = s3_server.url(prefix)
    shard(str(tars), str(tmp_path / "local"), SMALL)
    local = _fates(tmp_path / "local")
    for number, src in enumerate((f"{url}/{{0..1}}.tar", f"{url}/0.tar::{url}/1.tar")):
        dst = tmp_path / f"dst{number}"
        shard(src, str(dst), SMALL, src_access=s3_server.access())
        assert _fates(dst) == local
        assert shard(src, str(dst), SMALL, append=True, src_access=s3_server.access()).new_sources == 0
    (tmp_path / "list.csv").write_text(f"url,label\n{url}/0.tar,all\n{url}/no.tar,\n")
    shard(str(tmp_path / "list.csv"), str(tmp_path / "rows"), SMALL, src_access=s3_server.access())
    found = _fates(tmp_path / "rows")
    assert found.pop("no.tar") == ("fetch_failed", "gone: no such file")
    first = {k: v for k, v in local.items() if k.startswith("0.tar")}
    assert set(found) == set(first)
    assert [label for fate in found.values() if isinstance(fate, list) for label, _ in fate] == ["all"] * N
