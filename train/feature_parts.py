"""The parts of a table of features: what a run that was killed has left, and the one table made of them.

    .OUT.parquet.parts/000000000000-000000000512.parquet   rows 0 to 511 of the index: their features, their bad clips

Properties that hold:
- a part under its name is whole. Parts may be written in any order, and no two have a row in common;
- parts of another table (other weights, clips or settings) are removed;
- the table has the same bytes whatever parts it was made of: its row groups are cut anew.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from reelmae.pipeline.storage.store import whole_file

_PART = b"reelmae part"  # key of a part's own facts in its metadata


@dataclass(frozen=True)
class _Part:
    rows: range
    path: Path
    clips: int
    """Clips with features."""
    bad: dict[str, str]
    """key → reason of the others."""


class FeatureParts:
    """The parts beside `out` that are of the table with this `identity` and `schema`; others are removed."""

    def __init__(self, out: Path, identity: dict[str, Any], schema: pa.Schema) -> None:
        self.folder = out.with_name(f".{out.name}.parts")
        self._schema = schema
        self._identity = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self._parts: dict[int, _Part] = {}  # first row → part
        stop = 0
        for path in sorted(self.folder.glob("*")):
            part = self._read(path)
            if part is None or part.rows.start < stop:
                path.unlink()
            else:
                self._parts[part.rows.start], stop = part, part.rows.stop
        self.rows = sum(len(part.rows) for part in self._parts.values())
        """Rows of the index that are done, wherever they lie."""
        self.clips = sum(part.clips for part in self._parts.values())
        """Clips of them that have features."""

    @property
    def bad(self) -> dict[str, str]:
        """key → reason of the clips without features, in the index's order."""
        return {key: reason for part in self._in_order() for key, reason in part.bad.items()}

    def missing(self, rows: int) -> list[range]:
        """The rows of an index of so many rows that are in no part."""
        found, last = [], 0
        for part in self._in_order():
            found.append(range(last, part.rows.start))
            last = part.rows.stop
        return [gap for gap in (*found, range(last, rows)) if gap]

    def add(self, rows: range, tables: Iterable[pa.Table], clips: int, bad: dict[str, str]) -> None:
        """Write the features of these rows as one part: `clips` with features, the others `bad`."""
        facts = {"identity": self._identity, "clips": clips, "bad": bad}
        table = pa.concat_tables([self._schema.empty_table(), *tables])
        path = self.folder / f"{rows.start:012d}-{rows.stop:012d}.parquet"
        with whole_file(path) as part:
            pq.write_table(table.replace_schema_metadata({_PART: json.dumps(facts)}), part)
        self._parts[rows.start] = _Part(rows, path, clips, bad)
        self.rows += len(rows)
        self.clips += clips

    def join(self, file: Path, group: int) -> None:
        """Write the table, with `group` rows in each row group but the last."""
        with pq.ParquetWriter(file, self._schema) as writer:
            for table in _cut((pq.ParquetFile(part.path).read() for part in self._in_order()), group):
                writer.write_table(table)

    def remove(self) -> None:
        """Remove all parts."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _in_order(self) -> list[_Part]:
        return [self._parts[start] for start in sorted(self._parts)]

    def _read(self, path: Path) -> _Part | None:
        """The part; None where the file is of another table, damaged, or no part."""
        try:
            metadata = pq.read_schema(path).metadata or {}
            start, stop = (int(number) for number in path.stem.split("-"))
        except (pa.ArrowException, OSError, ValueError):  # those rows are made again
            return None
        facts = json.loads(metadata.get(_PART, b"{}"))
        if facts.get("identity") != self._identity or path.suffix != ".parquet":
            return None
        return _Part(range(start, stop), path, facts["clips"], facts["bad"])


def _cut(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The rows of all tables in tables of `rows` rows; the last may have fewer."""
    held: list[pa.Table] = []
    count = 0
    for table in tables:
        held.append(table)
        count += len(table)
        while count >= rows:
            joined = pa.concat_tables(held).combine_chunks()
            yield joined.slice(0, rows)
            held, count = [joined.slice(rows)], count - rows
    if count:
        yield pa.concat_tables(held).combine_chunks()
