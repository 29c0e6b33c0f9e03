"""What passes between the loader and a decoder: one clip's work, and a decoded batch. Cheap to import and pickle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, Protocol

from reelmae.pipeline.errors import BadClipError
from reelmae.pipeline.loading.order.draws import Draw

if TYPE_CHECKING:  # workers start without the index
    from reelmae.pipeline.loading.index.clips import ClipIndex

DecodePolicy = Literal["auto", "windows", "span"]
"""How the windows of a clip's samples are decoded: see decode/passes.py."""


@dataclass(frozen=True)
class ClipTask:
    """One clip to fetch and decode once, for the R samples of `draws`; made by `clip_task`."""

    clip: int
    """Row of the index."""
    key: str
    """The clip's key."""
    dataset: int
    """The clip's dataset, as a number into the index's stores."""
    shard: str
    """Path of the shard within its store."""
    offset: int
    """Where the clip begins in the shard, in bytes."""
    size: int
    """Bytes of the clip."""
    check: int
    """The first 8 bytes of the clip's sha256, big endian."""
    frames: int
    """Stored frames."""
    draws: tuple[Draw, ...]
    """The samples to make of it."""
    planned: int
    """The clip that the order put here; it differs from `clip` where that one was bad and was replaced."""
    epoch: int
    """The pass through the clip's dataset that this belongs to."""
    attempt: int
    """0, or the number of this replacement."""
    blocks: bytes | None = None
    """Checks of the blocks of a large clip on a remote store, where the index has them (schema.block_checks)."""


def clip_task(
    index: ClipIndex,
    clip: int,
    draws: tuple[Draw, ...],
    *,
    planned: int,
    epoch: int = 0,
    attempt: int = 0,
) -> ClipTask:
    """The task of one clip of an index, for the place that the order gave to `planned`."""
    shard = index.shard_number(clip)
    return ClipTask(
        clip=clip,
        key=index.key(clip),
        dataset=int(index.dataset_of_shard[shard]),
        shard=index.shard_names[shard],
        offset=int(index.offset[clip]),
        size=int(index.size[clip]),
        check=int(index.check[clip]),
        frames=int(index.frames[clip]),
        draws=draws,
        planned=planned,
        epoch=epoch,
        attempt=attempt,
        blocks=index.blocks.of(clip),
    )


@dataclass
class Cost:
    """What fetching and decoding cost, summed over clips. Seconds are of the thread or process that did the work."""

    frames_decoded: int = 0
    """Frames that the decoder went through."""
    bytes_read: int = 0
    """Bytes of the clips that were read."""
    fetch_s: float = 0.0
    """Reading bytes from the store or the cache, and hashing them."""
    decode_s: float = 0.0
    """Decoding."""
    resize_s: float = 0.0
    """Crop, resize and conversion to RGB."""

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


class BatchDecoder(Protocol):
    """Batches come out in the order in which they went in.

    A decoder has room for a fixed number of batches between `submit` and `Decoded.release`: see make_decoder.
    """

    def submit(self, tasks: list[ClipTask]) -> None:
        """Start on a batch; does not block. There must be room for it."""

    def collect(self) -> Decoded:
        """Wait for the oldest batch. Raises StorageError, or what `on_bad` raised."""

    def close(self) -> None:
        """Stop at once; end threads and processes, free memory. May be called twice."""


OnBad = Callable[[ClipTask, BadClipError], ClipTask]
"""Called with a task and why its clip is bad; returns the task that replaces it, or raises TooManyBadClipsError."""
