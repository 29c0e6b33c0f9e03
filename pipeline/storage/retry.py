"""Tries an operation of a store again while it may still work, up to a patience, and says what it waits for.

- Pauses double from 0.5 s to 15 s, each shortened by chance, so that many clients do not come back at once.
- The patience counts from the operation's first failure. Each try has a deadline of its own, longer after each failure.
- Who waits for more than a few seconds is told in the log: once when it begins, then every half minute, and when the
  store answers again. Threads that wait for the same store say it once.
- What is gone is looked for a second time before FileNotFoundError goes out.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from reelmae.pipeline.errors import StorageError, StorageFullError
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.causes import Cause, find_cause
from reelmae.pipeline.storage.outage import Outage, clock

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 15.0
DEADLINE_S = 5.0  # of the first try of a request, beside the time for its bytes
SLOWEST = 1.5e6  # bytes a second: at this speed a request's bytes may come
LONGEST_DEADLINE_S = 120.0
T = TypeVar("T")


def deadline(number: int, size: int = 0) -> float:
    """Seconds that the try of this number (from 0) of one request of `size` bytes may take."""
    return float(min(DEADLINE_S * 2 ** min(number, 10), LONGEST_DEADLINE_S) + size / SLOWEST * 2 ** min(number, 6))


def retry(
    call: Callable[[int], T],
    *,
    url: str,
    access: Access,
    outage: Outage,
    is_gone: Callable[[], bool] | None = None,
) -> T:
    """`call(n)`, with n = 0, 1, … for each try, until it works.

    FileNotFoundError where the file is gone (and `is_gone` agrees); IsADirectoryError and NotADirectoryError at once.
    Else, once the cause is final or the patience is over: InputError, StorageFullError or StorageError, in one line.
    """
    began, first_failure, number = time.monotonic(), None, 0
    while True:
        try:
            result = call(number)
        except (IsADirectoryError, NotADirectoryError, StorageError):
            raise
        except Exception as e:
            cause = find_cause(e)
            if cause is None:
                raise
            if cause.kind == "gone":
                if is_gone is None or is_gone():
                    raise FileNotFoundError(url) from e
                cause = Cause("passing", "404 of a file that is listed", "the server lists it and does not give it")
            first_failure = first_failure or time.monotonic()
            _wait(e, cause, url, access, outage, began, first_failure, number)
            number += 1
        else:
            outage.end(url)
            return result


def _wait(
    error: Exception,
    cause: Cause,
    url: str,
    access: Access,
    outage: Outage,
    began: float,
    first_failure: float,
    number: int,
) -> None:
    """Pause before the next try, or raise where there is none."""
    if cause.kind == "full":
        raise StorageFullError(
            f"{url}: {cause.words}; free some, or choose another place, and run again (it resumes)"
        ) from error
    if cause.kind != "passing":
        raise cause.error(f"{url}: {cause.words}") from error
    now = time.monotonic()
    if access.stopping.is_set():
        raise StorageError(f"{url}: {cause.words}; stopped") from error
    if now - first_failure >= access.patience_s:
        raise StorageError(
            f"{url}: {cause.words}; waited {_minutes(now - began)} since {clock(time.time() - (now - began))} "
            f"({number + 1} tries); run again once it answers, it goes on where it stopped"
        ) from error
    access.retries.add(cause.short)
    outage.fail(url, cause, now - began)
    left = access.patience_s - (now - first_failure)
    pause = min(FIRST_PAUSE_S * 2 ** min(number, 10), LONGEST_PAUSE_S) * random.uniform(0.5, 1)
    access.stopping.wait(min(pause, left))


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"
