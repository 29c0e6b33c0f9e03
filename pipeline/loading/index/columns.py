"""index.parquet → numpy columns of the chosen clips, read by a few threads.

Properties that hold:
- the columns are in the order of the file, whatever thread read which part;
- besides the columns, each thread holds `_ROWS` rows in memory at most: texts become numbers piece by piece;
- a clip takes 59 bytes: ten for its key, eight for its hash, none for its shard (shards are runs of rows). A large
  clip, where checks of blocks are read, takes 8 bytes more for each block, and 16 for the clip.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from reelmae.pipeline import schema
from reelmae.pipeline.cores import usable_cores
from reelmae.pipeline.errors import DatasetError, InputError
from reelmae.pipeline.loading.index.blocks import BlockChecks, take_checks
from reelmae.pipeline.loading.index.keys import parse_hashes, parse_keys
from reelmae.pipeline.loading.index.selection import Chooser, Selection, keys_access
from reelmae.pipeline.storage.access import Access

NUMBERS: dict[str, type[np.generic]] = {
    "offset": np.int64,
    "size": np.int64,
    "frames": np.int32,
    "fps": np.float64,
    "width": np.int32,
    "height": np.int32,
    "label_id": np.int32,
}
_PARSED: dict[str, type[np.generic]] = {
    "source_id": np.uint64,
    "ordinal": np.uint16,
    "check": np.uint64,
    "codec_of_clip": np.int8,
}
_NEEDED = ["key", "shard", "codec", "sha256", *NUMBERS]
_ROWS = 1 << 16
_MAX_THREADS = 8
_PIECES = 4  # of the file for each thread


@dataclass
class ClipColumns:
    """The chosen clips. `rows` holds arrays [N] by name; shards are runs of `clips_of_shard` rows."""

    rows: dict[str, np.ndarray]
    """Arrays [N] by name."""
    shard_names: list[str]
    """[S]: path of each shard."""
    clips_of_shard: np.ndarray
    """int64 [S]: chosen clips of each shard."""
    bytes_of_shard: np.ndarray
    """int64 [S]: bytes of the shard up to the end of its last chosen clip."""
    codec_names: list[str]
    """The codecs of the chosen clips, sorted."""
    repeats: int
    """Number of clips that are not chosen because they repeat others."""
    clips: int
    """Number of all clips in the file."""
    blocks: BlockChecks
    """The checks of the blocks of large clips, where they were asked for."""


@dataclass
class _Piece:
    """Consecutive row groups: where their rows begin in the file, and what was found in them."""

    groups: list[int]
    start: int
    count: int = 0
    repeats: int = 0
    shards: list[tuple[str, int, int]] = field(default_factory=list)  # runs: name, clips, end of the last in bytes
    blocks: list[BlockChecks] = field(default_factory=list)  # rows count from the piece's first chosen one


def read_columns(
    path: Path, url: str, selection: Selection, *, access: Access | None = None, blocks: bool = False
) -> ClipColumns:
    """The selected clips of the dataset at `url`, which `access` reaches; with the checks of their `blocks`, if wished.

    InputError where the file is not an index or lacks a listed key; DatasetError where it is damaged.
    """
    try:
        with pq.ParquetFile(path) as file:
            facts, names = file.metadata, file.schema_arrow
        if missing := {*_NEEDED, "duplicate_of", *(["blocks"] if blocks else [])} - set(names.names):
            raise InputError(f"{url}: {schema.INDEX} lacks the columns {sorted(missing)}; shard the bucket anew")
        chooser = Chooser(selection, names, keys_access(selection.keys, url, access))
        reader = _Reader(path, url, facts, chooser, selection.duplicates, blocks)
        threads = min(usable_cores(), _MAX_THREADS)
        pieces = _pieces(facts, threads * _PIECES)
        with ThreadPoolExecutor(threads, "reelmae-index") as pool:
            list(pool.map(reader.read, pieces))
    except (pa.ArrowInvalid, OSError) as e:
        if isinstance(e, OSError) and e.errno is not None:  # from the system; Arrow's own have no errno
            raise
        words = " ".join(str(e).split())
        raise InputError(
            f"{url}: {schema.INDEX} is not a parquet file or damaged ({words}); run reelmae shard again"
        ) from e
    reader.chooser.check(url)
    return _join(reader, pieces, url)


def _pieces(facts: Any, wanted: int) -> list[_Piece]:
    """About `wanted` pieces of about as many rows."""
    pieces: list[_Piece] = []
    start, target = 0, -(-facts.num_rows // wanted)
    for group in range(facts.num_row_groups):
        if not pieces or start - pieces[-1].start >= target:
            pieces.append(_Piece([], start))
        pieces[-1].groups.append(group)
        start += facts.row_group(group).num_rows
    return pieces


class _Reader:
    """Reads pieces of one file into shared arrays; the rows of a piece go to where they are in the file."""

    def __init__(self, path: Path, url: str, facts: Any, chooser: Chooser, duplicates: bool, blocks: bool) -> None:
        self.path, self.url, self.facts, self.chooser, self.duplicates = path, url, facts, chooser, duplicates
        self.blocks = blocks
        # memory that is never written to costs nothing: the system gives pages when they are touched
        self.rows = {name: np.empty(facts.num_rows, kind) for name, kind in (NUMBERS | _PARSED).items()}
        self.codecs: dict[str, int] = {}
        self._naming = threading.Lock()

    def read(self, piece: _Piece) -> None:
        """Read the piece: fill in its rows, and count them."""
        columns = [*_NEEDED, *self.chooser.columns - {*_NEEDED}]
        if not self.duplicates and "duplicate_of" not in columns:
            columns.append("duplicate_of")
        if self.blocks and "blocks" not in columns:
            columns.append("blocks")
        # Each thread opens the file itself. Reads are buffered: otherwise whole row groups are held in memory
        with pq.ParquetFile(
            self.path,
            metadata=self.facts,
            read_dictionary=["shard", "codec"],
            pre_buffer=False,
            buffer_size=1 << 20,
        ) as file:
            for rows in file.iter_batches(_ROWS, row_groups=piece.groups, columns=columns, use_threads=False):
                self._take(piece, rows)

    def _take(self, piece: _Piece, rows: pa.RecordBatch) -> None:
        parsed = self._parse(rows)
        chosen = self.chooser.mask(rows, parsed["source_id"], parsed["ordinal"])
        if not self.duplicates and rows["duplicate_of"].null_count < len(rows):
            first = pc.is_null(rows["duplicate_of"]).to_numpy(zero_copy_only=False)
            piece.repeats += int((~first if chosen is None else chosen & ~first).sum())
            chosen = first if chosen is None else chosen & first
        shard = rows["shard"] if pa.types.is_dictionary(rows["shard"].type) else rows["shard"].dictionary_encode()
        shard_codes = shard.indices.to_numpy()
        kept: np.ndarray | None = None
        if chosen is not None:
            kept = np.flatnonzero(chosen)  # numpy takes by index twice as fast as by a mask
            parsed = {name: column.take(kept) for name, column in parsed.items()}
            shard_codes = shard_codes.take(kept)
        if self.blocks and rows["blocks"].null_count < len(rows):
            try:
                piece.blocks.append(take_checks(rows["blocks"], kept, parsed["size"], piece.count))
            except ValueError as e:
                raise DatasetError(f"{self.url}: {schema.INDEX}: {e}; run reelmae verify on it") from e
        at = slice(piece.start + piece.count, piece.start + piece.count + len(shard_codes))
        piece.count += len(shard_codes)
        for name, column in parsed.items():
            self.rows[name][at] = column
        if len(shard_codes):
            starts = np.concatenate([[0], np.flatnonzero(shard_codes[1:] != shard_codes[:-1]) + 1])
            clips = np.diff(starts, append=len(shard_codes))
            ends = np.maximum.reduceat(parsed["offset"] + parsed["size"], starts)
            names = shard.dictionary.take(pa.array(shard_codes[starts])).to_pylist()
            piece.shards += zip(names, clips.tolist(), ends.tolist(), strict=True)

    def _parse(self, rows: pa.RecordBatch) -> dict[str, np.ndarray]:
        """All columns but the shard as numbers."""
        if empty := [name for name in _NEEDED if rows[name].null_count]:
            raise DatasetError(f"{self.url}: {schema.INDEX} has clips without {empty[0]}; run reelmae verify on it")
        try:
            source_id, ordinal = parse_keys(rows["key"])
            check = parse_hashes(rows["sha256"])
        except ValueError as e:
            raise DatasetError(f"{self.url}: {schema.INDEX}: {e}; run reelmae verify on it") from e
        codec = rows["codec"] if pa.types.is_dictionary(rows["codec"].type) else rows["codec"].dictionary_encode()
        # Numbered as they come, in any order of the threads; _sort_codecs puts them in order at the end
        with self._naming:
            number = np.array([self.codecs.setdefault(name, len(self.codecs)) for name in codec.dictionary.to_pylist()])
        numbers = {name: rows[name].to_numpy(zero_copy_only=False) for name in NUMBERS}
        codes = number[codec.indices.to_numpy()].astype(np.int8) if len(number) else np.empty(0, np.int8)
        return numbers | {"source_id": source_id, "ordinal": ordinal, "check": check, "codec_of_clip": codes}


def _join(reader: _Reader, pieces: list[_Piece], url: str) -> ClipColumns:
    """Move the pieces' rows together, in place, and merge a shard's run that goes on from one piece to the next."""
    chosen, all_rows = sum(piece.count for piece in pieces), reader.facts.num_rows
    for name, column in reader.rows.items():
        at = 0
        for piece in pieces:
            if at != piece.start:
                column[at : at + piece.count] = column[piece.start : piece.start + piece.count]
            at += piece.count
        # copied to give back the unused memory at the end, unless it is little
        reader.rows[name] = column[:chosen] if chosen > all_rows * 0.9 else column[:chosen].copy()
    runs: list[tuple[str, int, int]] = []
    for run in (run for piece in pieces for run in piece.shards):
        if runs and runs[-1][0] == run[0]:
            run = (run[0], runs[-1][1] + run[1], max(runs[-1][2], run[2]))
            runs.pop()
        runs.append(run)
    names = [run[0] for run in runs]
    if len(set(names)) < len(names):
        again = next(name for i, name in enumerate(names) if name in names[:i])
        raise DatasetError(
            f"{url}: {schema.INDEX} is not in shard order: {again} comes twice; run reelmae verify on it"
        )
    return ClipColumns(
        rows=reader.rows,
        shard_names=names,
        clips_of_shard=np.array([run[1] for run in runs], np.int64),
        bytes_of_shard=np.array([run[2] for run in runs], np.int64),
        codec_names=_sort_codecs(reader),
        repeats=sum(piece.repeats for piece in pieces),
        clips=all_rows,
        blocks=BlockChecks.join([checks.shifted(at) for at, piece in _firsts(pieces) for checks in piece.blocks]),
    )


def _firsts(pieces: list[_Piece]) -> Iterator[tuple[int, _Piece]]:
    """Each piece with the number of chosen rows before it."""
    at = 0
    for piece in pieces:
        yield at, piece
        at += piece.count


def _sort_codecs(reader: _Reader) -> list[str]:
    """The codecs that the chosen clips have, sorted by name; `codec_of_clip` is changed to numbers in this list."""
    codes = reader.rows["codec_of_clip"]
    names = sorted(name for name, code in reader.codecs.items() if (codes == code).any())
    if names != list(reader.codecs):
        number = np.zeros(len(reader.codecs), np.int8)
        for i, name in enumerate(names):
            number[reader.codecs[name]] = i
        reader.rows["codec_of_clip"] = number[codes]
    return names
