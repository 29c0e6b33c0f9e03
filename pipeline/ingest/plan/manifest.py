"""A manifest read in pieces: CSV and its kin, JSONL or Parquet → records, one at a time, and what its columns are.

Columns
- url (`url`, else `path`), label, start (`start`, `start_s`, `time_start`) and end (`end`, `end_s`, `time_end`), or
  those the job names. A text file without a header has, in this order, path, label, start and end; its columns
  are named by number, from 1, and carried as `column_5`. What the job does not name is as above.
- Every other column is carried: a name that the index has already becomes `manifest_NAME`. A column is int64, double
  or bool where every value of it is (a number is written plainly: no plus, no leading zeros), else string. Numbers
  that would not survive (beyond int64, or integers beyond 2^53 among decimals) make it a string. Empty values,
  NaN and infinities among them, are left out.

Text files (all but .jsonl and .parquet) are UTF-8 with commas, semicolons, tabs or bars between fields, told from
the first line, which is a header where it has the column of paths. Without a header it must begin with a path (an
extension, or a slash); then fields may also stand apart by ONE space, as in VideoMAE's lists, where the path
ends in an extension: paths in such a file hold no space. Blank lines only count as lines.

Faulty lines are gathered (Faults) and told of together.
"""

from __future__ import annotations

import csv
import json
import math
import re
import tempfile
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
from reelmae.pipeline.schema import COMMITS
from reelmae.pipeline.storage.store import Store

MAX_COLUMNS = 1000
TOLD = 10  # faults named in one message
_PIECE = 4 << 20  # bytes read at once
_PARQUET_ROWS = 10_000  # rows read at once
_LONGEST = 16 << 20  # bytes of a line
_ROLES = {
    "url": ("url", "path"),
    "label": ("label",),
    "start": ("start", "start_s", "time_start"),
    "end": ("end", "end_s", "time_end"),
}
_SEPARATORS = (",", "\t", ";", "|")
_EXTENSION = re.compile(r"\.[A-Za-z0-9]{1,5}$")
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,18}")
_DECIMAL = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+([eE][+-]?[0-9]+)?|[eE][+-]?[0-9]+)")
encode_json = json.JSONEncoder(sort_keys=True, ensure_ascii=False, default=str).encode
# what a column's values were seen to be; their union tells its type
_INT, _BIG, _FLOAT, _BOOL, _TEXT = 1, 2, 4, 8, 16


@dataclass
class Faults:
    """What is wrong with a manifest, by line: the first few are kept, all are counted."""

    src: str
    unit: str = "line"
    count: int = 0
    kept: list[tuple[int, str]] = field(default_factory=list)

    def add(self, line: int, words: str) -> None:
        """Note one."""
        self.count += 1
        self.kept.append((line, words))
        if len(self.kept) > 20 * TOLD:
            self.kept = sorted(self.kept)[:TOLD]

    def extend(self, some: list[tuple[int, str]], count: int) -> None:
        """Note the first of `count` that were found elsewhere."""
        self.count += count
        self.kept += some

    def raise_any(self) -> None:
        """InputError that names the first ten, where there is one."""
        if self.count:
            told = [f"{self.src}, {self.unit} {line}: {words}" for line, words in sorted(self.kept)[:TOLD]]
            more = f"\nand {self.count - len(told)} more" if self.count > len(told) else ""
            raise InputError("\n".join(told) + more)


@dataclass(frozen=True)
class Columns:
    """Where a record holds what: positions, None where the manifest has no such column. `extra`: the columns that
    are carried, in order: (position, name in the index, int64 | double | bool | string)."""

    url: int
    label: int | None
    start: int | None
    end: int | None
    extra: tuple[tuple[int, str, str], ...]


@contextmanager
def open_manifest(src: str, config: ShardConfig) -> Iterator[tuple[ManifestFile, Faults]]:
    """The manifest at a path or URL (copied to local disk, as it is read twice), and where its faults go.

    InputError where it is not there, is no file, or its columns cannot be told.
    """
    store, lower = Store(src), src.lower()
    with tempfile.TemporaryDirectory(prefix="reelmae-") as folder:
        path = store.local_path() if store.is_local else Path(folder, "manifest")
        try:
            if not store.is_local:
                store.download("", path)
            elif not path.is_file():
                raise FileNotFoundError
        except FileNotFoundError as e:
            raise InputError(f"{src}: no such manifest; check the path") from e
        if lower.endswith(".parquet"):
            yield _Parquet(path, src), Faults(src, "row")
        elif lower.endswith(".jsonl"):
            yield _Jsonl(path, src), Faults(src)
        else:
            yield _Text(path, src, config), Faults(src)


def find_columns(file: ManifestFile, src: str, config: ShardConfig) -> Columns:
    """What each column is for; InputError where one that is asked for is missing, or a name can stand for two."""
    names = file.names
    if len(names) > MAX_COLUMNS or len(set(names)) < len(names):
        top = Counter(names).most_common(1)[0]
        raise InputError(
            f"{src}: {len(names)} columns, {top[1]} named {top[0]!r}; at most {MAX_COLUMNS}, all named apart"
        )
    asked = {role: getattr(config, f"{role}_column") for role in _ROLES}
    at = {role: _position(file, src, role, name) for role, name in asked.items() if name is not None}
    for number, (role, usual) in enumerate(_ROLES.items()):
        if role in at:
            continue
        free = [i for i in range(len(names)) if i not in at.values()]
        if not file.header and number in free:
            at[role] = number
        elif file.header and (found := [i for n in usual for i in free if names[i] == n]):
            at[role] = found[0]
    if "url" not in at:
        raise _missing(src, "url", None, names, file.header)
    others = [i for i in range(len(names)) if i not in at.values()]
    kinds = file.kinds(others)
    renamed = {i: f"manifest_{names[i]}" if names[i] in COMMITS.names else names[i] for i in others}
    for i, name in renamed.items():
        if name in COMMITS.names or list(renamed.values()).count(name) > 1:
            raise InputError(f"{src}: column {names[i]!r} would be {name!r}, which is taken; rename it")
    extra = tuple((i, name, kinds[i]) for i, name in renamed.items())
    return Columns(at["url"], at.get("label"), at.get("start"), at.get("end"), extra)


def _position(file: ManifestFile, src: str, role: str, name: str) -> int:
    if file.header and name in file.names:
        return file.names.index(name)
    if not file.header and name.isdecimal() and 1 <= int(name) <= len(file.names):
        return int(name) - 1
    raise _missing(src, role, name, file.names, file.header)


class _Text:
    """CSV with any separator. Its records are lists of text."""

    def __init__(self, path: Path, src: str, config: ShardConfig) -> None:
        self._path, self._src = path, src
        self.separator, self.header, fields = _sniff(path, src, config)
        names = [name.strip() for name in fields] if self.header else [""] * len(fields)
        self.names = [name or f"column_{i}" for i, name in enumerate(names, 1)]

    def records(self, faults: Faults) -> Iterator[tuple[int, Sequence[Any]]]:
        """(first physical line, fields) of every record that is whole."""
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
                faults.add(line, "is no UTF-8; save the file as UTF-8")
            elif len(record) != len(self.names):
                faults.add(line, f"has {len(record)} fields, the first line {len(self.names)}; mend it")
            else:
                yield line, record

    def kinds(self, wanted: Sequence[int]) -> dict[int, str]:
        """Column → type, from all of its values."""
        seen = dict.fromkeys(wanted, 0)
        for _, record in self.records(Faults("")) if seen else ():
            for i, before in seen.items():
                if before < _TEXT and record[i]:
                    seen[i] = before | _kind_of_text(record[i])
        return {i: _type(kinds) for i, kinds in seen.items()}


class _Jsonl:
    """One JSON object a line. Its records are lists of JSON values, None where a line lacks the name."""

    header = True

    def __init__(self, path: Path, src: str) -> None:
        self._path, self._src = path, src
        seen: dict[str, int] = {}
        faults = Faults(src)
        for _, row in self._objects(faults):
            for name, value in row.items():
                seen[name] = seen.get(name, 0) | _kind_of_value(value)
            if len(seen) > MAX_COLUMNS:
                raise InputError(f"{src}: has more than {MAX_COLUMNS} columns; is it a list of videos?")
        if not seen:
            faults.raise_any()
        self.names, self._seen = list(seen), list(seen.values())

    def _objects(self, faults: Faults) -> Iterator[tuple[int, dict[str, Any]]]:
        for line, raw in enumerate(_lines(self._path, self._src), 1):
            if not raw.strip():
                continue
            try:
                row = json.loads(raw.decode())
                if b"\\u" in raw:
                    encode_json(row).encode()  # half a surrogate pair can be written so
            except UnicodeDecodeError:
                faults.add(line, "is no UTF-8; save the file as UTF-8")
            except (ValueError, RecursionError) as e:
                faults.add(line, f"is no JSON: {e}")
            else:
                if isinstance(row, dict):
                    yield line, row
                else:
                    faults.add(line, "is no JSON object; write {...}")

    def records(self, faults: Faults) -> Iterator[tuple[int, Sequence[Any]]]:
        """(line, values in the order of `names`)."""
        for line, row in self._objects(faults):
            yield line, [row.get(name) for name in self.names]

    def kinds(self, wanted: Sequence[int]) -> dict[int, str]:
        """Column → type, from all of its values."""
        return {i: _type(self._seen[i]) for i in wanted}


class _Parquet:
    """A Parquet file. Its records are lists of Python numbers, booleans and texts; lines are rows, from 1."""

    header = True

    def __init__(self, path: Path, src: str) -> None:
        self._path, self._src = path, src
        try:
            with pq.ParquetFile(path) as file:
                self._schema = file.schema_arrow
        except (pa.ArrowException, OSError) as e:
            raise InputError(f"{src}: cannot be read as Parquet: {e}") from e
        self.names = list(self._schema.names)

    def records(self, faults: Faults) -> Iterator[tuple[int, Sequence[Any]]]:
        """(row, values in the order of `names`)."""
        done = 0
        try:
            with pq.ParquetFile(self._path) as file:
                for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                    yield from enumerate(zip(*map(_plain, batch.columns), strict=True), done + 1)
                    done += batch.num_rows
        except (pa.ArrowException, OSError) as e:
            raise InputError(f"{self._src}: cannot be read as Parquet beyond row {done}: {e}") from e

    def kinds(self, wanted: Sequence[int]) -> dict[int, str]:
        """Column → type, from the file's own."""
        return {i: _arrow_kind(self._schema.field(i).type) for i in wanted}


ManifestFile = _Text | _Jsonl | _Parquet


def _arrow_kind(kind: pa.DataType) -> str:
    if pa.types.is_integer(kind):
        return "int64"
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "double"
    return "bool" if pa.types.is_boolean(kind) else "string"


def _plain(column: pa.Array) -> list[Any]:
    if _arrow_kind(column.type) == "string":
        try:
            column = column.cast(pa.string())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            # lists, structs, bytes that are no text: arrow writes no text for them, Python does; no value is lost
            return [None if v is None else str(v) for v in column.to_pylist()]
    return column.to_pylist()


def _lines(path: Path, src: str) -> Iterator[bytes]:
    """A file's lines with their line feeds, without a byte order mark. InputError at a line beyond all measure."""
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
    """Its lines; the numbers of those that are no UTF-8 are put into `broken`."""
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
                raise InputError(f"{src}, line {broken[0]}: is no UTF-8; save the file as UTF-8")
            if any(name.strip() for name in record):
                return record
    except csv.Error:
        pass
    return []


def _sniff(path: Path, src: str, config: ShardConfig) -> tuple[str, bool, list[str]]:
    """(separator, whether there is a header, the first line's fields)."""
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
        raise _missing(src, "url", config.url_column, [name.strip() for name in fields], True)
    raise InputError(f"{src}: names no file; its first line is empty or cannot be read")


def _missing(src: str, role: str, asked: str | None, names: Sequence[str], header: bool) -> InputError:
    there = ", ".join(map(repr, names[:30])) or "none" if header else f"columns 1 to {len(names)}, no header"
    return InputError(
        f"{src}: no column {asked or ' or '.join(_ROLES[role])}; there are {there}; name it with --{role}-column"
    )


def _kind_of_text(text: str) -> int:
    if _INTEGER.fullmatch(text):
        return _kind_of_value(int(text))
    return (_DECIMAL.fullmatch(text) and _kind_of_value(float(text))) or _TEXT


def _kind_of_value(value: Any) -> int:
    if value is None or value == "" or (isinstance(value, float) and not math.isfinite(value)):
        return 0
    if isinstance(value, bool):
        return _BOOL
    if isinstance(value, int):
        return _INT if abs(value) <= 1 << 53 else _BIG if -(1 << 63) <= value < 1 << 63 else _TEXT
    return _FLOAT if isinstance(value, float) else _TEXT


def _type(seen: int) -> str:
    if seen in (_INT, _BIG, _INT | _BIG):
        return "int64"
    return "double" if seen in (_FLOAT, _FLOAT | _INT) else "bool" if seen == _BOOL else "string"
