"""What is told about a store that does not answer."""

from __future__ import annotations

import logging
import threading
import time

from reelmae.pipeline.storage.causes import Cause

TELL_AFTER_S = 3.0
TELL_EVERY_S = 30.0
_log = logging.getLogger("reelmae.storage")


class Outage:
    """What is told about one store that does not answer. Shared by all threads that use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since: float | None = None  # time.time() of the first failure
        self._told: float | None = None  # time.monotonic() of the last line

    def fail(self, url: str, cause: Cause, waited_s: float) -> None:
        """An operation that began `waited_s` ago has failed and waits."""
        with self._lock:
            now = time.monotonic()
            if self._since is None:
                self._since = time.time() - waited_s
            if waited_s < TELL_AFTER_S or (self._told is not None and now - self._told < TELL_EVERY_S):
                return
            self._told = now
            _log.warning("waiting for %s since %s: %s", url, clock(self._since), cause.words)

    def end(self, url: str) -> None:
        """An operation has worked."""
        if self._since is None:  # nearly always, and without the lock
            return
        with self._lock:
            if self._since is not None and self._told is not None:
                _log.warning("%s answers again after %.0f s", url, time.time() - self._since)
            self._since = self._told = None


def clock(seconds: float) -> str:
    """The time of day, of seconds as time.time() gives them."""
    return time.strftime("%H:%M:%S", time.localtime(seconds))
