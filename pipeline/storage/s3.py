"""Files of S3 and what speaks it: by the client that s3fs sets up, with checksums on every transfer.

- Requests are those of s3_client.py: one at a time, each with a deadline.
- What is written carries a CRC-64/NVME, as a checksum that the server checks and keeps (where it does), and among the
  object's own metadata. After the write the server's size and checksum (or MD5) are held against the file.
- Files above PART_BYTES are uploaded in parts, several at a time; an upload that fails is aborted, and `sweep` aborts
  those of killed writers.
- `create` is `If-None-Match: *`. Some servers ignore it: `creates_exclusively` finds out by trying.
- A server that refuses a checksum of this kind, or `If-None-Match`, is asked without it; its ETag is held against then.
- Listing goes page by page, and where there are folders, several of them at a time.
- Ranges are read by obstore (s3_ranges.py), which is faster. What it cannot read is tried again by botocore's client,
  and errors are that one's.
"""

from __future__ import annotations

import hashlib
import logging
import os
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from reelmae.pipeline.storage.access import interruptible
from reelmae.pipeline.storage.causes import Cause, CausedError, WrongBytesError, find_cause
from reelmae.pipeline.storage.checks import (
    METADATA,
    Content,
    as_base64,
    content_of,
    crc64_of_file,
    crc64nvme,
    md5_of_parts,
)
from reelmae.pipeline.storage.files import Attempt, Found
from reelmae.pipeline.storage.retry import deadline
from reelmae.pipeline.storage.s3_client import S3Client, code_of, is_refused, status_of
from reelmae.pipeline.storage.s3_list import list_keys
from reelmae.pipeline.storage.s3_ranges import ranges_of

PART_BYTES = 16 << 20
PARTS = 4  # of one file that are uploaded at a time
MAX_PARTS = 10_000
PROBE = ".reelmae-probe-"  # names by which `creates_exclusively` tries
_NO_RIGHT = ("AccessDenied", "AllAccessDisabled", "403")
_log = logging.getLogger("reelmae.storage")


class S3Files(S3Client):
    """Files (see files.Files) of one bucket, by an s3fs file system."""

    reads_ranges = True

    def __init__(self, fs: Any, root: str) -> None:
        super().__init__(fs)
        bucket, _, _ = fs.split_path(root)
        self._ranges = ranges_of(fs, bucket)

    def list(self, full: str, attempt: Attempt[Any]) -> Iterator[Found]:
        """Every object below a prefix, sorted by the whole key.

        An empty object whose key ends in "/" marks a folder and is not a file.
        """
        bucket, key = self._split(full)

        def page(wanted: dict[str, Any]) -> dict[str, Any]:
            answer: dict[str, Any] = attempt(lambda n: self._call("list_objects_v2", n, Bucket=bucket, **wanted))
            return answer

        # the slash keeps `raw2` out of a listing of `raw`
        for found in list_keys(page, f"{key}/" if key else ""):
            name, size = found["Key"], int(found.get("Size") or 0)
            if not name.endswith("/") or size:
                etag = found.get("ETag") or found.get("LastModified") or ""
                yield Found(f"{bucket}/{name}", size, str(etag).strip('"'))

    def exists(self, full: str, number: int) -> bool:
        """Whether there is such an object, or one below it."""
        bucket, key = self._split(full)
        if key:
            try:
                self.look(full, number)
                return True
            except FileNotFoundError:
                pass
        prefix = f"{key.rstrip('/')}/" if key else ""
        found = self._call("list_objects_v2", number, Bucket=bucket, Prefix=prefix, MaxKeys=1)
        return not key or bool(found.get("Contents"))

    def look(self, full: str, number: int) -> Content:
        """Size, ETag and checksum."""
        bucket, key = self._split(full)
        head = self._find(bucket, key, number)
        if head is None:
            if self._is_listed(bucket, key, number):
                raise WrongBytesError("the server lists it and does not give it")
            raise FileNotFoundError(full)
        content = content_of(head)
        return content if not content.parts else self._with_part_size(bucket, key, content, number)

    def _find(self, bucket: str, key: str, number: int) -> dict[str, Any] | None:
        """The answer to HEAD; None where the server says that there is no such object."""
        try:
            return self._head(bucket, key, number)
        except Exception as e:
            cause = find_cause(e)
            if cause is None or cause.kind != "gone":
                raise
            return None

    def _is_listed(self, bucket: str, key: str, number: int) -> bool:
        """Whether a listing has this key; False where these credentials may not list."""
        try:
            found = self._call("list_objects_v2", number, Bucket=bucket, Prefix=key, MaxKeys=1)
        except Exception as e:
            if code_of(e) in _NO_RIGHT:
                return False
            raise
        return any(entry["Key"] == key for entry in found.get("Contents", ()))

    def _with_part_size(self, bucket: str, key: str, content: Content, number: int) -> Content:
        """The content with the size of its first part, where the server tells it."""
        try:
            try:
                first = self._head(bucket, key, number, PartNumber=1)
            except CausedError:  # it has just answered GET: what it refuses again is the number
                first = self._call("head_object", number, Bucket=bucket, Key=key, PartNumber=1)
        except Exception as e:
            cause = find_cause(e)
            if cause is None or cause.kind == "passing":
                raise
            return content  # it has no such thing as parts when it is read
        size = int(first.get("ContentLength") or 0)
        if content.etag != str(first.get("ETag", "")).strip('"') or not 0 < size <= content.size:
            return content
        if -(-content.size // size) != content.parts:
            return content
        return Content(content.size, content.etag, content.algorithm, content.checksum, content.parts, size)

    def read(self, full: str, offset: int, size: int, number: int) -> bytes | memoryview:
        """A range, by obstore at first, of which the memory is used as it is."""
        if not size:
            return b""
        if number == 0:
            data = self._ranges.read(full, offset, size)
            if data is not None:
                return data
        try:
            return self._read_by_client(full, offset, size, number)
        except Exception as e:
            if status_of(e) == 416:
                return b""
            raise

    def _read_by_client(self, full: str, offset: int, size: int, number: int) -> bytes:
        bucket, key = self._split(full)
        span = f"bytes={offset}-{offset + size - 1}"
        answer = self._call("get_object", number, size, Bucket=bucket, Key=key, Range=span)
        if number == 0:
            self._ranges.note_other_way(full)
        return bytes(answer["Body"])

    def read_start(self, full: str, size: int, number: int) -> tuple[bytes, Content]:
        """The first bytes and what is said of the object, by one request where that says enough."""
        bucket, key = self._split(full)
        try:
            answer = self._call("get_object", number, size, Bucket=bucket, Key=key, Range=f"bytes=0-{size - 1}")
        except Exception as e:
            if status_of(e) == 416:  # it is empty
                return b"", self.look(full, number)
            raise
        data, total = bytes(answer["Body"]), str(answer.get("ContentRange") or "").rpartition("/")[2]
        answer["ContentLength"] = int(total) if total.isdecimal() else len(data)
        content = content_of(answer)
        return data, content if content.can_check else self.look(full, number)

    def copy_out(self, full: str, to: Path, number: int) -> None:
        """The whole object, range after range. Store reads several ranges at a time instead."""
        size = self.look(full, number).size
        with to.open("wb") as file:
            for offset in range(0, size, PART_BYTES):
                file.write(self.read(full, offset, min(PART_BYTES, size - offset), number))

    def write(self, local: Path, full: str, attempt: Attempt[Any], *, create: bool) -> bool:
        """Put a file, or upload it in parts; with `create`, False where the name is taken."""
        checksum, size = crc64_of_file(local), local.stat().st_size
        if size <= PART_BYTES:
            return bool(attempt(lambda n: self._put(local.read_bytes(), full, n, checksum, create=create)))
        return bool(attempt(lambda n: self._upload(local, full, n, attempt, checksum, create=create)))

    def _put(self, data: bytes, full: str, number: int, checksum: int, *, create: bool) -> bool:
        bucket, key = self._split(full)
        wanted: dict[str, Any] = {"Bucket": bucket, "Key": key, "Body": data}
        wanted["Metadata"] = {METADATA: as_base64(checksum)}
        headers = {"ChecksumCRC64NVME": as_base64(checksum)} | ({"IfNoneMatch": "*"} if create else {})
        try:
            answer = self._call_with(headers, "put_object", number, len(data), **wanted)
        except Exception as e:
            if create and status_of(e) == 412:
                return self._is_ours(full, number, checksum)
            raise
        self._hold_against(
            answer, checksum, lambda: hashlib.md5(data, usedforsecurity=False).hexdigest(), full, len(data), number
        )
        return True

    def _hold_against(
        self, answer: dict[str, Any], checksum: int, md5: Callable[[], str], full: str, size: int, number: int
    ) -> None:
        """WrongBytesError where the server has other bytes than those that were sent."""
        told = answer.get("ChecksumCRC64NVME")
        if told is None or "ContentLength" not in answer:
            bucket, key = self._split(full)
            there = self._find(bucket, key, number)
            if there is None:
                raise WrongBytesError("it was written and is not there")
            answer = there
            told = answer.get("ChecksumCRC64NVME") or told
            if answer["ContentLength"] != size:
                raise WrongBytesError(f"{size} bytes were sent, {answer['ContentLength']} are there")
        etag = str(answer.get("ETag") or "").strip('"')
        if told is not None:
            right = told == as_base64(checksum)
        else:  # no checksums at this server: its ETag is the MD5, or says nothing
            encrypted = "ServerSideEncryption" in answer or "SSECustomerAlgorithm" in answer
            right = len(etag.partition("-")[0]) != 32 or encrypted or etag == md5()
        if not right:
            raise WrongBytesError("the server has other bytes than those that were sent")

    def _upload(
        self, local: Path, full: str, number: int, attempt: Attempt[Any], checksum: int, *, create: bool
    ) -> bool:
        """Upload in parts. Each part is tried again by itself."""
        bucket, key = self._split(full)
        where: dict[str, Any] = {"Bucket": bucket, "Key": key}
        size = local.stat().st_size
        part = max(PART_BYTES, -(-size // MAX_PARTS))
        headers = {"ChecksumAlgorithm": "CRC64NVME", "ChecksumType": "FULL_OBJECT"}
        metadata = {METADATA: as_base64(checksum)}
        begun = self._call_with(headers, "create_multipart_upload", number, **where, Metadata=metadata)
        where["UploadId"] = begun["UploadId"]

        def send(index: int) -> dict[str, Any]:
            with local.open("rb") as file:
                data = os.pread(file.fileno(), part, index * part)
            crc = as_base64(crc64nvme(data))
            wanted = {**where, "PartNumber": index + 1, "Body": data}

            def put(n: int) -> dict[str, Any] | None:
                try:
                    return self._call_with({"ChecksumCRC64NVME": crc}, "upload_part", n, len(data), **wanted)
                except Exception as e:
                    if code_of(e) == "NoSuchUpload":
                        return None
                    raise

            answer = attempt(put)
            if answer is None:  # no part will ever go there: the whole is begun anew
                raise CausedError(Cause("passing", "404 NoSuchUpload", "the server lost the upload"))
            sent = {"PartNumber": index + 1, "ETag": answer["ETag"]}
            return sent | ({"ChecksumCRC64NVME": crc} if answer.get("ChecksumCRC64NVME") else {})

        try:
            with ThreadPoolExecutor(PARTS, thread_name_prefix="reelmae-upload") as pool, interruptible(pool):
                sent = list(pool.map(send, range(-(-size // part))))
            parts, headers = {"Parts": sent}, {"IfNoneMatch": "*"} if create else {}
            answer = self._call_with(headers, "complete_multipart_upload", number, size, **where, MultipartUpload=parts)
            self._hold_against(answer, checksum, lambda: md5_of_parts(local, part), full, size, number)
        except Exception as e:
            self._abort(where, number)
            if create and status_of(e) == 412:
                return self._is_ours(full, number, checksum)
            raise
        return True

    def _is_ours(self, full: str, number: int, checksum: int) -> bool:
        """Whether a name that is taken was taken by an earlier try of ours, of which the answer was lost."""
        return number > 0 and self.look(full, number).checksum == checksum.to_bytes(8, "big")

    def _abort(self, where: dict[str, Any], number: int) -> None:
        """Drop an upload; what cannot be dropped now is swept by the next job."""
        try:
            self._call("abort_multipart_upload", number, **where)
        except Exception as e:
            if find_cause(e) is None:
                raise

    def creates_exclusively(self, full: str, attempt: Attempt[Any]) -> bool:
        """Try with a file of its own name: the second creation must be refused."""
        probe = f"{full}/{PROBE}{uuid.uuid4().hex}"
        attempt(lambda n: self._put(b"probe", probe, n, crc64nvme(b"probe"), create=False))
        try:
            other = b"other bytes, so that a second try does not take the first file for its own"
            return not attempt(lambda n: self._put(other, probe, n, crc64nvme(other), create=True))
        finally:
            attempt(lambda n: self.remove(probe, n))

    def remove(self, full: str, number: int) -> None:
        """Remove one object."""
        bucket, key = self._split(full)
        self._call("delete_object", number, Bucket=bucket, Key=key)

    def sweep(self, full: str, attempt: Attempt[Any]) -> int:
        """Abort the uploads in parts of killed writers at this path and below, and remove what they tried beside it."""
        bucket, key = self._split(full)
        beside = f"{key.rpartition('/')[0]}/" if "/" in key else ""
        tried = attempt(lambda n: self._call("list_objects_v2", n, Bucket=bucket, Prefix=f"{beside}{PROBE}"))
        for found in tried.get("Contents", ()):
            attempt(partial(self.remove, f"{bucket}/{found['Key']}"))
        wanted: dict[str, Any] = {"Bucket": bucket, "Prefix": key}
        swept = 0
        while True:
            page = attempt(partial(self._list_uploads, wanted))
            for upload in page.get("Uploads", ()):
                if not key or upload["Key"] == key or upload["Key"].startswith(f"{key}/"):
                    where: dict[str, Any] = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                    self._abort(where, 0)
                    swept += 1
            if not page.get("IsTruncated") or not page.get("NextKeyMarker"):
                return swept
            wanted["KeyMarker"] = page["NextKeyMarker"]
            wanted["UploadIdMarker"] = page.get("NextUploadIdMarker") or ""

    def _list_uploads(self, wanted: dict[str, Any], number: int) -> dict[str, Any]:
        """A page of uploads in parts; none where the server, or the rights of these credentials, have no such listing."""
        try:
            return self._call("list_multipart_uploads", number, **wanted)
        except Exception as e:
            if not is_refused(e) and code_of(e) not in _NO_RIGHT:
                raise
            _log.warning(
                "s3://%s: uploads in parts of killed jobs cannot be listed (%s), so they stay; let the bucket abort "
                "incomplete uploads after a day",
                wanted["Bucket"],
                code_of(e) or status_of(e),
            )
            return {}

    def describe(self) -> dict[str, Any]:
        """Facts for people."""
        self._run(self._fs.set_session(), deadline(2))
        meta = self._fs.s3.meta
        return {"kind": "s3", "endpoint": meta.endpoint_url, "region": meta.region_name}
