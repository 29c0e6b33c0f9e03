"""The checks of the blocks of large clips (the column `blocks`, see schema.py): nothing for all other clips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reelmae.pipeline import schema


@dataclass(frozen=True, eq=False)
class BlockChecks:
    """The checks of M clips of an index. Arrays are read-only."""

    row_M: np.ndarray
    """int64 [M], ascending: rows of the index."""
    start: np.ndarray
    """int64 [M + 1]: the checks of clip m are the bytes start[m] to start[m + 1] - 1 of `checks`."""
    checks: np.ndarray
    """uint8: the checks of all clips, one behind the other."""

    def of(self, clip: int) -> bytes | None:
        """The checks of the clip in this row; None where it has none."""
        if not len(self.row_M):
            return None
        at = int(np.searchsorted(self.row_M, clip))
        if at == len(self.row_M) or self.row_M[at] != clip:
            return None
        return self.checks[self.start[at] : self.start[at + 1]].tobytes()

    def shifted(self, rows: int) -> BlockChecks:
        """The same of clips that lie so many rows further down."""
        return BlockChecks(_freeze(self.row_M + rows), self.start, self.checks) if len(self.row_M) else self

    @classmethod
    def join(cls, parts: Sequence[BlockChecks]) -> BlockChecks:
        """Those of several, whose rows ascend from one to the next."""
        parts = [part for part in parts if len(part.row_M)]
        if not parts:
            return NO_CHECKS
        sizes = np.concatenate([np.diff(part.start) for part in parts])
        return cls(
            _freeze(np.concatenate([part.row_M for part in parts])),
            _freeze(np.concatenate([[0], np.cumsum(sizes)])),
            _freeze(np.concatenate([part.checks for part in parts])),
        )


def take_checks(column: pa.Array, kept: np.ndarray | None, sizes: np.ndarray, first: int) -> BlockChecks:
    """Those of the `kept` rows of a column (None: all), numbered from `first`; `sizes` are the kept clips' bytes.

    ValueError where a clip has not one check for each block.
    """
    if not pa.types.is_binary(column.type):
        raise ValueError(f"its column blocks has the type {column.type}")
    chosen = column if kept is None else column.take(pa.array(kept))
    rows = np.flatnonzero(chosen.is_valid().to_numpy(zero_copy_only=False))
    chosen = chosen.drop_null()
    lengths = pc.binary_length(chosen).to_numpy(zero_copy_only=False).astype(np.int64)
    wrong = np.flatnonzero(lengths != -(-sizes[rows] // schema.BLOCK) * schema.BLOCK_CHECK)
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(f"a clip of {sizes[rows][at]} bytes has {lengths[at]} bytes of checks in the column blocks")
    checks = np.frombuffer(b"".join(chosen.to_pylist()), np.uint8)
    return BlockChecks(first + rows.astype(np.int64), np.concatenate([[0], np.cumsum(lengths)]), checks)


def _freeze(column: np.ndarray) -> np.ndarray:
    column.flags.writeable = False
    return column


NO_CHECKS = BlockChecks(_freeze(np.empty(0, np.int64)), _freeze(np.zeros(1, np.int64)), _freeze(np.empty(0, np.uint8)))
"""Those of an index without large clips."""
