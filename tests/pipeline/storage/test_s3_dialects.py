"""Servers and credentials that know less than S3: what they refuse is left out, and nothing waits for it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import fault_proxy
import pytest

from reelmae.pipeline.errors import StorageError
from reelmae.pipeline.storage import s3
from reelmae.pipeline.storage.store import Store

MIB = 1 << 20
Refuse = Callable[..., Callable[[str], Store]]


@pytest.fixture
def refusing(faulty: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """A server that answers so to requests for which `which(method, path, headers)` is true."""

    def make(status: int, code: str, which: Callable[[str, str, Any], bool]) -> Callable[[str], Store]:
        answer = fault_proxy._Handler._answer

        def pick(handler: Any) -> None:
            if not which(handler.command, handler.path, handler.headers):
                answer(handler)
                return
            for _ in handler._body(int(handler.headers.get("Content-Length") or 0), flip=None):
                pass
            handler._refuse(status, code, "no")

        monkeypatch.setattr(fault_proxy._Handler, "_answer", pick)
        monkeypatch.setattr(s3, "PART_BYTES", 5 * MIB)
        server = faulty().s3
        return lambda path: Store(server.url(path), server.access(20.0))

    return make


def _knows(*names: str) -> Callable[[str, str, Any], bool]:
    return lambda method, path, headers: any(name in headers for name in names)


@pytest.mark.parametrize(("status", "code"), [(400, "InvalidArgument"), (501, "NotImplemented")])
@pytest.mark.parametrize("size", [1000, 12 * MIB])
def test_a_server_that_refuses_our_checksum_is_asked_without(
    refusing: Refuse, tmp_path: Any, status: int, code: str, size: int
) -> None:
    names = ("x-amz-checksum-crc64nvme", "x-amz-checksum-algorithm", "x-amz-trailer")
    store = refusing(status, code, _knows(*names))(f"plain/{code}{size}")
    (tmp_path / "x").write_bytes(bytes(range(250)) * (size // 250))
    store.publish(tmp_path / "x", "x")
    assert store.creates_exclusively  # and with it nothing else is left out
    assert store.read_bytes("x") == (tmp_path / "x").read_bytes()
    assert store.access.retries.counts() == {}


@pytest.mark.parametrize("size", [1000, 12 * MIB])
def test_a_server_that_refuses_if_none_match_is_asked_without(refusing: Refuse, tmp_path: Any, size: int) -> None:
    store = refusing(501, "NotImplemented", _knows("If-None-Match"))(f"unconditional/{size}")
    (tmp_path / "x").write_bytes(bytes(size))
    assert store.publish(tmp_path / "x", "x", create=True)
    assert not store.publish(tmp_path / "x", "x", create=True)
    assert not store.creates_exclusively
    assert store.access.retries.counts() == {}


def test_what_is_left_out_does_not_let_a_file_be_overwritten(refusing: Refuse, tmp_path: Any) -> None:
    """The first thing that is written there at all is a name that another has just taken."""
    store = refusing(400, "InvalidArgument", _knows("x-amz-checksum-crc64nvme"))("raced")
    Store(store.url(), store.access).publish_bytes(b"first", "x")
    (tmp_path / "x").write_bytes(b"second")
    assert not store._files.write(tmp_path / "x", store.full_path("x"), lambda call: call(0), create=True)
    assert store.read_bytes("x") == b"first"


@pytest.mark.parametrize(("status", "code"), [(400, "InvalidArgument"), (501, "NotImplemented")])
def test_a_server_that_has_no_parts_when_it_is_read(refusing: Refuse, tmp_path: Any, status: int, code: str) -> None:
    """What another tool wrote in parts can be held against its size alone."""
    store = refusing(status, code, lambda method, path, headers: "partNumber" in path and method == "HEAD")(f"n/{code}")
    (tmp_path / "x").write_bytes(bytes(12 * MIB))
    store._files._fs.put_file(str(tmp_path / "x"), store.full_path("x"), chunksize=5 * MIB)  # type: ignore[attr-defined]
    assert not store.download("x", tmp_path / "copy").can_check
    assert (tmp_path / "copy").read_bytes() == bytes(12 * MIB)
    assert store.access.retries.counts() == {}


@pytest.mark.parametrize(("status", "code"), [(403, "AccessDenied"), (501, "NotImplemented")])
def test_uploads_that_cannot_be_listed_stop_nothing(
    refusing: Refuse, caplog: pytest.LogCaptureFixture, status: int, code: str
) -> None:
    store = refusing(status, code, lambda method, path, headers: "uploads" in path and method == "GET")("unlisted")
    with caplog.at_level(logging.WARNING):
        assert store.sweep("shards") == 0
    assert code in caplog.text and "incomplete uploads" in caplog.text
    assert store.access.retries.counts() == {}


def test_without_the_right_to_list_a_missing_file_is_gone(refusing: Refuse) -> None:
    store = refusing(403, "AccessDenied", lambda method, path, headers: "list-type=2" in path)("unlisted")
    store.publish_bytes(b"here", "x")
    assert store.read_bytes("x") == b"here"
    with pytest.raises(FileNotFoundError):
        store.read_bytes("y")
    with pytest.raises(StorageError, match="permission denied"):
        list(store.list())


def test_an_upload_that_the_server_lost_is_begun_anew_at_once(
    s3_server: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 * MIB)
    store = Store(s3_server.url("lost"), s3_server.access(20.0))
    files: Any = store._files
    call, begun = files._call, []

    def abort_the_first(method: str, number: int, size: int = 0, **wanted: Any) -> dict[str, Any]:
        answer: dict[str, Any] = call(method, number, size, **wanted)
        if method == "create_multipart_upload":
            begun.append(answer["UploadId"])
            if len(begun) == 1:
                where = {name: wanted[name] for name in ("Bucket", "Key")}
                call("abort_multipart_upload", 0, **where, UploadId=answer["UploadId"])
        return answer

    monkeypatch.setattr(files, "_call", abort_the_first)
    (tmp_path / "x").write_bytes(bytes(12 * MIB))
    store.publish(tmp_path / "x", "x")
    assert len(begun) == 2 and store.access.retries.counts() == {"404 NoSuchUpload": 1}
    assert store.size("x") == 12 * MIB
