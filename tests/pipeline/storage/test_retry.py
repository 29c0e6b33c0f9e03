"""What is tried again, for how long, and what is told."""

from __future__ import annotations

import errno
import logging
import threading
from typing import Any

import pytest

from reelmae.pipeline.errors import InputError, StorageError, StorageFullError
from reelmae.pipeline.storage import outage as outage_module
from reelmae.pipeline.storage import retry as retry_module
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.causes import find_cause, obstore_cause
from reelmae.pipeline.storage.outage import Outage
from reelmae.pipeline.storage.retry import deadline, retry


class AnswerError(Exception):
    """As botocore's ClientError carries an answer."""

    def __init__(self, status: int, code: str = "") -> None:
        super().__init__(f"An error occurred ({code})")
        self.response = {"Error": {"Code": code or str(status)}, "ResponseMetadata": {"HTTPStatusCode": status}}


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry_module, "FIRST_PAUSE_S", 0.001)


def _fails(times: int, error: Exception) -> Any:
    numbers: list[int] = []

    def call(number: int) -> list[int]:
        numbers.append(number)
        if len(numbers) <= times:
            raise error
        return numbers

    return call


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (OSError(errno.EIO, "I/O error"), "input/output error"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), "connection refused"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), "connection reset"),
        (TimeoutError(), "timed out"),
        (AnswerError(500, "InternalError"), "500 InternalError"),
        (AnswerError(503, "SlowDown"), "503 SlowDown"),
        (AnswerError(502), "502"),
        (AnswerError(429), "429"),
        (AnswerError(403, "ExpiredToken"), "403 ExpiredToken"),
        (AnswerError(400, "ExpiredToken"), "400 ExpiredToken"),
        (AnswerError(403, "RequestTimeTooSkewed"), "403 RequestTimeTooSkewed"),
        (AnswerError(400, "BadDigest"), "400 BadDigest"),
    ],
)
def test_what_may_pass_is_tried_again_and_counted(error: Exception, short: str) -> None:
    access = Access()
    assert retry(_fails(3, error), url="s3://b/x", access=access, outage=Outage()) == [0, 1, 2, 3]
    assert access.retries.counts() == {short: 3}


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (AnswerError(403, "AccessDenied"), StorageError, "permission denied .*rights"),
        (AnswerError(403, "InvalidAccessKeyId"), StorageError, "keys are not accepted .*credentials"),
        (AnswerError(403, "SignatureDoesNotMatch"), StorageError, "keys are not accepted"),
        (AnswerError(404, "NoSuchBucket"), InputError, "no such bucket"),
        (AnswerError(400, "MalformedThing"), StorageError, "400 MalformedThing"),
        (PermissionError(errno.EACCES, "Permission denied"), StorageError, "permission denied; check the rights"),
        (OSError(errno.ENOSPC, "No space"), StorageFullError, "no space left; free some.*run again"),
        (OSError(errno.EROFS, "Read-only file system"), StorageError, "Read-only file system"),
        (AnswerError(404, "NoSuchKey"), FileNotFoundError, "s3://b/x"),
        (FileNotFoundError(), FileNotFoundError, "s3://b/x"),
    ],
)
def test_what_will_not_pass_is_told_at_once(error: Exception, kind: type[Exception], words: str) -> None:
    access = Access()
    with pytest.raises(kind, match=words) as told:
        retry(_fails(9, error), url="s3://b/x", access=access, outage=Outage())
    assert "\n" not in str(told.value)
    assert access.retries.counts() == {}


def test_four_causes_are_four_lines() -> None:
    errors = (
        AnswerError(403, "InvalidAccessKeyId"),
        ConnectionRefusedError(errno.ECONNREFUSED, ""),
        AnswerError(403, "RequestTimeTooSkewed"),
        AnswerError(404, "NoSuchBucket"),
    )
    lines = []
    for error in errors:
        with pytest.raises((StorageError, InputError)) as told:
            retry(_fails(9, error), url="u", access=Access(patience_s=0), outage=Outage())
        lines.append(str(told.value))
    assert len(set(lines)) == 4
    assert [w for w, line in zip(("keys", "refused", "clock", "bucket"), lines, strict=True) if w not in line] == []


def test_the_cause_of_a_cause_counts() -> None:
    error = PermissionError("Access Denied")
    error.__cause__ = AnswerError(403, "ExpiredToken")
    cause = find_cause(error)
    assert cause is not None and cause.kind == "passing"


def test_what_failed_before_is_no_cause() -> None:
    try:
        try:
            raise FileNotFoundError("before")
        except FileNotFoundError:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "now") from None
    except OSError as e:
        cause = find_cause(e)
    assert cause is not None and cause.kind == "passing"


def test_a_fault_of_the_code_is_not_tried_again() -> None:
    with pytest.raises(ZeroDivisionError):
        retry(_fails(1, ZeroDivisionError()), url="u", access=Access(), outage=Outage())


def test_patience_ends_with_one_line_that_says_since_when() -> None:
    access = Access(patience_s=0.05)
    with pytest.raises(StorageError, match=r"s3://b/x: timed out; waited 0 s since \d\d:\d\d:\d\d \(\d+ tries\); run"):
        retry(_fails(10**9, TimeoutError()), url="s3://b/x", access=access, outage=Outage())
    assert access.retries.counts()["timed out"] >= 1


def test_without_patience_there_is_one_try() -> None:
    with pytest.raises(StorageError, match="1 tries"):
        retry(_fails(1, TimeoutError()), url="u", access=Access(patience_s=0), outage=Outage())


def test_who_stops_does_not_wait() -> None:
    access = Access()
    failed = threading.Event()

    def call(number: int) -> None:
        failed.set()
        raise TimeoutError

    errors: list[BaseException] = []

    def wait() -> None:
        try:
            retry(call, url="u", access=access, outage=Outage())
        except StorageError as e:
            errors.append(e)

    thread = threading.Thread(target=wait)
    thread.start()
    failed.wait()
    access.stop()
    thread.join()
    assert [str(e) for e in errors] == ["u: timed out; stopped"]


def test_a_file_that_is_listed_is_not_gone() -> None:
    access = Access()
    answers = iter([False, False])
    missing = _fails(2, FileNotFoundError())
    found = retry(missing, url="u", access=access, outage=Outage(), is_gone=lambda: next(answers))
    assert found == [0, 1, 2]
    assert sum(access.retries.counts().values()) == 2


def test_waiting_is_told_once_and_its_end_too(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outage_module, "TELL_AFTER_S", 0.0)
    outage, access = Outage(), Access()
    with caplog.at_level(logging.WARNING, "reelmae.storage"):
        for _ in range(2):
            retry(_fails(5, ConnectionResetError(errno.ECONNRESET, "")), url="s3://b/x", access=access, outage=outage)
    told = [r.getMessage() for r in caplog.records]
    assert [t.split(" since ")[0] for t in told[::2]] == ["waiting for s3://b/x"] * 2
    assert all(t.endswith(": connection reset") for t in told[::2])
    assert all(t.startswith("s3://b/x answers again after") for t in told[1::2])
    assert len(told) == 4


def test_trouble_of_a_moment_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    retry(_fails(2, TimeoutError()), url="u", access=Access(), outage=Outage())
    assert not caplog.records


def test_each_try_may_take_longer_than_the_one_before() -> None:
    assert [deadline(n) for n in (0, 1, 2, 99)] == [5, 10, 20, 120]
    assert deadline(0, 15_000_000) == 15


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("… status code: 503 Service Unavailable: <Error><Code>SlowDown</Code>", "503 SlowDown"),
        ("… status code: 403 Forbidden: <Error><Code>ExpiredToken</Code>", "403 ExpiredToken"),
        ("error sending request … HttpError { kind: Connect, source: …", "connection refused"),
        ("error sending request … HttpError { kind: Timeout, source: …", "timed out"),
        ("error sending request … HttpError { kind: Interrupted, source: …", "connection reset"),
        ("… status code: 403 Forbidden: <Error><Code>AccessDenied</Code>", None),
        ("… status code: 404 Not Found: <Error><Code>NoSuchKey</Code>", None),
        ("something else", None),
    ],
)
def test_causes_of_obstore_that_may_pass(text: str, short: str | None) -> None:
    cause = obstore_cause(Exception(text))
    assert (cause.short if cause else None) == short
