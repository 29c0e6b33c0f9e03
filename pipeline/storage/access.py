"""How stores are reached: options of the file system, patience with one that does not answer, and a count of retries."""

from __future__ import annotations

import json
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reelmae.pipeline.errors import ConfigError
from reelmae.pipeline.storage.outage import Outage

PATIENCE_MINUTES = 10.0
_alive: weakref.WeakValueDictionary[int, Access] = weakref.WeakValueDictionary()


class Retries:
    """Counts what was tried again, by cause. Any number of threads may add."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, cause: str, n: int = 1) -> None:
        """Count one retry, for a short cause such as `503 SlowDown` or `checksum`."""
        with self._lock:
            self._counts[cause] += n

    def counts(self) -> dict[str, int]:
        """cause → number of retries so far."""
        with self._lock:
            return dict(self._counts)


@dataclass(frozen=True)
class Access:
    """How a store is reached. Pickling it keeps options and patience; the copy counts its own retries.

    The options may hold secrets: they are never shown, and never written anywhere.
    """

    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Keyword arguments of the fsspec file system: for S3 `key`, `secret`, `endpoint_url`, `profile`, …"""
    patience_s: float = PATIENCE_MINUTES * 60
    """Seconds to wait for a store that fails or does not answer, from its first failure on."""
    retries: Retries = field(default_factory=Retries, repr=False, compare=False)
    """What was tried again by all stores that share this object."""
    stopping: threading.Event = field(default_factory=threading.Event, repr=False, compare=False)
    """Set by `stop`."""
    outages: dict[str, Outage] = field(default_factory=dict, repr=False, compare=False)
    """Place → what is told about it while it does not answer."""

    def __post_init__(self) -> None:
        """Let `interruptible` know it."""
        _alive[id(self)] = self

    def stop(self) -> None:
        """End all waiting soon, with a StorageError. May be called from any thread."""
        self.stopping.set()

    def outage(self, place: str) -> Outage:
        """What is told about one place (a bucket, a host) by all stores that share this object."""
        return self.outages.setdefault(place, Outage())

    def __reduce__(self) -> tuple[type[Access], tuple[dict[str, Any], float]]:
        """Pickle without the count and the event, which belong to this process."""
        return type(self), (dict(self.options), self.patience_s)


@contextmanager
def interruptible(pool: ThreadPoolExecutor) -> Iterator[None]:
    """For a block that waits for threads that read or write: where it is interrupted (Ctrl-C), they stop waiting for
    their stores, so that leaving the pool does not take as long as their patience."""
    try:
        yield
    except KeyboardInterrupt:
        stopped = [access for access in list(_alive.values()) if not access.stopping.is_set()]
        for access in stopped:
            access.stop()
        pool.shutdown(cancel_futures=True)
        for access in stopped:  # whoever is interrupted in a notebook goes on with it
            access.stopping.clear()
        raise


def parse_options(text: str | None) -> dict[str, Any]:
    """The options in a JSON object, or in the file that `@FILE` names. ConfigError, without the text, where it is none."""
    if text is None:
        return {}
    where = "storage options"
    if text.startswith("@"):
        where, path = f"storage options in {text[1:]}", Path(text[1:]).expanduser()
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"{where}: cannot be read ({type(e).__name__}); give @FILE of a file of JSON") from e
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if not isinstance(options, dict):  # the text may hold a secret: it is not shown
        raise ConfigError(
            f"{where}: is not a JSON object; write e.g. "
            '{"key": "…", "secret": "…", "endpoint_url": "https://…"}, or @FILE of a file that holds it'
        ) from None
    return options
