"""The fault proxy does what it says, in front of a real server that checks signatures."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import botocore.exceptions
import pytest
from fault_proxy import KINDS, FaultProxy
from s3_servers import S3Server

DATA = bytes(range(256)) * 1000


@pytest.fixture
def open_client() -> Any:
    """open_client(server) → a botocore client that tries once."""
    opened = []

    def open_one(server: S3Server, secret: str | None = None, patience_s: float = 20) -> Any:
        asked = replace(server, secret=secret or server.secret)
        opened.append(asked.client(retries={"total_max_attempts": 1}, read_timeout=patience_s))
        return opened[-1]

    yield open_one
    for client in opened:
        client.close()


def _get(client: Any, server: S3Server, key: str) -> bytes:
    return client.get_object(Bucket=server.bucket, Key=key)["Body"].read()


def test_without_faults_all_passes_and_signatures_are_checked(
    faulty: Callable[..., FaultProxy], open_client: Callable[..., Any]
) -> None:
    proxy = faulty()
    client, where = open_client(proxy.s3), {"Bucket": proxy.s3.bucket}
    for name in ("proxy/plain", "proxy/a b/été+%25 (2).mp4", "proxy/empty"):
        data = b"" if name.endswith("empty") else DATA
        client.put_object(**where, Key=name, Body=data)
        assert _get(client, proxy.s3, name) == data
        assert client.head_object(**where, Key=name)["ContentLength"] == len(data)
    upload = client.create_multipart_upload(**where, Key="proxy/parts")["UploadId"]
    part = {"UploadId": upload, "PartNumber": 1, "Key": "proxy/parts"}
    etag = client.upload_part(**where, **part, Body=DATA)["ETag"]
    done = {"Parts": [{"ETag": etag, "PartNumber": 1}]}
    client.complete_multipart_upload(**where, Key="proxy/parts", UploadId=upload, MultipartUpload=done)
    assert client.get_object(**where, Key="proxy/parts", Range="bytes=5-9")["Body"].read() == DATA[5:10]
    listed = client.list_objects_v2(**where, Prefix="proxy/")["Contents"]
    assert {o["Key"] for o in listed} >= {"proxy/plain", "proxy/parts"}
    with pytest.raises(botocore.exceptions.ClientError, match="SignatureDoesNotMatch"):
        _get(open_client(proxy.s3, secret="wrong"), proxy.s3, "proxy/plain")
    assert not proxy.counts
    assert f"GET /{proxy.s3.bucket}?list-type&prefix&encoding-type" in proxy.requests


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_happens_as_often_as_it_says(
    kind: str, s3_server: S3Server, faulty: Callable[..., FaultProxy], open_client: Callable[..., Any]
) -> None:
    direct, key = open_client(s3_server), f"proxy/{kind}"
    direct.put_object(Bucket=s3_server.bucket, Key=key, Body=DATA)
    writes = kind in ("flip_upload", "wrong_etag", "lost")
    proxy = faulty(kind, share=0.5)
    client = open_client(proxy.s3, patience_s=0.5 if kind == "stall" else 20)
    wrong = []
    for i in range(6):
        body = DATA + bytes([i])
        try:
            if writes:
                answer = client.put_object(Bucket=s3_server.bucket, Key=key, Body=body)
                if answer["ETag"].strip('"') != hashlib.md5(body).hexdigest():
                    wrong.append("etag")
            elif (got := _get(client, proxy.s3, key)) != DATA:
                wrong.append(f"{sum(a != b for a, b in zip(got, DATA, strict=True))} bytes")
        except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as e:
            wrong.append(e.response["Error"]["Code"] if isinstance(e, botocore.exceptions.ClientError) else repr(e))
            if kind == "lost":  # the server did it all the same
                assert _get(direct, s3_server, key) == body
    assert proxy.counts == {kind: 3}
    told = {
        "500": "InternalError",
        "503": "SlowDown",
        "expired": "ExpiredToken",
        "skew": "RequestTimeTooSkewed",
        "denied": "AccessDenied",
        "reset": "ConnectionClosedError",
        "lost": "ConnectionClosedError",
        "stall": "ReadTimeoutError",
        "truncate": "IncompleteRead",
        "flip": "FlexibleChecksumError",
        "flip_upload": "BadDigest",
        "wrong_etag": "etag",
    }
    assert len(wrong) == 3
    assert all(told[kind] in text for text in wrong), wrong
    proxy.faults = None
    assert len(_get(client, proxy.s3, key)) >= len(DATA)


def test_down_refuses_and_up_serves_again(faulty: Callable[..., FaultProxy], open_client: Callable[..., Any]) -> None:
    proxy = faulty()
    client = open_client(proxy.s3)
    client.put_object(Bucket=proxy.s3.bucket, Key="proxy/down", Body=DATA)
    for _ in range(2):
        proxy.down()
        with pytest.raises(botocore.exceptions.EndpointConnectionError):
            _get(client, proxy.s3, "proxy/down")
        proxy.up()
        assert _get(client, proxy.s3, "proxy/down") == DATA


def test_a_killed_server_comes_back_with_its_data(weed_server: Any, open_client: Callable[..., Any]) -> None:
    client = open_client(weed_server.s3)
    client.put_object(Bucket=weed_server.s3.bucket, Key="proxy/again", Body=DATA)
    weed_server.kill()
    with pytest.raises(botocore.exceptions.EndpointConnectionError):
        _get(client, weed_server.s3, "proxy/again")
    weed_server.start()
    assert _get(client, weed_server.s3, "proxy/again") == DATA


def test_every_server_keeps_what_is_written(any_s3: S3Server, open_client: Callable[..., Any]) -> None:
    client = open_client(any_s3)
    client.put_object(Bucket=any_s3.bucket, Key="proxy/kept", Body=DATA)
    assert _get(client, any_s3, "proxy/kept") == DATA
    with pytest.raises(botocore.exceptions.ClientError, match="SignatureDoesNotMatch"):
        _get(open_client(any_s3, secret="wrong"), any_s3, "proxy/kept")
