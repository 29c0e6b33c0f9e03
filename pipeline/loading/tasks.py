"""What passes between the loader and a decoder: one clip's work, and a decoded batch. Cheap to import and pickle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from reelmae.pipeline.errors import BadClipError
from reelmae.pipeline.loading.draws import Draw


@dataclass(frozen=True)
class ClipTask:
    """One clip to fetch and decode once, for the R samples of `draws`."""

    clip: int  # row of the index
    key: str
    shard: str
    offset: int
    size: int
    frames: int
    fps: float
    codec: str
    draws: tuple[Draw, ...]
    planned: int  # the clip that the order put here; differs from `clip` where that one was bad
    epoch: int
    attempt: int  # 0, or the number of this replacement


@dataclass
class Cost:
    """What decoding took; sums over clips."""

    frames_decoded: int = 0
    bytes_read: int = 0
    decode_s: float = 0.0

    def add(self, other: Cost) -> None:
        """Add in place."""
        self.frames_decoded += other.frames_decoded
        self.bytes_read += other.bytes_read
        self.decode_s += other.decode_s


@dataclass
class Decoded:
    """A decoded batch: `frames` is uint8 [V * R, T, H, W, 3], V videos by R repeats, RGB.

    `frames` (a numpy array or a torch tensor, on the host or the device) belongs to the decoder:
    call `release` once it has been used.
    """

    tasks: list[ClipTask]
    frames: Any
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
