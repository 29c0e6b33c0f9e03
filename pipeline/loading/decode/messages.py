"""What av_pool and its workers say to each other. A module of its own: a worker's own one is `__main__` there."""

from __future__ import annotations

from dataclasses import dataclass

from reelmae.pipeline.errors import ReelmaeError
from reelmae.pipeline.loading.fetch.clip import SourceSettings
from reelmae.pipeline.loading.tasks import Cost, DecodePolicy


@dataclass(frozen=True)
class WorkerSetup:
    """First message to a worker. `arena_shape` is (slots, videos, R, 3, T, H, W)."""

    parent: int
    source: SourceSettings
    policy: DecodePolicy
    arena_fd: int
    arena_shape: tuple[int, ...]
    fetch_threads: int = 4
    """Lists of requests that are fetched at a time."""
    waiting_s: float = 1.0
    """How often it says that it waits for a store."""


@dataclass(frozen=True)
class Ready:
    """First message from a worker."""


@dataclass(frozen=True)
class Waiting:
    """The bytes of the clip that is next have not come yet."""


@dataclass(frozen=True)
class Said:
    """A line for the log of the parent."""

    logger: str
    level: int
    template: str
    """Lines of several workers that have the same are the same news."""
    text: str


@dataclass(frozen=True)
class Answer:
    """What became of a request."""

    ticket: int
    failed: ReelmaeError | None
    """A BadClipError, or what the storage raised; None where the clip is there."""
    cost: Cost
    retries: tuple[dict[str, int], ...]
    """What was tried again since the last answer, by cause, for each Access of the stores (accesses_of)."""
