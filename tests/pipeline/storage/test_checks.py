"""Bytes against what a store says of them."""

from __future__ import annotations

import base64
import hashlib
import random
import zlib
from pathlib import Path
from typing import Any

import pytest

from reelmae.pipeline.storage.checks import (
    METADATA,
    Content,
    ContentCheck,
    as_base64,
    content_of,
    content_of_info,
    crc64_of_file,
    crc64nvme,
    md5_of_parts,
)

DATA = random.Random(0).randbytes(2500)
PART = 1000


def _crc64(data: bytes) -> int:
    """CRC-64/NVME bit by bit, as the NVM Command Set Specification defines it."""
    crc = (1 << 64) - 1
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x9A6C9329AC4BC9B5 if crc & 1 else 0)
    return crc ^ ((1 << 64) - 1)


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _parts() -> list[bytes]:
    return [DATA[at : at + PART] for at in range(0, len(DATA), PART)]


def _composite_md5() -> str:
    return hashlib.md5(b"".join(hashlib.md5(p).digest() for p in _parts())).hexdigest() + "-3"


def _composite_crc32() -> str:
    crcs = b"".join(zlib.crc32(p).to_bytes(4, "big") for p in _parts())
    return _b64(zlib.crc32(crcs).to_bytes(4, "big")) + "-3"


def test_the_checksum_is_that_of_the_specification(tmp_path: Path) -> None:
    assert crc64nvme(b"123456789") == _crc64(b"123456789") == 0xAE8B14860A799888
    assert crc64nvme(DATA[700:], crc64nvme(DATA[:700])) == crc64nvme(DATA)
    (tmp_path / "x").write_bytes(DATA)
    assert crc64_of_file(tmp_path / "x") == crc64nvme(DATA)


HEADS: dict[str, dict[str, Any]] = {
    "crc64": {"ChecksumCRC64NVME": as_base64(_crc64(DATA)), "ChecksumType": "FULL_OBJECT"},
    "crc32": {"ChecksumCRC32": _b64(zlib.crc32(DATA).to_bytes(4, "big"))},
    "sha256": {"ChecksumSHA256": _b64(hashlib.sha256(DATA).digest())},
    "own": {"Metadata": {METADATA: as_base64(_crc64(DATA))}, "ETag": '"00000000000000000000000000000000"'},
    "md5": {"ETag": f'"{hashlib.md5(DATA).hexdigest()}"'},
    "parts md5": {"ETag": f'"{_composite_md5()}"'},
    "parts crc32": {"ChecksumCRC32": _composite_crc32(), "ChecksumType": "COMPOSITE"},
}


@pytest.mark.parametrize("kind", HEADS)
def test_right_bytes_pass_and_wrong_ones_do_not(kind: str) -> None:
    content = content_of({"ContentLength": len(DATA), **HEADS[kind]})
    if content.parts:
        assert not content.can_check
        content = Content(content.size, content.etag, content.algorithm, content.checksum, content.parts, PART)
    assert content.can_check
    for data, right in ((DATA, True), (DATA[:-1] + b"!", False), (DATA[:-1], False), (b"!" + DATA[1:], False)):
        for step in (1, 700, 5000):
            check = ContentCheck(content)
            for at in range(0, len(data), step):
                check.update(data[at : at + step])
            assert (check.fault() == "") is right, (kind, step)


@pytest.mark.parametrize(
    "head",
    [
        {"ETag": '"abc"'},
        {"ETag": f'"{hashlib.md5(b"cipher").hexdigest()}"', "ServerSideEncryption": "aws:kms"},
        {"ETag": f'"{_composite_md5()}"'},  # the size of its parts is not known
    ],
)
def test_without_a_checksum_the_size_is_held_against_it(head: dict[str, Any]) -> None:
    content = content_of({"ContentLength": len(DATA), **head})
    assert not content.can_check
    for data, fault in ((DATA, ""), (DATA[1:], "2499 bytes came, 2500 are there")):
        check = ContentCheck(content)
        check.update(data)
        assert check.fault() == fault


def test_an_empty_object_is_whole() -> None:
    content = content_of({"ContentLength": 0, "ETag": f'"{hashlib.md5().hexdigest()}"'})
    assert ContentCheck(content).fault() == ""


def test_other_file_systems_tell_an_md5_or_none() -> None:
    md5 = _b64(hashlib.md5(DATA).digest())
    assert content_of_info({"size": 2500, "md5Hash": md5}).checksum == hashlib.md5(DATA).digest()
    assert content_of_info({"size": 2500, "etag": "x"}) == Content(2500, "x")


def test_the_etag_of_an_upload_is_known_before(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(DATA)
    (tmp_path / "empty").write_bytes(b"")
    assert md5_of_parts(tmp_path / "x", PART) == _composite_md5()
    assert md5_of_parts(tmp_path / "x", 0) == hashlib.md5(DATA).hexdigest()
    assert md5_of_parts(tmp_path / "empty", 0) == hashlib.md5().hexdigest()
