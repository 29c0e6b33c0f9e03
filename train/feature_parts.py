"""The parts of a table of features: what a run that was killed has left, and the one table made of them.

    .OUT.parquet.parts/000000000000-000000000512.parquet   rows 0 to 511 of the index: their features, their bad clips

Properties that hold:
- a part under its name is whole, and the parts that count follow each other from row 0 without a gap;
- parts of another table (other weights, clips or settings) are removed;
- the table has the same bytes whatever parts it was made of: its row groups are cut anew.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from reelmae.pipeline.storage.store import whole_file

_PART = b"reelmae part"  # key of a part's own facts in its metadata


class FeatureParts:
    """The parts beside `out` that are of the table with this `identity` and `schema`; others are removed."""

    def __init__(self, out: Path, identity: dict[str, Any], schema: pa.Schema) -> None:
        self.folder = out.with_name(f".{out.name}.parts")
        self.rows = 0
        """Rows of the index that are done, from the first on."""
        self.clips = 0
        """Clips of them that have features."""
        self.bad: dict[str, str] = {}
        """key → reason of the others, in the index's order."""
        self._schema = schema
        self._identity = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self._paths: list[Path] = []
        while (found := self._next()) is not None:
            self._take(*found)
        for left in set(self.folder.glob("*")) - set(self._paths):
            left.unlink()

    def add(self, stop: int, tables: Iterable[pa.Table], clips: int, bad: dict[str, str]) -> None:
        """Write the features of the rows from `rows` up to `stop` as one part: `clips` with features, the others `bad`."""
        facts = {"identity": self._identity, "clips": clips, "bad": bad}
        table = pa.concat_tables([self._schema.empty_table(), *tables])
        path = self.folder / f"{self.rows:012d}-{stop:012d}.parquet"
        with whole_file(path) as part:
            pq.write_table(table.replace_schema_metadata({_PART: json.dumps(facts)}), part)
        self._take(path, facts)

    def join(self, file: Path, group: int) -> None:
        """Write the table, with `group` rows in each row group but the last."""
        with pq.ParquetWriter(file, self._schema) as writer:
            for table in _cut((pq.ParquetFile(path).read() for path in self._paths), group):
                writer.write_table(table)

    def remove(self) -> None:
        """Remove all parts."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _next(self) -> tuple[Path, dict[str, Any]] | None:
        """The part that begins where the last one ended, and its facts; None where there is none, or one of another table."""
        for path in self.folder.glob(f"{self.rows:012d}-*.parquet"):
            try:
                metadata = pq.read_schema(path).metadata or {}
            except pa.ArrowInvalid:  # damaged on the disk: those rows are made again
                continue
            facts = json.loads(metadata.get(_PART, b"{}"))
            if facts.get("identity") == self._identity:
                return path, facts
        return None

    def _take(self, path: Path, facts: dict[str, Any]) -> None:
        self._paths.append(path)
        self.rows = int(path.stem.partition("-")[2])
        self.clips += facts["clips"]
        self.bad |= facts["bad"]


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
