"""What passes between the loader and a decoder: one clip's work, and a decoded batch. Cheap to import and pickle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from reelmae.pipeline.errors import BadClipError
from reelmae.pipeline.loading.order.draws import Draw


@dataclass(frozen=True)
class ClipTask:
    """One clip to fetch and decode once, for the R samples of `draws`."""

    clip: int  # row of the index
    key: str
    dataset: int  # which of the index's datasets holds it
    shard: str
    offset: int
    size: int
    check: int  # the first 8 bytes of its sha256
    frames: int
    draws: tuple[Draw, ...]
    planned: int  # the clip that the order put here; differs from `clip` where that one was bad
    epoch: int
    attempt: int  # 0, or the number of this replacement


@dataclass
class Cost:
    """What decoding took, as sums over clips. Seconds are those of the thread or process that did it."""

    frames_decoded: int = 0
    bytes_read: int = 0
    fetch_s: float = 0.0  # bytes from the store or the cache, and their hash
    decode_s: float = 0.0
    resize_s: float = 0.0  # crop, resize and conversion to RGB

    def add(self, other: Cost) -> None:
        """Add in place."""
        for field_ in fields(self):
            setattr(self, field_.name, getattr(self, field_.name) + getattr(other, field_.name))


@dataclass
class Decoded:
    """A decoded batch: `clips_BCTHW` is uint8, B = V videos × R repeats, RGB.

    `clips_BCTHW` (a numpy array or a torch tensor, on the host or the device) belongs to the decoder:
    call `release` once it has been used.
    """

    tasks: list[ClipTask]
    clips_BCTHW: Any
    release: Callable[[], None]
    cost: Cost = field(default_factory=Cost)


class Decoder(Protocol):
    """Batches go in and come out in the same order. At most `slots` of them between submit and release."""

    def submit(self, tasks: list[ClipTask]) -> None:
        """Start on a batch; does not block."""

    def collect(self) -> Decoded:
        """Wait for the oldest batch. Raises what made the run impossible."""

    def close(self) -> None:
        """Stop at once and give everything back; may be called twice."""


OnBad = Callable[[ClipTask, BadClipError], ClipTask]
"""Takes a task and why its clip is bad; gives the task that stands in for it, or raises TooManyBadClipsError."""
