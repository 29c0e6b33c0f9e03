"""Verify, repair and what is shown of a dataset on a network that changes bytes, with a store that has no checksums."""

from __future__ import annotations

import errno
import json
import random
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fault_proxy import FaultProxy
from fsspec.implementations.local import LocalFileSystem
from s3_servers import S3Server

from reelmae.pipeline import schema
from reelmae.pipeline.dataset.contents import facts
from reelmae.pipeline.dataset.repairs import repair
from reelmae.pipeline.dataset.verification import verify
from reelmae.pipeline.errors import DatasetError, StorageError
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.job import shard
from reelmae.pipeline.runners.local import LocalRunner
from reelmae.pipeline.runners.runner import Runner
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.checked import READS, download_agreed, read_agreed, read_checked
from reelmae.pipeline.storage.checks import Content
from reelmae.pipeline.storage.store import Store
from reelmae.tools import cli

Make = Callable[..., Path]


class Flaky(LocalFileSystem):  # type: ignore[misc]
    """Local files that are read with a flipped bit now and then; what is written is right."""

    protocol = "flaky"
    cachable = False
    share: ClassVar[float] = 0.0
    away_from: ClassVar[str] = ""
    refused: ClassVar[set[str]] = set()
    draws: ClassVar[random.Random] = random.Random(0)
    flips: ClassVar[Counter[str]] = Counter()
    reads: ClassVar[Counter[str]] = Counter()
    lock: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return str(path).removeprefix("flaky://")

    def cat_file(self, path: str, start: Any = None, end: Any = None, **_: Any) -> bytes:
        """Read, and flip a bit by chance."""
        data = bytearray(Path(path).read_bytes()[start:end])
        if Path(path).name == Flaky.away_from:
            Flaky.away_from = "*"
        Flaky.refuse(path)
        with Flaky.lock:
            Flaky.reads[Path(path).name] += 1
            if data and Flaky.draws.random() < Flaky.share:
                Flaky.flips[Path(path).name] += 1
                data[Flaky.draws.randrange(len(data))] ^= 1 << Flaky.draws.randrange(8)
        return bytes(data)

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        """As the disk's."""
        Flaky.refuse(path)
        return dict(super().info(path, **options))

    @classmethod
    def refuse(cls, path: str) -> None:
        """From the read of `away_from` on nothing answers."""
        if cls.away_from == "*":
            cls.refused.add(Path(path).name)
            raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    """flaky(share, seed=0): from now on this share of the reads of flaky:// gives a wrong bit."""
    fsspec.register_implementation("flaky", Flaky, clobber=True)

    def begin(share: float, seed: int = 0) -> None:
        monkeypatch.setattr(Flaky, "share", share)
        monkeypatch.setattr(Flaky, "draws", random.Random(seed))
        Flaky.flips.clear()
        Flaky.reads.clear()

    begin(0.0)
    monkeypatch.setattr(Flaky, "away_from", "")
    Flaky.refused.clear()
    yield begin


@pytest.fixture(scope="module")
def bucket(make_video: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """src and dst: five tasks, a shard for each clip, an append, labels, rejects."""
    folder, config = tmp_path_factory.mktemp("network"), ShardConfig(short_side=48, sources_per_task=1, labels="folder")
    for i in range(4):
        make_video(folder / "src" / "ab"[i % 2] / f"{i}.mp4", seed=i, frames=8)
    (folder / "src" / "a" / "no.mp4").write_text("no video")
    shard(str(folder / "src"), str(folder / "dst"), config)
    make_video(folder / "src" / "c" / "new.mp4", seed=9, frames=8)
    shard(str(folder / "src"), str(folder / "dst"), config, append=True)
    return folder


@pytest.fixture
def dst(bucket: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bucket / "dst", tmp_path / "dst"))


def _url(folder: Path) -> str:
    return f"flaky://{folder}"


def _damage(path: Path, at: int = -700) -> str:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    return path.name


on_runners = pytest.mark.parametrize("runner", [None, LocalRunner(2)], ids=["here", "workers"])


@on_runners
@pytest.mark.parametrize("seed", range(6))
def test_a_network_that_changes_bytes_gives_no_false_alarm(
    dst: Path, flaky: Callable[..., None], seed: int, runner: Runner | None
) -> None:
    flaky(0.15, seed)
    report = verify(_url(dst), runner=runner)
    assert report.faults == ()
    assert Flaky.flips.total() > 0
    assert set(report.retries) == {"checksum"}
    again = sum(n - 1 for name, n in Flaky.reads.items() if name.endswith((".tar", ".idx")))
    commits = sum(n - 2 for name, n in Flaky.reads.items() if name[:6].isdecimal() and name.endswith(".parquet"))
    assert report.retries["checksum"] >= again + (commits if runner is None else 0)
    assert report.as_dict()["retries"] == report.retries


@on_runners
@pytest.mark.parametrize("seed", range(6))
def test_what_is_really_damaged_is_still_found(
    dst: Path, flaky: Callable[..., None], seed: int, runner: Runner | None
) -> None:
    tar = sorted(dst.glob("shards/*.tar"))[seed % 5]
    wanted = {_damage(tar), _damage(sorted(dst.glob("shards/*.idx"))[(seed + 1) % 5], 3)}
    wanted.add(_damage(dst / schema.LABELS, 5))
    flaky(0.15, seed)
    found = {Path(fault.file).name for fault in verify(_url(dst), runner=runner).found}
    assert found == wanted


@pytest.mark.parametrize("name", ["000000.parquet", "000001-00.tar", "rejects.parquet"])
def test_a_store_that_stays_away_ends_the_search(dst: Path, flaky: Callable[..., None], name: str) -> None:
    """Else each of its files would be waited for in turn."""
    Flaky.away_from = name
    with pytest.raises(StorageError, match="connection refused; waited"):
        verify(_url(dst), access=Access(patience_s=0.2))
    assert Flaky.refused == {name, schema.DATASET_JSON}


def test_a_store_that_stays_away_ends_the_search_of_all_workers(dst: Path, flaky: Callable[..., None]) -> None:
    Flaky.away_from = "000002.parquet"
    with pytest.raises(StorageError, match="connection refused; waited"):
        verify(_url(dst), access=Access(patience_s=0.2), runner=LocalRunner(2))
    assert schema.INDEX not in Flaky.refused


def test_a_sound_network_costs_one_read_of_each_shard(dst: Path, flaky: Callable[..., None]) -> None:
    assert verify(_url(dst)).retries == {}
    assert {n for name, n in Flaky.reads.items() if name.endswith((".tar", ".idx"))} == {1}
    assert {n for name, n in Flaky.reads.items() if name.endswith(".parquet") and name[0] == "0"} == {2}


def test_facts_are_of_what_two_reads_agree_on(dst: Path, flaky: Callable[..., None]) -> None:
    wanted = facts(str(dst))
    for seed in range(8):
        flaky(0.2, seed)
        found = facts(_url(dst))
        assert (found.clips, found.seconds_out, found.scores, found.labels) == (
            wanted.clips,
            wanted.seconds_out,
            wanted.scores,
            wanted.labels,
        )
    assert Flaky.flips.total() > 0
    flaky(0.0)
    _damage(dst / schema.INDEX, 5)
    _damage(dst / schema.INDEX, -3)
    with pytest.raises(DatasetError, match=r"index\.parquet: is damaged"):
        facts(_url(dst))


@on_runners
def test_a_repair_over_such_a_network_ends_with_the_same_bytes(
    bucket: Path, dst: Path, flaky: Callable[..., None], runner: Runner | None
) -> None:
    for name in (schema.INDEX, "commits/000001.parquet"):
        (dst / name).unlink()
    next(dst.glob("shards/*.idx")).write_bytes(b"noise")
    flaky(0.1, 1)
    report = repair(_url(dst), runner=runner)
    assert report.after.faults == ()
    assert report.tasks_run == (1,)
    assert report.retries["checksum"] >= sum(r.retries.get("checksum", 0) for r in (report.before, report.after)) > 0
    whole = {p.relative_to(dst): p.read_bytes() for p in dst.rglob("*") if p.is_file()}
    assert whole == {p.relative_to(bucket / "dst"): p.read_bytes() for p in bucket.glob("dst/**/*") if p.is_file()}


def test_retries_are_shown_where_there_are_any(
    dst: Path, flaky: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", _url(dst)]) == 0
    assert "retries:" not in capsys.readouterr().out
    flaky(0.2)
    assert cli.main(["verify", _url(dst)]) == 0
    assert "retries:\n  checksum: " in capsys.readouterr().out
    flaky(0.0)
    assert cli.main(["verify", _url(dst), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["retries"] == {}


# --- reading again


def _store(folder: Path) -> Store:
    return Store(_url(folder), Access(patience_s=5))


def _no_wrong(data: bytes) -> bytes:
    if data != b"right":
        raise ValueError(f"read {data!r}")
    return data


def test_what_is_checked_is_read_until_it_is_right_or_twice_the_same(
    tmp_path: Path, flaky: Callable[..., None]
) -> None:
    (tmp_path / "x").write_bytes(b"right")
    store = _store(tmp_path)
    reads = iter([b"wrong", b"worse", b"right"])
    assert read_checked(store, lambda: next(reads), _no_wrong, (ValueError,)) == b"right"
    assert store.access.retries.counts() == {"checksum": 2}
    reads = iter([b"wrong", b"worse", b"wrong", b"right"])
    with pytest.raises(ValueError, match="wrong"):
        read_checked(store, lambda: next(reads), _no_wrong, (ValueError,))
    assert next(reads) == b"right"
    reads = iter([bytes([i]) for i in range(READS + 1)])
    with pytest.raises(StorageError, match=f"gave other bytes at each of {READS} reads"):
        read_checked(store, lambda: next(reads), _no_wrong, (ValueError,))
    assert next(reads) == bytes([READS])


def test_a_file_that_ends_too_soon_is_read_again(tmp_path: Path, flaky: Callable[..., None]) -> None:
    (tmp_path / "x").write_bytes(b"right")
    store, tries = _store(tmp_path), iter([9, 5])
    assert read_checked(store, lambda: store.read_range("x", 0, next(tries)), _no_wrong, ()) == b"right"
    assert store.access.retries.counts() == {"checksum": 1}
    with pytest.raises(StorageError, match="wanted 9 bytes"):
        read_checked(store, lambda: store.read_range("x", 0, 9), _no_wrong, ())


def test_other_errors_and_local_files_are_not_read_again(tmp_path: Path) -> None:
    reads = iter([b"wrong", b"right"])
    with pytest.raises(ValueError, match="wrong"):
        read_checked(Store(str(tmp_path)), lambda: next(reads), _no_wrong, (ValueError,))
    with pytest.raises(FileNotFoundError):
        read_checked(_store(tmp_path), lambda: _store(tmp_path).read_bytes("none"), _no_wrong, (OSError,))


def test_a_file_that_is_never_twice_the_same_is_no_damage(tmp_path: Path, flaky: Callable[..., None]) -> None:
    (tmp_path / "x").write_bytes(random.Random(3).randbytes(10_000))
    flaky(1.0)
    with pytest.raises(StorageError, match=f"/x: gave other bytes at each of {READS} reads"):
        read_agreed(_store(tmp_path), "x")
    flaky(0.4)
    for _ in range(10):
        assert read_agreed(_store(tmp_path), "x") == (tmp_path / "x").read_bytes()
    flaky(0.0)
    download_agreed(_store(tmp_path), "x", tmp_path / "copy")
    assert Flaky.reads["x"] == 2


class Counting(Store):
    """A store that counts its downloads."""

    downloads = 0

    def download(self, path: str, to: Path) -> Content:
        """As the store's own."""
        self.downloads += 1
        return super().download(path, to)


def test_what_a_store_has_a_checksum_of_is_read_once(tmp_path: Path, s3_server: S3Server) -> None:
    for url, downloads in ((s3_server.url("agreed"), 1), ("memory://agreed", 2)):
        store = Counting(url)
        store.publish_bytes(b"right", "x")
        assert read_agreed(store, "x") == b"right"
        assert store.downloads == downloads


def test_verify_through_a_network_of_faults_says_the_same(
    dst: Path, s3_server: S3Server, faulty: Callable[..., FaultProxy]
) -> None:
    store = Store(s3_server.url("networks/dst"))
    for path in dst.rglob("*"):
        if path.is_file():
            store.publish(path, path.relative_to(dst).as_posix())
    proxy = faulty("500", "503", "reset", "truncate", "flip", share=0.2)
    report = verify(store.url(), access=proxy.s3.access())
    assert (report.faults, report.clips) == ((), 5)
    assert sum(report.retries.values()) >= 5
    tar = next(dst.glob("shards/*.tar"))
    _damage(tar)
    store.publish(tar, f"shards/{tar.name}")
    (fault,) = verify(store.url(), access=proxy.s3.access()).found
    assert fault.file == f"shards/{tar.name}"
