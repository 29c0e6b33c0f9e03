"""A part of a large clip: which of its blocks are read, and what they hold.

The index keeps a check of each block of a large clip (the column `blocks`, see schema.py), so a part of it can be
checked by itself. Which bytes are needed, the decoder says (decode/parts.py): first those in front, which say where
the pictures lie, then those of the pictures. Here is arithmetic, and no I/O.

Example, blocks of 4 bytes, a clip of 22 bytes, of which 3 to 6 and 17 to 19 are needed:

    bytes   0123 4567 89ab cdef 0123 45        blocks 0, 1 and 4 are read: two runs, 0 to 7 and 16 to 19
    needed     x xx              xx
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from reelmae.pipeline.loading.fetch.pieces import Piece
from reelmae.pipeline.loading.tasks import ClipTask
from reelmae.pipeline.storage.store import MAX_GAP

BLOCK = 1 << 16  # bytes: schema.BLOCK, which workers do not import, since they start without pyarrow
CHECK = 8  # bytes: schema.BLOCK_CHECK
WORTH = 0.5  # a part is read where it has less than this share of the clip
GAP = MAX_GAP // BLOCK  # a hole of no more blocks is read too: the store would do so to save a request


@dataclass(frozen=True)
class Need:
    """What of a clip is needed."""

    head: int
    """So many bytes in front. Where they are more than were given, the rest cannot be said without them."""
    ranges: tuple[tuple[int, int], ...] = ()
    """(start, stop) of the other bytes within the clip."""


Needed = Callable[[ClipTask, bytes], Need | None]
"""What of a clip is needed, by its bytes in front as far as they were read (at first none); None: all of it."""


@dataclass(frozen=True, eq=False)
class ClipParts:
    """Runs of a clip's bytes; the first begins at 0, and between them are holes."""

    size: int
    """Bytes of the whole clip."""
    starts: list[int]
    """Where each run begins in the clip, ascending."""
    runs: list[bytes]
    """The bytes of each run."""

    def take(self, offset: int, size: int) -> memoryview:
        """`size` bytes from `offset`; ValueError where they are not here."""
        at = bisect_right(self.starts, offset) - 1
        begin = offset - self.starts[at]
        if begin + size > len(self.runs[at]):
            raise ValueError(f"its bytes {offset} to {offset + size} were not read")
        return memoryview(self.runs[at])[begin : begin + size]

    @property
    def n_read(self) -> int:
        """Bytes that are here."""
        return sum(map(len, self.runs))


def blocks_of(need: Need, size: int) -> list[int]:
    """The blocks that hold what is needed of a clip of `size` bytes, ascending, small holes filled."""
    blocks: set[int] = set()
    for start, stop in ((0, need.head), *need.ranges):
        blocks.update(range(start // BLOCK, -(-min(stop, size) // BLOCK)))
    ordered = sorted(blocks)
    holes = (range(a + 1, b) for a, b in pairwise(ordered) if b - a - 1 <= GAP)
    return sorted(blocks.union(*holes))


def is_worth_it(blocks: Sequence[int], size: int) -> bool:
    """Whether reading only these blocks saves enough."""
    return len(blocks) * BLOCK < size * WORTH


def piece_of(task: ClipTask, block: int) -> Piece:
    """Where a block of the task's clip lies in its shard, and its check."""
    assert task.blocks is not None
    start = block * BLOCK
    check = int.from_bytes(task.blocks[block * CHECK : (block + 1) * CHECK], "big")
    return Piece(task.offset + start, min(BLOCK, task.size - start), check)


def join(blocks: dict[int, bytes], size: int) -> ClipParts:
    """The parts of a clip of `size` bytes, from its blocks by number."""
    starts: list[int] = []
    runs: list[list[bytes]] = []
    before = None
    for block in sorted(blocks):
        if before is None or block != before + 1:
            starts.append(block * BLOCK)
            runs.append([])
        runs[-1].append(blocks[block])
        before = block
    return ClipParts(size, starts, [b"".join(run) for run in runs])
