"""Why an operation of a store failed, from the exception that any file system raised.

    gone      there is no such file
    passing   it may work later: refused, reset, timed out, 5xx, SlowDown, an expired token, a skewed clock, wrong bytes
    final     it will fail again: wrong keys, no rights, a missing bucket
    full      there is no room

Exceptions are recognised by what they carry (errno, status, S3's error code), so that no client library is imported.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from reelmae.pipeline.errors import InputError, StorageError, StorageFullError

Kind = Literal["gone", "passing", "final", "full"]


class WrongBytesError(OSError):
    """What was read or written is not what the store says it holds."""


class CausedError(OSError):
    """A failure of which the cause is known already."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(cause.words)
        self.cause = cause


@dataclass(frozen=True)
class Cause:
    """Why an operation failed."""

    kind: Kind
    short: str
    """A few words, by which retries are counted."""
    words: str
    """For people, with a remedy where there is one."""
    error: type[Exception] = StorageError
    """What is raised in the end."""


_SKEW = "the clock of this machine differs from the server's; set it"
_PASSING_CODES = {
    "ExpiredToken": "the token has expired; renew the credentials",
    "ExpiredTokenException": "the token has expired; renew the credentials",
    "RequestTimeTooSkewed": _SKEW,
    "RequestExpired": _SKEW,
    "RequestInTheFuture": _SKEW,
    "SlowDown": "the server asks to slow down",
    "Throttling": "the server asks to slow down",
    "ThrottlingException": "the server asks to slow down",
    "TooManyRequests": "the server asks to slow down",
    "TooManyRequestsException": "the server asks to slow down",
    "RequestTimeout": "the server waited for bytes that did not come",
    "BadDigest": "the bytes arrived damaged",
    "InvalidDigest": "the bytes arrived damaged",
    "XAmzContentSHA256Mismatch": "the bytes arrived damaged",
    "XAmzContentChecksumMismatch": "the bytes arrived damaged",
    "IncompleteBody": "the bytes arrived damaged",
    "OperationAborted": "another request was under way",
    "ConditionalRequestConflict": "another request was under way",
    "NoSuchUpload": "the server lost the upload",
    "InvalidPart": "the server lost a part of the upload",
}
_KEY_CODES = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "InvalidClientTokenId", "AuthFailure")
_KEYS = "the keys are not accepted ({code}); check the credentials"
_RIGHTS = "permission denied ({code}); check the rights of these credentials"
_BUCKET = "no such bucket; check its name and the endpoint"
_NETWORK_ERRNO = {
    errno.ECONNREFUSED: "connection refused",
    errno.ECONNRESET: "connection reset",
    errno.ECONNABORTED: "connection reset",
    errno.EPIPE: "connection reset",
    errno.ETIMEDOUT: "timed out",
    errno.ENETUNREACH: "network unreachable",
    errno.EHOSTUNREACH: "host unreachable",
    errno.ENETDOWN: "network unreachable",
    errno.ENOTCONN: "connection reset",
    errno.ESTALE: "stale file handle",
    errno.EIO: "input/output error",
    errno.EREMOTEIO: "input/output error",
    errno.EAGAIN: "busy",
    errno.EBUSY: "busy",
    errno.EINTR: "interrupted",
}
# by the names of exception classes of botocore, aiohttp, urllib3, requests, fsspec
_PASSING_CLASSES = {
    "EndpointConnectionError": "connection refused",
    "ClientConnectorError": "connection refused",
    "ClientConnectorDNSError": "host not found",
    "ConnectTimeoutError": "timed out",
    "ReadTimeoutError": "timed out",
    "TimeoutError": "timed out",
    "FSTimeoutError": "timed out",
    "ServerTimeoutError": "timed out",
    "SocketTimeoutError": "timed out",
    "ConnectionTimeoutError": "timed out",
    "ConnectionClosedError": "connection reset",
    "ServerDisconnectedError": "connection reset",
    "ClientOSError": "connection reset",
    "ClientConnectionResetError": "connection reset",
    "ClientPayloadError": "answer cut short",
    "ContentLengthError": "answer cut short",
    "TransferEncodingError": "answer cut short",
    "IncompleteReadError": "answer cut short",
    "IncompleteRead": "answer cut short",
    "ResponseStreamingError": "answer cut short",
    "ResponseParserError": "answer not understood",
    "BadStatusLine": "answer not understood",
    "BadHttpMessage": "answer not understood",
    "FlexibleChecksumError": "checksum",
    "WrongBytesError": "checksum",
    "HTTPClientError": "connection failed",
    "ProxyConnectionError": "connection failed",
    "ConnectionError": "connection failed",
    "CredentialRetrievalError": "no credentials from their provider",
    "MetadataRetrievalError": "no credentials from their provider",
}
_FINAL_CLASSES = {
    "NoCredentialsError": "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give storage options",
    "PartialCredentialsError": "half of the credentials are missing; give key and secret",
    "ProfileNotFound": "no such profile; check AWS_PROFILE",
    "ClientConnectorCertificateError": "the server's certificate is not trusted",
    "SSLError": "the server's certificate is not trusted",
    "InvalidBucketName": "is no valid bucket name",
    "ParamValidationError": "the request is refused by the client; check the URL",
}
_CLIENTS = ("botocore", "aiobotocore", "aiohttp", "urllib3", "requests", "gcsfs", "google", "adlfs", "azure", "obstore")
_OBSTORE_CODE = re.compile(r"<Code>(\w+)</Code>")
_OBSTORE_STATUS = re.compile(r"status code: (\d{3})")
_OBSTORE_KIND = re.compile(r"kind: (Connect|Timeout|Interrupted|Request|Decode)\b")
_OBSTORE_KINDS = {"Connect": "connection refused", "Timeout": "timed out"}


def find_cause(error: BaseException) -> Cause | None:
    """Why an operation failed; None where the exception says nothing about the store (it is a fault of the code)."""
    if isinstance(error, CausedError):
        return error.cause
    chain = list(_chain(error))
    for e in chain:
        if isinstance(
            e, FileNotFoundError
        ):  # fsspec's http raises it for any failure: what it was raised from says more
            continue
        if cause := _of_answer(*_code(e)) or _of_class(e) or _of_errno(e):
            return cause
    if isinstance(error, FileNotFoundError):
        return Cause("gone", "gone", "no such file")
    if isinstance(error, OSError) or any(type(e).__module__.split(".")[0] in _CLIENTS for e in chain):
        text = str(error).partition("\n")[0] or type(error).__name__
        return Cause("final", type(error).__name__, f"{text}; check the URL, the credentials and the endpoint")
    return None


def obstore_cause(error: BaseException) -> Cause | None:
    """Why obstore failed, for causes that may pass; None for all others, which are better told by s3fs' client."""
    text = str(error)
    code, status = _OBSTORE_CODE.search(text), _OBSTORE_STATUS.search(text)
    if code or status:
        cause = _of_answer(code.group(1) if code else "", int(status.group(1)) if status else 0)
        return cause if cause is not None and cause.kind == "passing" else None
    if kind := _OBSTORE_KIND.search(text):
        short = _OBSTORE_KINDS.get(kind.group(1), "connection reset")
        return Cause("passing", short, short)
    if "body error" in text:
        return Cause("passing", "answer cut short", "answer cut short")
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception and those that it was raised from, the last one first; before one of botocore, what it wraps."""
    seen: BaseException | None = error
    while seen is not None:
        wrapped = getattr(seen, "kwargs", None)
        if isinstance(wrapped, dict) and isinstance(wrapped.get("error"), BaseException):
            yield wrapped["error"]
        yield seen
        seen = seen.__cause__  # not the context: what was tried before may have failed for another cause


def _code(error: BaseException) -> tuple[str, int]:
    """S3's error code and the HTTP status that an exception carries; "" and 0 where it has none."""
    answer: Any = getattr(error, "response", None)
    if isinstance(answer, dict):  # botocore's ClientError
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return str(answer.get("Error", {}).get("Code", "")), int(status or 0)
    for name in ("status", "status_code", "code"):  # aiohttp, azure and requests, gcsfs
        status = getattr(error, name, None)
        if isinstance(status, int) and 100 <= status < 600:
            return "", status
    return "", 0


def _of_answer(code: str, status: int) -> Cause | None:
    """The cause of an answer of a server."""
    if not code and not status:
        return None
    name = f"{status} {code}".strip() if status and code != str(status) else (code or str(status))
    if code in _PASSING_CODES:
        return Cause("passing", name, f"{name}: {_PASSING_CODES[code]}")
    if code == "NoSuchBucket":
        return Cause("final", name, _BUCKET, InputError)
    if code in ("NoSuchKey", "NotFound", "404") or (not code and status in (404, 410)):
        return Cause("gone", "gone", "no such file")
    if code in _KEY_CODES:
        return Cause("final", name, _KEYS.format(code=code))
    if code in ("InsufficientStorage", "EntityTooLarge", "QuotaExceeded") or status == 507:
        return Cause("full", name, f"no space left ({name})", StorageFullError)
    if (status >= 500 and status != 501) or status in (408, 425, 429):
        return Cause("passing", name, f"the server answers {name}")
    if status in (401, 403):
        return Cause("final", name, _RIGHTS.format(code=name))
    return Cause("final", name, f"the server answers {name}; check the URL and the endpoint")


def _of_class(error: BaseException) -> Cause | None:
    """The cause of an exception of a client library, by its class or a base class of it."""
    names = [c.__name__ for c in type(error).__mro__]
    if type(error).__module__ == "builtins" and isinstance(error, OSError) and error.errno is not None:
        return None  # its number says more
    for name in names:
        if name in _FINAL_CLASSES:
            return Cause("final", name, _FINAL_CLASSES[name])
        if name in _PASSING_CLASSES:
            short = _PASSING_CLASSES[name]
            return Cause("passing", short, f"{short} ({error})" if name == "WrongBytesError" else short)
    return None


def _of_errno(error: BaseException) -> Cause | None:
    """The cause of an OSError, by its number."""
    if not isinstance(error, OSError) or error.errno is None:
        return None
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return Cause("full", "no space left", "no space left", StorageFullError)
    if error.errno in (errno.EACCES, errno.EPERM):
        return Cause("final", "permission denied", "permission denied; check the rights or the credentials")
    if error.errno in _NETWORK_ERRNO:
        short = _NETWORK_ERRNO[error.errno]
        return Cause("passing", short, short)
    return Cause("final", error.strerror or str(error), f"{error.strerror or error}")
