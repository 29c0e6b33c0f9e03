"""Reads a manifest in pieces: CSV and similar text, JSONL or Parquet → what its columns are, then record by record.

Columns
- Four have a role: url (`url`, else `path`), label, start (`start`, `start_s`, `time_start`) and end (`end`, `end_s`,
  `time_end`). The config can name other columns for them. A text file without a header has path, label, start and
  end, in this order; the config names its columns by number, from 1.
- Every other column is carried to the index. One whose name is taken there becomes `manifest_NAME`; one without a
  name becomes `column_5`. A column is int64, double or bool where every value is one (numbers without a plus and
  without leading zeros), else string. A column with numbers that would lose digits (beyond int64, or integers beyond
  2^53 among decimals) is a string too. Empty values, NaN and infinities are null.

Text files (all but .jsonl and .parquet) are UTF-8. The separator (comma, semicolon, tab or bar) is found from the
first line. That line is a header if it has the column of paths; else it must begin with a path (an extension, or a
slash). Without a header the separator may also be ONE space, as in VideoMAE's lists, if the path ends in an
extension; paths in such a file hold no space. Blank lines are skipped, but they count in line numbers.

Faults of lines are collected (LineFaults) and reported together.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from reelmae.pipeline.errors import InputError
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.plan.values import TEXT, column_type, encode_json, kind_of_text, kind_of_value
from reelmae.pipeline.schema import commit_columns
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.scratch import scratch_folder
from reelmae.pipeline.storage.store import Store

MAX_COLUMNS = 1000
SHOWN = 10  # faults that one message names
_PIECE = 4 << 20  # bytes read at once
_PARQUET_ROWS = 10_000  # rows read at once
_LONGEST = 16 << 20  # bytes; a longer line is an error
_ROLES = {
    "url": ("url", "path"),
    "label": ("label",),
    "start": ("start", "start_s", "time_start"),
    "end": ("end", "end_s", "time_end"),
}
_SEPARATORS = (",", "\t", ";", "|")
_EXTENSION = re.compile(r"\.[A-Za-z0-9]{1,5}$")


@dataclass
class LineFaults:
    """Faults of a manifest with their lines: the first few are kept, all are counted."""

    src: str
    unit: str = "line"
    count: int = 0
    kept: list[tuple[int, str]] = field(default_factory=list)

    def add(self, line: int, words: str) -> None:
        """Add one."""
        self.count += 1
        self.kept.append((line, words))
        if len(self.kept) > 20 * SHOWN:
            self.kept = sorted(self.kept)[:SHOWN]

    def extend(self, some: list[tuple[int, str]], count: int) -> None:
        """Add `count` faults, `some` being the first of them."""
        self.count += count
        self.kept += some

    def raise_any(self) -> None:
        """InputError that names the first ten, if there are any."""
        if self.count:
            shown = [f"{self.src}, {self.unit} {line}: {words}" for line, words in sorted(self.kept)[:SHOWN]]
            more = f"\nand {self.count - len(shown)} more" if self.count > len(shown) else ""
            raise InputError("\n".join(shown) + more)


@dataclass(frozen=True)
class ManifestColumns:
    """The positions of a manifest's columns in a record; None where the manifest has no such column."""

    url: int
    label: int | None
    start: int | None
    end: int | None
    extra: tuple[tuple[int, str, str], ...]
    """The carried columns in order: (position, name in the index, int64 | double | bool | string)."""


@contextmanager
def open_manifest(
    src: str, config: ShardConfig, access: Access | None = None
) -> Iterator[tuple[ManifestFile, LineFaults]]:
    """The manifest at a path or URL, and an empty list for its faults. A remote one is copied to local disk first,
    because it is read twice. InputError where it is missing, no file, or its columns cannot be found."""
    store, lower = Store(src, access), src.lower()
    with scratch_folder() as folder:
        path = store.local_path() if store.is_local else Path(folder, "manifest")
        try:
            if not store.is_local:
                store.download("", path)
            elif not path.is_file():
                raise FileNotFoundError
        except FileNotFoundError as e:
            raise InputError(f"{src}: no such manifest; check the path") from e
        if lower.endswith(".parquet"):
            yield _Parquet(path, src), LineFaults(src, "row")
        elif lower.endswith(".jsonl"):
            yield _Jsonl(path, src), LineFaults(src)
        else:
            yield _Text(path, src, config), LineFaults(src)


def find_columns(file: ManifestFile, src: str, config: ShardConfig, format: int) -> ManifestColumns:
    """The role of each column; InputError where a wanted one is missing, or two have the same name."""
    names = file.names
    if len(names) > MAX_COLUMNS or len(set(names)) < len(names):
        top = Counter(names).most_common(1)[0]
        words = f"{len(names)} columns, {top[1]} named {top[0]!r}; give at most {MAX_COLUMNS}, with different names"
        raise InputError(f"{src}: {words}")
    wanted = {role: getattr(config, f"{role}_column") for role in _ROLES}
    at = {role: _position(file, src, role, name) for role, name in wanted.items() if name is not None}
    for number, (role, usual) in enumerate(_ROLES.items()):
        if role in at:
            continue
        free = [i for i in range(len(names)) if i not in at.values()]
        if not file.header and number in free:
            at[role] = number
        elif file.header and (found := [i for n in usual for i in free if names[i] == n]):
            at[role] = found[0]
    if "url" not in at:
        raise _missing_column(src, "url", None, names, file.header)
    others = [i for i in range(len(names)) if i not in at.values()]
    kinds = file.kinds(others)
    ours = commit_columns(format).names
    renamed = {i: f"manifest_{names[i]}" if names[i] in ours else names[i] for i in others}
    for i, name in renamed.items():
        if name in ours or list(renamed.values()).count(name) > 1:
            raise InputError(f"{src}: column {names[i]!r} would be {name!r}, which is taken; rename it")
    extra = tuple((i, name, kinds[i]) for i, name in renamed.items())
    return ManifestColumns(at["url"], at.get("label"), at.get("start"), at.get("end"), extra)


def _position(file: ManifestFile, src: str, role: str, name: str) -> int:
    if file.header and name in file.names:
        return file.names.index(name)
    if not file.header and name.isdecimal() and 1 <= int(name) <= len(file.names):
        return int(name) - 1
    raise _missing_column(src, role, name, file.names, file.header)


class _Text:
    """Text with any separator. Its records are lists of strings."""

    def __init__(self, path: Path, src: str, config: ShardConfig) -> None:
        self._path, self._src = path, src
        self.separator, self.header, fields = _sniff(path, src, config)
        names = [name.strip() for name in fields] if self.header else [""] * len(fields)
        self.names = [name or f"column_{i}" for i, name in enumerate(names, 1)]

    def records(self, faults: LineFaults) -> Iterator[tuple[int, Sequence[Any]]]:
        """(first physical line, fields) of every record without a fault; the faults go to `faults`."""
        broken: list[int] = []
        reader = csv.reader(_text_lines(self._path, self._src, broken), delimiter=self.separator, strict=True)
        begun = False
        while True:
            line = reader.line_num + 1
            try:
                record = next(reader)
            except StopIteration:
                return
            except csv.Error as e:
                broken.clear()
                faults.add(line, f"cannot be read: {e}")
                continue
            if not record or ((not begun or len(record) == 1) and not any(map(str.strip, record))):
                continue
            header, begun = self.header and not begun, True
            if header:
                continue
            if broken:
                broken.clear()
                faults.add(line, "is not UTF-8; save the file as UTF-8")
            elif len(record) != len(self.names):
                faults.add(line, f"has {len(record)} fields, the first line {len(self.names)}; mend it")
            else:
                yield line, record

    def kinds(self, wanted: Sequence[int]) -> dict[int, str]:
        """Column → type, from all of its values."""
        seen = dict.fromkeys(wanted, 0)
        for _, record in self.records(LineFaults("")) if seen else ():
            for i, before in seen.items():
                if before < TEXT and record[i]:
                    seen[i] = before | kind_of_text(record[i])
        return {i: column_type(kinds) for i, kinds in seen.items()}


class _Jsonl:
    """One JSON object a line. Its records are lists of JSON values, None where a line lacks the name."""

    header = True

    def __init__(self, path: Path, src: str) -> None:
        self._path, self._src = path, src
        seen: dict[str, int] = {}
        faults = LineFaults(src)
        for _, row in self._objects(faults):
            for name, value in row.items():
                seen[name] = seen.get(name, 0) | kind_of_value(value)
            if len(seen) > MAX_COLUMNS:
                raise InputError(f"{src}: has more than {MAX_COLUMNS} columns; is it a list of videos?")
        if not seen:
            faults.raise_any()
        self.names, self._seen = list(seen), list(seen.values())

    def _objects(self, faults: LineFaults) -> Iterator[tuple[int, dict[str, Any]]]:
        for line, raw in enumerate(_lines(self._path, self._src), 1):
            if not raw.strip():
                continue
            try:
                row = json.loads(raw.decode())
                if b"\\u" in raw:
                    encode_json(row).encode()  # half a surrogate pair can be written so
            except UnicodeDecodeError:
                faults.add(line, "is not UTF-8; save the file as UTF-8")
            except (ValueError, RecursionError) as e:
                faults.add(line, f"is not JSON: {e}")
            else:
                if isinstance(row, dict):
                    yield line, row
                else:
                    faults.add(line, "is not a JSON object; write {...}")

    def records(self, faults: LineFaults) -> Iterator[tuple[int, Sequence[Any]]]:
        """(line, values in the order of `names`)."""
        for line, row in self._objects(faults):
            yield line, [row.get(name) for name in self.names]

    def kinds(self, wanted: Sequence[int]) -> dict[int, str]:
        """Column → type, from all of its values."""
        return {i: column_type(self._seen[i]) for i in wanted}


class _Parquet:
    """A Parquet file. Its records are lists of Python numbers, booleans and strings; a line is a row, from 1."""

    header = True

    def __init__(self, path: Path, src: str) -> None:
        self._path, self._src = path, src
        try:
            with pq.ParquetFile(path) as file:
                self._schema = file.schema_arrow
        except (pa.ArrowException, OSError) as e:
            raise InputError(f"{src}: cannot be read as Parquet: {e}") from e
        self.names = list(self._schema.names)

    def records(self, faults: LineFaults) -> Iterator[tuple[int, Sequence[Any]]]:
        """(row, values in the order of `names`)."""
        done = 0
        try:
            with pq.ParquetFile(self._path, pre_buffer=False) as file:
                for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                    yield from enumerate(zip(*map(_to_python, batch.columns), strict=True), done + 1)
                    done += batch.num_rows
        except (pa.ArrowException, OSError) as e:
            raise InputError(f"{self._src}: cannot be read as Parquet beyond row {done}: {e}") from e

    def kinds(self, wanted: Sequence[int]) -> dict[int, str]:
        """Column → type, from the file's schema."""
        return {i: _arrow_kind(self._schema.field(i).type) for i in wanted}


ManifestFile = _Text | _Jsonl | _Parquet


def _arrow_kind(kind: pa.DataType) -> str:
    if pa.types.is_integer(kind):
        return "int64"
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "double"
    return "bool" if pa.types.is_boolean(kind) else "string"


def _to_python(column: pa.Array) -> list[Any]:
    if _arrow_kind(column.type) == "string":
        try:
            column = column.cast(pa.string())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            # Lists, structs and bytes that are not text: Arrow has no cast to text for them. Python writes each of them,
            # so no value is lost and nothing is hidden
            return [None if v is None else str(v) for v in column.to_pylist()]
    return column.to_pylist()


def _lines(path: Path, src: str) -> Iterator[bytes]:
    """A file's lines with their line feeds, without a byte order mark. InputError at a line of more than 16 MiB."""
    rest, number = b"", 0
    with path.open("rb") as file:
        if file.read(3) != b"\xef\xbb\xbf":
            file.seek(0)
        while piece := file.read(_PIECE):
            lines = (rest + piece).split(b"\n")
            rest = lines.pop()
            if len(rest) > _LONGEST:
                line = number + len(lines) + 1
                raise InputError(f"{src}, line {line}: is longer than {_LONGEST} bytes; is it a manifest?")
            number += len(lines)
            yield from (line + b"\n" for line in lines)
    if rest:
        yield rest


def _text_lines(path: Path, src: str, broken: list[int]) -> Iterator[str]:
    """The file's lines as text; the numbers of lines that are not UTF-8 are appended to `broken`."""
    for number, line in enumerate(_lines(path, src), 1):
        try:
            yield line.decode()
        except UnicodeDecodeError:
            broken.append(number)
            yield line.decode("utf-8", "surrogateescape")


def _first_record(path: Path, src: str, separator: str) -> list[str]:
    broken: list[int] = []
    try:
        for record in csv.reader(_text_lines(path, src, broken), delimiter=separator, strict=True):
            if broken:
                raise InputError(f"{src}, line {broken[0]}: is not UTF-8; save the file as UTF-8")
            if any(name.strip() for name in record):
                return record
    except csv.Error:
        pass
    return []


def _sniff(path: Path, src: str, config: ShardConfig) -> tuple[str, bool, list[str]]:
    """(separator, True if the first line is a header, the first line's fields)."""
    usual = "\t" if src.lower().endswith(".tsv") else ","
    found = {s: _first_record(path, src, s) for s in dict.fromkeys((usual, *_SEPARATORS))}
    wanted = (config.url_column,) if config.url_column else _ROLES["url"]
    for separator, fields in sorted(found.items(), key=lambda item: -len(item[1])):
        if any(name.strip() in wanted for name in fields):
            return separator, True, fields
    at = int(config.url_column or 1) - 1 if (config.url_column or "1").isdecimal() else -1
    if at >= 0:
        found[" "] = _first_record(path, src, " ")
        for extension in (True, False):
            is_path = _EXTENSION.search if extension else re.compile("/").search
            for separator, fields in found.items():
                if not 1 < len(fields) > at or not is_path(fields[at]):
                    continue
                if separator != " " or (extension and not is_path(fields[-1] if at == 0 else "")):
                    return separator, False, fields
            if len(found[usual]) == 1 and at == 0 and is_path(found[usual][0]):
                return usual, False, found[usual]
    found.pop(" ", None)
    if fields := max(found.values(), key=len):
        raise _missing_column(src, "url", config.url_column, [name.strip() for name in fields], True)
    raise InputError(f"{src}: names no file; its first line is empty or cannot be read")


def _missing_column(src: str, role: str, wanted: str | None, names: Sequence[str], header: bool) -> InputError:
    there = ", ".join(map(repr, names[:30])) or "none" if header else f"columns 1 to {len(names)}, no header"
    return InputError(
        f"{src}: no column {wanted or ' or '.join(_ROLES[role])}; there are {there}; name it with --{role}-column"
    )
