"""What a store says of an object's content, and whether bytes are that content.

S3 keeps a checksum that the writer or the server made: of the whole object (`FULL_OBJECT`), or of the checksums of its
parts (`COMPOSITE`). Without encryption by KMS, the ETag is the MD5 of an object that was written at once, and the MD5
of the parts' MD5s, then `-` and their number, of one written in parts
(docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity.html). Of parts we only know the size of the
first; all but the last are taken to have it, which is what all clients do. Where a server keeps no checksums, the one
that reelmae put among the object's own metadata counts.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from awscrt import checksums

METADATA = "reelmae-crc64nvme"  # our own checksum among an object's metadata, base64
_MD5 = re.compile(r"[0-9a-f]{32}")
_PARTS = re.compile(r"([0-9a-f]{32})-(\d+)")
_CHUNK = 1 << 20


def crc64nvme(data: bytes | memoryview, before: int = 0) -> int:
    """CRC-64/NVME of bytes, continued from that of the bytes before them."""
    return int(checksums.crc64nvme(data, before))


class _Crc:
    """A CRC of some bits, with hashlib's manners."""

    def __init__(self, function: Callable[[bytes, int], int], size: int) -> None:
        self._function, self._size, self._value = function, size, 0

    def update(self, data: bytes) -> None:
        self._value = self._function(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(self._size, "big")


_ALGORITHMS: dict[str, Callable[[], Any]] = {
    "CRC64NVME": lambda: _Crc(checksums.crc64nvme, 8),
    "CRC32C": lambda: _Crc(checksums.crc32c, 4),
    "CRC32": lambda: _Crc(checksums.crc32, 4),
    "SHA256": hashlib.sha256,
    "SHA1": hashlib.sha1,
    "MD5": lambda: hashlib.md5(usedforsecurity=False),
}


@dataclass(frozen=True)
class Content:
    """What a store says of one object."""

    size: int
    etag: str = ""
    algorithm: str = ""
    """Of the checksum: a name of S3, or MD5; "" where there is none."""
    checksum: bytes = b""
    parts: int = 0
    """0: the checksum is of the whole object; else it is of this number of parts' checksums."""
    part_size: int = 0
    """Bytes of each part but the last; 0 where it is not known yet."""

    @property
    def can_check(self) -> bool:
        """Whether bytes can be held against it by more than their number."""
        return bool(self.algorithm) and (not self.parts or self.part_size > 0)


def content_of(head: Mapping[str, Any]) -> Content:
    """What an S3 server said of an object, as boto's `head_object` and `get_object` give it."""
    size, etag = int(head.get("ContentLength") or 0), str(head.get("ETag") or "").strip('"')
    own = (head.get("Metadata") or {}).get(METADATA)
    if own:
        return Content(size, etag, "CRC64NVME", base64.b64decode(own))
    for name in _ALGORITHMS:
        if text := str(head.get(f"Checksum{name}") or ""):
            value, _, parts = text.partition("-")
            composite = head.get("ChecksumType") == "COMPOSITE" or bool(parts)
            if not composite:
                return Content(size, etag, name, base64.b64decode(value))
            if parts.isdecimal():
                return Content(size, etag, name, base64.b64decode(value), int(parts))
    if head.get("ServerSideEncryption") in ("aws:kms", "aws:kms:dsse") or head.get("SSECustomerAlgorithm"):
        return Content(size, etag)
    if _MD5.fullmatch(etag):
        return Content(size, etag, "MD5", bytes.fromhex(etag))
    if found := _PARTS.fullmatch(etag):
        return Content(size, etag, "MD5", bytes.fromhex(found.group(1)), int(found.group(2)))
    return Content(size, etag)


def content_of_info(info: Mapping[str, Any]) -> Content:
    """What another file system said, as fsspec's `info` gives it: an MD5 in base64 is found where it gives one."""
    size = int(info.get("size") or 0)
    etag = str(info.get("ETag") or info.get("etag") or info.get("mtime") or "").strip('"')
    md5 = info.get("md5Hash") or (info.get("content_settings") or {}).get("content_md5")
    if isinstance(md5, str):
        md5 = base64.b64decode(md5)
    return Content(size, etag, "MD5", bytes(md5)) if md5 else Content(size, etag)


class ContentCheck:
    """Holds the bytes of an object, given in order, against what the store says of it."""

    def __init__(self, content: Content) -> None:
        self._content = content
        self._size = 0
        make = _ALGORITHMS[content.algorithm] if content.can_check else None
        self._make, self._whole = make, make() if make else None
        self._digests: list[bytes] = []  # of parts that are complete

    def update(self, data: bytes | memoryview) -> None:
        """The next bytes."""
        self._size += len(data)
        if self._whole is None or self._make is None:
            return
        if not self._content.parts:
            self._whole.update(data)
            return
        view, part = memoryview(data), self._content.part_size
        begin = self._size - len(data)
        while view:
            room = part - begin % part
            self._whole.update(view[:room])
            begin += min(room, len(view))
            view = view[room:]
            if begin % part == 0:
                self._close_part()

    def _close_part(self) -> None:
        assert self._make is not None and self._whole is not None
        self._digests.append(self._whole.digest())
        self._whole = self._make()

    def fault(self) -> str:
        """What is wrong with the bytes, all of which have been given; "" where nothing is."""
        content = self._content
        if self._size != content.size:
            return f"{self._size} bytes came, {content.size} are there"
        if self._whole is None or self._make is None:
            return ""
        if content.parts:
            if self._size % content.part_size or not self._size:
                self._close_part()
            if len(self._digests) != content.parts:
                return ""  # written in parts of several sizes: it cannot be checked
            digest = self._make()
            digest.update(b"".join(self._digests))
        else:
            digest = self._whole
        return "" if digest.digest() == content.checksum else f"wrong {content.algorithm}"


def crc64_of_file(path: Path) -> int:
    """CRC-64/NVME of a local file."""
    value = 0
    with path.open("rb") as file:
        for data in _pieces(file):
            value = crc64nvme(data, value)
    return value


def md5_of_parts(path: Path, part_size: int) -> str:
    """The ETag that a server without KMS gives a file that is uploaded in parts of this size; 0: at once."""
    digests, size = [], path.stat().st_size
    with path.open("rb") as file:
        for begin in range(0, max(size, 1), part_size or max(size, 1)):
            part = hashlib.md5(usedforsecurity=False)
            left = min(part_size or size, size - begin)
            while left > 0 and (data := file.read(min(left, _CHUNK))):
                part.update(data)
                left -= len(data)
            digests.append(part.digest())
    if not part_size:
        return digests[0].hex()
    return f"{hashlib.md5(b''.join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}"


def as_base64(value: int, size: int = 8) -> str:
    """A checksum as S3's headers write it."""
    return base64.b64encode(value.to_bytes(size, "big")).decode()


def _pieces(file: Any) -> Iterator[bytes]:
    while data := file.read(_CHUNK):
        yield data
