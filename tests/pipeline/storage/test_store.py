"""Files under a root, locally and on a real S3 server: the same answers, atomic publishing, errors that name the remedy."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from reelmae.pipeline.errors import InputError, ShortFileError, StorageError, StorageFullError
from reelmae.pipeline.storage import s3_ranges
from reelmae.pipeline.storage import store as store_module
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
    monkeypatch.setattr(store_module.os, "fsync", _raiser(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(StorageFullError, match="run again"):
        store.publish(tmp_path / "new", "x")
    assert [p.name for p in (tmp_path / "root").iterdir()] == ["x"]
    assert store.read_bytes("x") == b"old"


def test_passing_trouble_is_tried_again_and_lasting_trouble_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "FIRST_PAUSE_S", 0.001)
    store = Store(str(tmp_path))
    (tmp_path / "x").write_bytes(b"data")
    calls: list[int] = []

    def flaky() -> bytes:
        calls.append(1)
        if len(calls) < 3:
            raise OSError(errno.EIO, "I/O error")
        return b"data"

    assert store._retry(flaky, "x") == b"data"
    with pytest.raises(StorageError, match=f"tried {store_module.RETRIES} times"):
        store._retry(_raiser(OSError(errno.EIO, "I/O error")), "x")


def test_sweep_removes_stumps_only(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.publish_bytes(b"x", "shards/a.tar")
    (tmp_path / "shards/.a.tar.1.2.part").write_bytes(b"half")
    store.sweep("shards", "nowhere")
    assert [e.path for e in store.list()] == ["shards/a.tar"]


def test_s3_is_listed_page_by_page(s3_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(s3_server.url("pages/raw"))
    names = [f"{i % 7}/file {i:04d}+%2B.mp4" for i in range(1050)]
    store.fs.pipe({f"{store.root}/{name}": b"x" for name in names})
    neighbour = Store(s3_server.url("pages/raw2"))
    neighbour.publish_bytes(b"x", "not mine")
    store.fs.call_s3("put_object", Bucket=s3_server.bucket, Key="pages/raw/marked/", Body=b"")
    store.fs.dircache.clear()
    for size in (store_module.S3_PAGE, 100):
        monkeypatch.setattr(store_module, "S3_PAGE", size)
        found = list(store.list())
        assert [e.path for e in found] == sorted(names)
        assert {(e.url.removesuffix(e.path), e.size, len(e.etag)) for e in found} == {(f"{store.url()}/", 1, 32)}
    assert [e.path for e in store.list("3")] == sorted(n for n in names if n.startswith("3/"))
    assert not store.fs.dircache  # no million of names is kept
    assert "pages" in {e.path.split("/")[0] for e in Store(s3_server.url("")).list() if "raw" in e.path}
    assert list(Store("s3://no-such-bucket-of-ours/x").list()) == []


def test_a_page_that_fails_for_a_moment_is_asked_for_again(s3_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(s3_server.url("flaky"))
    names = [f"{i}" for i in range(5)]
    store.fs.pipe({f"{store.root}/{name}": b"x" for name in names})
    monkeypatch.setattr(store_module, "S3_PAGE", 2)
    monkeypatch.setattr(store_module, "FIRST_PAUSE_S", 0.001)
    call, calls = store.fs.call_s3, []

    def flaky(*args: Any, **values: Any) -> Any:
        calls.append(values.get("ContinuationToken"))
        if len(calls) == 2:
            raise OSError(errno.EIO, "I/O error")
        return call(*args, **values)

    monkeypatch.setattr(store.fs, "call_s3", flaky)
    assert [e.path for e in store.list()] == names
    assert len(calls) == 4 and calls[1] == calls[2] is not None


def test_s3_ranges_are_read_by_obstore_whatever_the_name(s3_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(s3_server.url("ranges"))
    names = ["plain", "deep/er", "odd 'na+me' ü%2B #?.tar", "%zz", "a&b=c;d"]
    for name in names:
        store.publish_bytes(name.encode() + b"0123456789", name)
    monkeypatch.setattr(store.fs, "cat_file", _raiser(AssertionError("read by s3fs")))
    for name in names:
        assert store.read_range(name, len(name.encode()), 4) == b"0123"


def test_what_obstore_cannot_read_is_read_by_s3fs_and_soon_by_it_alone(
    s3_server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from obstore.store import S3Store

    store = Store(s3_server.url("refused"))
    store.publish_bytes(b"0123456789", "x")
    assert store.read_range("x", 0, 5) == b"01234"
    ranges = store._s3_ranges
    assert ranges is not None
    well = ranges._store
    nobody = S3Store(
        "b",
        endpoint="http://127.0.0.1:1",
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )
    with caplog.at_level(logging.WARNING):
        for turn in range(s3_ranges.RANGES_GIVEN_UP):
            ranges._store = nobody
            assert store.read_range("x", 2, 5) == b"23456"
            if turn == 0:
                ranges._store = well  # a failure now and then is none
                assert store.read_range("x", 2, 5) == b"23456"
        assert not caplog.records
        ranges._store = nobody
        store.read_range("x", 2, 5)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "AWS_DEFAULT_REGION" in caplog.text and "going on with s3fs" in caplog.text
    ranges._store = well
    store.fs.cat_file = _raiser(OSError(errno.EIO, "asked"))
    with pytest.raises(StorageError, match="asked"):
        store.read_range("x", 2, 5)
    del store.fs.cat_file


READS = """
import sys
from reelmae.pipeline.storage.store import Store
store = Store(sys.argv[1])
assert store._s3_ranges is not None
store.fs.cat_file = None
print(store.read_range("x", 2, 3).decode())
"""


@pytest.mark.parametrize("found_in", ["environment", "profile", "settings"])
def test_ranges_use_the_credentials_and_endpoint_that_s3fs_finds(s3_server: Any, tmp_path: Path, found_in: str) -> None:
    store = Store(s3_server.url("credentials"))
    store.publish_bytes(b"0123456789", "x")
    key, secret = (os.environ[f"AWS_{name}"] for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"))
    env = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "FSSPEC_"))}
    env |= {"HOME": str(tmp_path), "AWS_EC2_METADATA_DISABLED": "true"}
    if found_in == "environment":
        env |= {
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_ENDPOINT_URL": s3_server.endpoint,
        }
    elif found_in == "settings":
        env |= {"AWS_ACCESS_KEY_ID": "others", "AWS_SECRET_ACCESS_KEY": "others"}
        env |= {
            "FSSPEC_S3_KEY": key,
            "FSSPEC_S3_SECRET": secret,
            "FSSPEC_S3_ENDPOINT_URL": s3_server.endpoint,
        }
    else:
        (tmp_path / ".aws").mkdir()
        (tmp_path / ".aws/credentials").write_text(
            f"[other]\naws_access_key_id={key}\naws_secret_access_key={secret}\n"
        )
        (tmp_path / ".aws/config").write_text(f"[profile other]\nendpoint_url={s3_server.endpoint}\n")
        env["AWS_PROFILE"] = "other"
    ran = subprocess.run([sys.executable, "-c", READS, store.url()], env=env, capture_output=True, text=True)
    assert (ran.stdout, ran.returncode) == ("234\n", 0), ran.stderr


def test_other_filesystems_are_listed_folder_by_folder() -> None:
    store = Store("memory://listing/raw")
    names = ["b/x", "a.txt", "b/c/y", "z"]
    try:
        for name in names:
            store.fs.pipe(f"{store.root}/{name}", name.encode())
        store.fs.pipe("/listing/raw2/other", b"x")
        assert [(e.path, e.size) for e in store.list()] == [("a.txt", 5), ("z", 1), ("b/x", 3), ("b/c/y", 5)]
        assert [e.url for e in store.list("b/c")] == [store.url("b/c/y")]
        assert list(store.list("nowhere")) == []
    finally:
        store.fs.rm("/listing", recursive=True)


def test_wrong_credentials_are_told(s3_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    store = Store(s3_server.url("x"))
    store.fs = s3fs.S3FileSystem(key="wrong", secret="wrong", endpoint_url=s3_server.endpoint, skip_instance_cache=True)
    with pytest.raises(StorageError, match="credentials"):
        store.read_bytes("y")
    with pytest.raises(StorageError, match="credentials"):
        store.read_range("y", 0, 1)
    with pytest.raises(StorageError, match="credentials"):
        list(store.list())


def _raiser(error: Exception) -> Any:
    def call(*_: object, **__: object) -> bytes:
        raise error

    return call
