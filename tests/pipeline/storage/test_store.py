"""Files under a root, locally and on a real S3 server: the same answers, atomic publishing, errors that name the remedy."""

from __future__ import annotations

import errno
import os
import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest

from reelmae.pipeline.errors import InputError, ShortFileError, StorageError, StorageFullError
from reelmae.pipeline.storage import local, s3
from reelmae.pipeline.storage import store as store_module
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.store import Store, require_folder, whole_file


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store(str(tmp_path / "root"))
    server: Any = request.getfixturevalue("s3_server")
    return Store(server.url(f"storage/{tmp_path.name}"))


def test_what_is_published_is_listed_and_read(store: Store, tmp_path: Path) -> None:
    names = ["a.txt", "deep/er/b.txt", "odd 'name' ü.txt", ".hidden"]
    for name in names:
        store.publish_bytes(name.encode(), name)
    assert sorted(e.path for e in store.list()) == sorted(names)
    assert [e.path for e in store.list("deep")] == ["deep/er/b.txt"]
    assert {e.path: e.size for e in store.list()}["a.txt"] == 5
    assert store.read_bytes("deep/er/b.txt") == b"deep/er/b.txt"
    assert store.read_range("deep/er/b.txt", 5, 4) == b"er/b"
    store.download("a.txt", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"a.txt"


def test_a_files_size_is_told_as_it_is_now(store: Store) -> None:
    for data in (b"one", b"three"):
        store.publish_bytes(data, "x")
        assert store.size("x") == len(data)
    with pytest.raises(FileNotFoundError):
        store.size("y")


def test_publishing_again_replaces(store: Store) -> None:
    store.publish_bytes(b"one", "x")
    store.publish_bytes(b"two!", "x")
    assert store.read_bytes("x") == b"two!"
    assert [e.path for e in store.list()] == ["x"]


def test_what_is_removed_is_gone(store: Store) -> None:
    for name in ("x", "deep/x"):
        store.publish_bytes(b"one", name)
    store.remove("deep/x")
    assert [e.path for e in store.list()] == ["x"]
    with pytest.raises(FileNotFoundError):
        store.remove("deep/x")


def test_what_is_missing_says_so(store: Store, tmp_path: Path) -> None:
    assert not store.exists("x")
    assert list(store.list()) == []
    with pytest.raises(FileNotFoundError):
        store.read_bytes("x")
    with pytest.raises(FileNotFoundError):
        store.download("x", tmp_path / "copy")


def test_a_short_range_is_damage(store: Store) -> None:
    store.publish_bytes(b"12345", "x")
    with pytest.raises(StorageError, match="wanted 10 bytes at 3"):
        store.read_range("x", 3, 10)
    for offset in (3, 5, 99):
        with pytest.raises(ShortFileError, match=f"wanted 10 bytes at {offset}"):
            store.read_range("x", offset, 10)


def test_a_file_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    final = tmp_path / "new" / "file"
    with whole_file(final) as part:
        part.write_text("half")
        assert not final.exists()
    assert final.read_text() == "half"
    with pytest.raises(RuntimeError), whole_file(final) as part:
        part.write_text("other")
        raise RuntimeError
    assert (final.read_text(), [p.name for p in final.parent.iterdir()]) == ("half", ["file"])


def test_what_appears_later_is_seen(store: Store) -> None:
    assert not store.exists("later")
    Store(store.url()).publish_bytes(b"x", "later")
    assert store.exists("later")
    assert [e.path for e in store.list()] == ["later"]


def test_urls_are_whole(tmp_path: Path) -> None:
    assert Store(f"file://{tmp_path}").url("a") == f"{tmp_path}/a"
    assert Store("s3://bucket/pre/fix/").url("a/b") == "s3://bucket/pre/fix/a/b"
    with pytest.raises(InputError, match="names no bucket"):
        Store("s3://")
    with pytest.raises(InputError, match="no filesystem for 'nosuch://'"):
        Store("nosuch://x")


def test_a_place_has_one_name_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "deep").mkdir(parents=True)
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    name = str(tmp_path / "there")
    assert {Store(url).url() for url in ("../there", name, f"file://{name}", f"{name}/", "deep/../../there")} == {name}
    (tmp_path / "there" / "link").symlink_to(tmp_path / "here" / "deep")
    assert Store(f"{name}/link/..").url() == str(tmp_path / "here")  # as the system resolves it
    assert Store(f"{name}/link").url() == f"{name}/link"


def test_missing_folders_and_files_in_their_place(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="check the path"):
        require_folder(str(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        require_folder(str(tmp_path / "file"))


def test_a_publish_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path / "root"))
    store.publish_bytes(b"old", "x")
    (tmp_path / "new").write_bytes(b"new")
    monkeypatch.setattr(local.os, "fsync", _raiser(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(StorageFullError, match="run again"):
        store.publish(tmp_path / "new", "x")
    assert [p.name for p in (tmp_path / "root").iterdir()] == ["x"]
    assert store.read_bytes("x") == b"old"


def test_a_pipe_is_no_file_to_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StorageError, match="is not a plain file"):
        Store(str(tmp_path)).read_range("pipe", 0, 1)
    with pytest.raises(IsADirectoryError):
        Store(str(tmp_path)).read_range("", 0, 1)


def test_sweep_removes_stumps_only(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.publish_bytes(b"x", "shards/a.tar")
    (tmp_path / "shards/.a.tar.1.2.part").write_bytes(b"half")
    store.sweep("shards", "nowhere")
    assert [e.path for e in store.list()] == ["shards/a.tar"]


def test_other_filesystems_are_listed_folder_by_folder() -> None:
    store, fs = Store("memory://listing/raw"), fsspec.filesystem("memory")
    names = ["b/x", "a.txt", "b/c/y", "z"]
    try:
        for name in names:
            fs.pipe(f"{store.root}/{name}", name.encode())
        fs.pipe("/listing/raw2/other", b"x")
        assert [(e.path, e.size) for e in store.list()] == [("a.txt", 5), ("z", 1), ("b/x", 3), ("b/c/y", 5)]
        assert [e.url for e in store.list("b/c")] == [store.url("b/c/y")]
        assert list(store.list("nowhere")) == []
    finally:
        fs.rm("/listing", recursive=True)


def test_ranges_come_in_the_order_asked_for_near_ones_by_one_request(store: Store) -> None:
    data = random.Random(0).randbytes(3 << 20)
    store.publish_bytes(data, "x")
    ranges = [(2 << 20, 100), (0, 10), (5, 10), (1 << 20, 1 << 20), (100, 0), (0, 10), (3 << 20, 0)]
    assert store.read_ranges("x", ranges) == [data[at : at + size] for at, size in ranges]
    assert store.read_ranges("x", []) == []
    with pytest.raises(ShortFileError, match="wanted"):
        store.read_ranges("x", [(0, 10), ((3 << 20) - 5, 10)])


def test_a_range_is_copied_to_a_file(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "PIECE", 1000)
    data = random.Random(0).randbytes(25_000)
    store.publish_bytes(data, "x")
    to = tmp_path / "range"
    for offset, size in ((0, 25_000), (7, 12_345), (24_999, 1), (5, 0)):
        store.copy_range("x", offset, size, to)
        assert to.read_bytes() == data[offset : offset + size]
    with pytest.raises(ShortFileError, match="wanted"):
        store.copy_range("x", 20_000, 5001, to)


def test_ranges_may_overlap(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "PIECE", 1000)
    monkeypatch.setattr(store_module, "MAX_GAP", 10)
    draw = random.Random(0)
    data = draw.randbytes(5000)
    store.publish_bytes(data, "x")
    for _ in range(5):
        ranges = [(at, draw.randrange(5000 - at)) for at in draw.sample(range(5000), 12)]
        assert store.read_ranges("x", ranges) == [data[at : at + size] for at, size in ranges]


def test_long_files_are_read_and_written_in_pieces(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "PIECE", 1 << 20)
    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)
    data = random.Random(0).randbytes((16 << 20) + 12345)
    (tmp_path / "big").write_bytes(data)
    assert store.publish(tmp_path / "big", "deep/big")
    assert store.read_bytes("deep/big") == data
    store.download("deep/big", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data
    assert store.read_ranges("deep/big", [(7, len(data) - 7)]) == [data[7:]]
    assert store.size("deep/big") == len(data)


def test_a_name_is_taken_once(store: Store) -> None:
    assert store.create(b"one", "x/claim")
    assert not store.create(b"two", "x/claim")
    assert store.read_bytes("x/claim") == b"one"
    assert store.creates_exclusively
    assert [e.path for e in store.list()] == ["x/claim"]


def test_of_many_that_create_one_name_one_wins(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: store.create(f"{i}".encode(), "race"), range(8)))
    assert won.count(True) == 1
    assert store.read_bytes("race") == f"{won.index(True)}".encode()


def test_a_store_can_be_sent_to_another_process_without_showing_its_options(store: Store) -> None:
    access = Access({"anon": False}, 7.0)
    there = pickle.loads(pickle.dumps(Store(store.url(), access)))
    assert (there.url(), there.access.options, there.access.patience_s) == (store.url(), {"anon": False}, 7.0)
    assert "anon" not in repr(access) + repr(there)


def _raiser(error: Exception) -> Any:
    def call(*_: object, **__: object) -> bytes:
        raise error

    return call
