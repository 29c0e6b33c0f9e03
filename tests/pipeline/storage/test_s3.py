"""What is S3's alone: pages and folders of listings, checksums, credentials, obstore, uploads in parts."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from reelmae.pipeline.errors import InputError, StorageError
from reelmae.pipeline.storage import s3, s3_list, s3_ranges
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.checks import METADATA
from reelmae.pipeline.storage.store import Store


def _ask(store: Store, method: str, **wanted: Any) -> dict[str, Any]:
    """One request of the server's own interface."""
    return store._files._call(method, 0, Bucket=store.root.split("/")[0], **wanted)  # type: ignore[attr-defined]


def _key(store: Store, path: str) -> str:
    return store.full_path(path).partition("/")[2]


def _put_bare(store: Store, path: str, data: bytes) -> None:
    """An object as another tool writes it, without our checksum."""
    _ask(store, "put_object", Key=_key(store, path), Body=data)


@pytest.fixture(scope="module")
def pages(s3_server: Any) -> tuple[Store, list[str]]:
    """1050 small objects in seven folders, beside another folder with a longer name."""
    store = Store(s3_server.url("pages/raw"))
    names = [f"{i % 7}/file {i:04d}+%2B.mp4" for i in range(1050)]
    fs = store._files._fs  # type: ignore[attr-defined]
    fs.pipe({f"{store.root}/{name}": b"x" for name in names})
    Store(s3_server.url("pages/raw2")).publish_bytes(b"x", "not mine")
    _ask(store, "put_object", Key="pages/raw/marked/", Body=b"")
    _ask(store, "put_object", Key="pages/raw/3-between", Body=b"x")  # sorts before the folder `3/`
    fs.dircache.clear()
    return store, [*names, "3-between"]


@pytest.mark.parametrize("keys", [1000, 100])
def test_s3_is_listed_page_by_page_in_the_order_of_keys(
    pages: tuple[Store, list[str]], monkeypatch: pytest.MonkeyPatch, keys: int
) -> None:
    store, names = pages
    monkeypatch.setattr(s3_list, "KEYS", keys)
    found = list(store.list())
    assert [e.path for e in found] == sorted(names)
    assert {(e.url.removesuffix(e.path), e.size, len(e.etag)) for e in found} == {(f"{store.url()}/", 1, 32)}
    assert [e.path for e in store.list("3")] == sorted(n for n in names if n.startswith("3/"))
    assert not store._files._fs.dircache  # type: ignore[attr-defined]  # no million of names is kept
    assert "pages" in {e.path.split("/")[0] for e in Store(store.url().removesuffix("/pages/raw")).list()}


def test_a_listing_that_is_left_in_the_middle_ends(
    pages: tuple[Store, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, names = pages
    monkeypatch.setattr(s3_list, "KEYS", 10)
    listing = store.list()
    assert next(listing).path == sorted(names)[0]
    listing.close()


def test_missing_buckets_and_files_are_told_apart(s3_server: Any, tmp_path: Path) -> None:
    nowhere = Store("s3://no-such-bucket-of-ours/x")
    for call in (
        lambda: list(nowhere.list()),
        lambda: nowhere.exists("y"),
        lambda: nowhere.read_bytes("y"),
        lambda: nowhere.read_range("y", 0, 1),
        lambda: nowhere.download("y", tmp_path / "y"),
    ):
        with pytest.raises(InputError, match="no such bucket"):
            call()
    here = Store(s3_server.url("nothing"))
    with pytest.raises(FileNotFoundError):
        here.read_range("y", 0, 1)


def test_wrong_keys_are_told(s3_server: Any) -> None:
    options = {"key": "wrong", "secret": "wrong-secret", "endpoint_url": s3_server.endpoint}
    store = Store(s3_server.url("x"), Access(options))
    for call in (lambda: store.read_bytes("y"), lambda: store.read_range("y", 0, 1), lambda: list(store.list())):
        with pytest.raises(StorageError, match=r"keys are not accepted.*check the credentials") as told:
            call()
        assert "wrong-secret" not in str(told.value)
    assert store.access.retries.counts() == {}


@pytest.mark.parametrize("options", [{"no_such": "hush"}, {"client_kwargs": {"no": "hush"}}, {"endpoint_url": "hush"}])
def test_options_that_no_client_takes_are_told_without_their_values(s3_server: Any, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"storage options: .*endpoint_url") as told:
        Store(s3_server.url("x"), Access(options)).exists("y")
    assert "hush" not in str(told.value) and next(iter(options)) in str(told.value)


def test_what_is_written_carries_a_checksum(s3_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)
    store = Store(s3_server.url("checksums"))
    for name, size in (("small", 1000), ("empty", 0), ("parts", 12 << 20)):
        (tmp_path / name).write_bytes(random.Random(1).randbytes(size))
        store.publish(tmp_path / name, name)
        head = _ask(store, "head_object", Key=_key(store, name), ChecksumMode="ENABLED")
        assert head["Metadata"][METADATA] == head["ChecksumCRC64NVME"]


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("marked", [False, True])
def test_a_download_of_other_bytes_than_the_store_knows_is_fetched_again(
    s3_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: bool, marked: bool
) -> None:
    """With our own checksum, with the server's, and with an ETag alone, of one part and of several."""
    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)
    store = Store(s3_server.url(f"flipped/{parts}{marked}"))
    data = random.Random(2).randbytes((12 << 20) + 5 if parts else 3000)
    (tmp_path / "x").write_bytes(data)
    if marked:
        store.publish(tmp_path / "x", "x")
    else:
        fs = store._files._fs  # type: ignore[attr-defined]
        fs.put_file(str(tmp_path / "x"), store.full_path("x"), chunksize=5 << 20)
    files = store._files
    read, reads = files.read, []

    def flip(full: str, offset: int, size: int, number: int) -> bytes:
        right = read(full, offset, size, number)
        reads.append(offset)
        return bytes([right[0] ^ 1, *right[1:]]) if len(reads) == 1 else right

    monkeypatch.setattr(files, "read", flip)
    content = store.download("x", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data
    assert (content.size, content.can_check) == (len(data), True)
    assert store.access.retries.counts() == {"checksum": 1}


def test_a_whole_object_is_copied_without_ranges_being_known(
    s3_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 1000)
    store = Store(s3_server.url("copied"))
    for data in (b"", random.Random(4).randbytes(2500)):
        _put_bare(store, "x", data)
        store._files.copy_out(store.full_path("x"), tmp_path / "x", 0)
        assert (tmp_path / "x").read_bytes() == data


def test_uploads_of_killed_writers_are_swept(s3_server: Any) -> None:
    store = Store(s3_server.url("dangling"))
    for name in ("shards/a.tar", "shards/0001/b.tar", "commits/b", "index.parquet", "index.parquet2", "shards2/c"):
        _ask(store, "create_multipart_upload", Key=_key(store, name))
    store.publish_bytes(b"probe", f"{s3.PROBE}of-a-killed-job")
    assert store.sweep("shards", "commits", "index.parquet") == 4
    left = _ask(store, "list_multipart_uploads", Prefix=_key(store, ""))
    assert sorted(upload["Key"] for upload in left["Uploads"]) == [
        _key(store, n) for n in ("index.parquet2", "shards2/c")
    ]
    assert list(store.list()) == []
    assert store.sweep("") == 2


def test_an_upload_in_parts_does_not_overwrite_what_must_not_be(
    s3_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)
    store = Store(s3_server.url("created"))
    (tmp_path / "x").write_bytes(bytes(12 << 20))
    store.publish_bytes(b"first", "x")
    assert not store._files.write(tmp_path / "x", store.full_path("x"), lambda call: call(0), create=True)
    assert store.read_bytes("x") == b"first"
    assert store.sweep("") == 0


def test_s3_ranges_are_read_by_obstore_whatever_the_name(s3_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(s3_server.url("ranges"))
    names = ["plain", "deep/er", "odd 'na+me' ü%2B #?.tar", "%zz", "a&b=c;d"]
    for name in names:
        store.publish_bytes(name.encode() + b"0123456789", name)
    monkeypatch.setattr(store._files, "_read_by_client", None)
    for name in names:
        assert store.read_range(name, len(name.encode()), 4) == b"0123"


def test_what_obstore_cannot_read_is_read_by_s3fs_and_soon_by_it_alone(
    s3_server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from obstore.store import S3Store

    store = Store(s3_server.url("refused"))
    store.publish_bytes(b"0123456789", "x")
    assert store.read_range("x", 0, 5) == b"01234"
    ranges: Any = store._files._ranges  # type: ignore[attr-defined]
    well = ranges._short
    strange = S3Store(
        "reelmae-test",
        endpoint=s3_server.endpoint,
        access_key_id="wrong",
        secret_access_key="wrong",
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )
    with caplog.at_level(logging.WARNING):
        for turn in range(s3_ranges.RANGES_GIVEN_UP):
            ranges._short = strange
            assert store.read_range("x", 2, 5) == b"23456"
            if turn == 0:
                ranges._short = well  # a failure now and then is none
                assert store.read_range("x", 2, 5) == b"23456"
        assert not caplog.records
        ranges._short = strange
        store.read_range("x", 2, 5)
        store.read_range("x", 2, 5)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "AWS_DEFAULT_REGION" in caplog.text and "going on with s3fs" in caplog.text
    assert store.access.retries.counts() == {}


READS = """
import sys
from reelmae.pipeline.storage.store import Store
store = Store(sys.argv[1])
store._files._read_by_client = None
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
