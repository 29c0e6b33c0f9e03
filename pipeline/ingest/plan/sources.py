"""Lists the sources of a job, from a folder, a bucket, a manifest or tars.

- A tar is opened: its members are sources (tar_sources.py), wherever it is listed or named.
- Nothing is skipped: dot files, side files and broken links are sources and end among the rejects.
- A source is named by its full URL, a local one by its plain absolute path. A local name that is not UTF-8 cannot
  stand in a table; it is named by a percent-encoded `file://` URL.
- Options of SRC's file system are for URLs of its kind alone: what a manifest names elsewhere never gets its keys.
- A manifest's paths are relative to its folder. Refused, unless the config allows them, are a path that leads out of
  that folder, an absolute path or a URL of the manifest's own scheme elsewhere, and a file of this machine in a
  remote manifest. URLs of other schemes are allowed if the scheme is one of REMOTE.
- Compressed tars are refused where they are given by name. A manifest's row that names a tar is for all its members.
- A manifest's times are seconds, MM:SS or HH:MM:SS, with a fraction. An end without a start means from the beginning.

It holds the finished table and 50,000 rows as Python objects in memory.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes, unquote_to_bytes

import fsspec
import pyarrow as pa
import pyarrow.compute as pc

from reelmae.pipeline.errors import InputError
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.plan.deal import LISTED, OPEN, ROWS, WHOLE, group_rows
from reelmae.pipeline.ingest.plan.manifest import (
    SHOWN,
    LineFaults,
    ManifestColumns,
    ManifestFile,
    find_columns,
    open_manifest,
)
from reelmae.pipeline.ingest.plan.tar_names import compressed_fault, expand_tars, is_compressed, is_tar, names_tars
from reelmae.pipeline.ingest.plan.tar_sources import TarEntry, TarMembers, list_members, number_repeats
from reelmae.pipeline.ingest.plan.values import encode_values, is_empty, to_text
from reelmae.pipeline.schema import FORMAT, TAR_COLUMNS
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.store import Store, require_folder

MANIFESTS = (".csv", ".tsv", ".jsonl", ".parquet")
_CLOUD = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "hf")
_NETWORK = ("http", "https", "ftp", "sftp", "ssh", "hdfs", "webhdfs")
REMOTE = (*_CLOUD, *_NETWORK, "memory")  # schemes that cannot reach a file of this machine
_UNKNOWN: dict[str, Any] = {"size": -1, "etag": "", "label": None, "rows": None}  # of a source that is not there
_BATCH = 50_000  # rows turned into arrow at once
_LONGEST = 4096  # characters of a path
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")
_ALIASES = {"s3a": "s3", "gcs": "gs"}
_DOTS = re.compile(r"(?:/|%2f)(?:\.|%2e){1,2}(?:/|%2f|$)", re.IGNORECASE)
_CLOCK = re.compile(r"(?:([0-9]+):(?=[0-5]?[0-9]:))?([0-9]+):([0-5]?[0-9](?:\.[0-9]*)?)")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


@dataclass(frozen=True)
class Listing:
    """The sources of a job."""

    table: pa.Table
    """LISTED, or MEMBERS where some are members of tars; one row a source, sorted by url."""
    columns: dict[str, str]
    """The carried columns, a manifest's in its own order: name in the index → int64, double, bool or string."""
    rows: int
    """The number of listed files, of the manifest's rows, or of the tars."""


def is_manifest(src: str) -> bool:
    """Whether SRC names a manifest (by its extension) rather than a folder."""
    return src.lower().endswith(MANIFESTS) and not (_is_local(src) and Store(src).local_path().is_dir())


def is_tar_list(src: str) -> bool:
    """Whether SRC names tars (`x.tar`, `{000..999}.tar`, `a.tar::b.tar`) rather than a folder."""
    return names_tars(src) and not (_is_local(src) and Store(src).local_path().is_dir())


def is_folder(src: str) -> bool:
    """Whether SRC is a folder or bucket, of which every file is a source."""
    return not (is_manifest(src) or is_tar_list(src))


def source_url(src: str, access: Access | None = None) -> str:
    """SRC as a plan names it: the full URL, of a list of tars each."""
    return "::".join(Store(name, access).url() for name in (src.split("::") if is_tar_list(src) else [src]))


def _is_local(url: str) -> bool:
    scheme = _SCHEME.match(url)
    return scheme is None or scheme.group(1) == "file"


def list_sources(src: str, config: ShardConfig, access: Access | None = None, format: int = FORMAT) -> Listing:
    """Every file below a folder or bucket `src`, or every source that a manifest `src` names.

    `access`: how `src` is reached. `format`: of the dataset; its own columns are not taken from a manifest.
    InputError where there is none, or where lines of a manifest have faults: it names the first ten.
    """
    if is_manifest(src):
        return _read_manifest(src, config, access, format)
    if is_tar_list(src):
        return _open_list(src, config, access, format)
    names = ["url", "size", "etag", "label"]
    columns = pa.schema([LISTED.field(name) for name in names])
    store = require_folder(src, access)
    table = _build_table(_list_folder(store, config.labels), columns)
    if not table.num_rows:
        raise InputError(f"{src}: holds no file; give the folder or bucket that holds the videos")
    table = table.append_column("rows", pa.nulls(table.num_rows, LISTED.field("rows").type)).cast(LISTED)
    called = _called_tars(table)
    if not pc.any(called).as_py():
        return Listing(table.sort_by("url"), {}, table.num_rows)
    entries = (
        TarEntry(row["url"], row["size"], row["etag"], folder=row["label"])
        for row in table.filter(called).select(names).to_pylist()
    )
    root = Path(store.root).resolve() if store.is_local else None
    in_folders = config.labels == "folder"
    reach = partial(access_of, src=src, access=access or Access())
    found = list_members(entries, reach, config, format, own={}, root=root, in_folders=in_folders)
    return Listing(_join(table, found), found.columns, table.num_rows)


def _open_list(src: str, config: ShardConfig, access: Access | None, format: int) -> Listing:
    """The members of the tars that `src` names; a tar that is missing is a source that is gone."""
    tars = list(dict.fromkeys(_source_name(Store(tar, access).url()) for tar in expand_tars(src)))
    reach = partial(access_of, src=src, access=access or Access())
    in_folders = config.labels == "folder"
    found = list_members(map(TarEntry, tars), reach, config, format, own={}, in_folders=in_folders)
    if not found.opened and not any(Store(tar, reach(tar)).exists() for tar in tars):
        raise InputError(f"{src}: no such tar; check the path")
    unknown = {name: [value] * len(tars) for name, value in _UNKNOWN.items()}
    return Listing(_join(pa.Table.from_pydict({"url": tars} | unknown, LISTED), found), found.columns, len(tars))


def _called_tars(table: pa.Table) -> pa.ChunkedArray:
    """Which sources are called tars."""
    return pc.ends_with(pc.utf8_lower(table.column("url")), ".tar")


def _join(table: pa.Table, found: TarMembers) -> pa.Table:
    """The sources (LISTED), with the members of tars instead of the tars that were opened."""
    if not found.opened:
        return table.sort_by("url")
    is_opened = pc.is_in(table.column("url"), value_set=pa.array(sorted(found.opened)))
    loose = table.filter(pc.invert(is_opened))
    for column in TAR_COLUMNS:
        loose = loose.append_column(column, pa.nulls(loose.num_rows, column.type))
    return number_repeats(pa.concat_tables([loose, found.table]))


def _build_table(rows: Iterable[tuple[Any, ...]], columns: pa.Schema) -> pa.Table:
    batches: list[pa.RecordBatch] = []
    some: list[tuple[Any, ...]] = []

    def flush() -> None:
        arrays = [pa.array(c, f.type) for c, f in zip(zip(*some, strict=True), columns, strict=True)]
        batches.append(pa.RecordBatch.from_arrays(arrays, schema=columns))
        some.clear()

    for row in rows:
        some.append(row)
        if len(some) == _BATCH:
            flush()
    if some:
        flush()
    return pa.Table.from_batches(batches, columns)


def _list_folder(store: Store, labels: str) -> Iterator[tuple[str, int, str, str | None]]:
    for entry in store.list():
        label = None
        if labels == "folder" and "/" in entry.path:
            label = os.fsencode(entry.path.split("/")[0]).decode("utf-8", "backslashreplace")
        yield _source_name(entry.url), entry.size, entry.etag, label


def _source_name(url: str) -> str:
    try:
        url.encode()
    except UnicodeEncodeError:
        return "file://" + quote_from_bytes(os.fsencode(url))
    return url


def _read_manifest(src: str, config: ShardConfig, access: Access | None, format: int) -> Listing:
    with open_manifest(src, config, access) as (file, faults):
        columns = find_columns(file, src, config, format)
        found = [_build_table(_rows(file, columns, _Resolver(src, config.allow_outside, access), faults), ROWS)]
    if n := found[0].num_rows:
        table, found_faults, count = group_rows(
            found.pop(), faults.unit, SHOWN
        )  # pop: else a second copy stays in memory
        faults.extend(found_faults, count)
    faults.raise_any()
    if not n:
        raise InputError(f"{src}: names no file; write a row for each video")
    own = {name: kind for _, name, kind in columns.extra}
    called = _called_tars(table)
    if not pc.any(called).as_py():
        return Listing(table, own, n)
    reach = partial(access_of, src=src, access=access or Access())
    members = list_members(_entries_of(table.filter(called)), reach, config, format, own=own)
    return Listing(_join(table, members), own | members.columns, n)


def _entries_of(table: pa.Table) -> Iterator[TarEntry]:
    """The tars that a manifest's rows name, with what the rows say of all their members."""
    for row in table.to_pylist():
        extra = json.loads(row["rows"][0]["extra"] or "{}") if row["rows"] else {}
        yield TarEntry(row["url"], label=row["label"], extra=extra)


def _rows(
    file: ManifestFile, columns: ManifestColumns, resolve: _Resolver, faults: LineFaults
) -> Iterator[tuple[str, str | None, float, float, str | None, int]]:
    """The manifest's rows as tuples of ROWS; the faults go to `faults`."""
    at_label, spans = columns.label, (columns.start, columns.end) != (None, None)
    for line, cells in file.records(faults):
        try:
            path = cells[columns.url]
            if path is None or path == "":
                raise ValueError("has no path; give one or remove the line")
            url = resolve(path)
            label = None if at_label is None or is_empty(cells[at_label]) else to_text(cells[at_label])
            start, end = _span(cells, columns) if spans else (WHOLE, OPEN)
            if is_compressed(url):
                raise ValueError(compressed_fault(url))
            if is_tar(url) and (start, end) != (WHOLE, OPEN):
                raise ValueError(f"{url!r} is a tar, which has no span; leave it out")
            extra = _extra(cells, columns) if columns.extra else None
        except ValueError as e:
            faults.add(line, str(e))
            continue
        yield url, label, start, end, extra, line


def _span(cells: Sequence[Any], columns: ManifestColumns) -> tuple[float, float]:
    start = None if columns.start is None else _seconds(cells[columns.start], "start")
    end = None if columns.end is None else _seconds(cells[columns.end], "end")
    if start is None and end is None:
        return WHOLE, OPEN
    start, end = start or 0.0, OPEN if end is None else end
    if end <= start:
        raise ValueError(f"end {end:g} is not after start {start:g}; times are seconds, MM:SS or HH:MM:SS")
    return start, end


def _seconds(value: Any, name: str) -> float | None:
    if value is None or value == "":
        return None
    seconds = math.nan
    if isinstance(value, str):
        if clock := _CLOCK.fullmatch(value.strip()):
            hours, minutes, rest = clock.groups()
            seconds = int(hours or 0) * 3600 + int(minutes) * 60 + float(rest)
        elif _NUMBER.fullmatch(value.strip()):
            seconds = float(value)
    elif not isinstance(value, bool | list | dict):
        seconds = float(value)
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"{name} {_short(value)} is not a time; write seconds from 0 on, MM:SS or HH:MM:SS")
    return seconds + 0.0  # turns -0 into 0


def _extra(cells: Sequence[Any], columns: ManifestColumns) -> str | None:
    return encode_values((name, kind, cells[i]) for i, name, kind in columns.extra)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


class _Resolver:
    """A manifest's entry → the full URL of the source; ValueError where the manifest may not name it."""

    def __init__(self, src: str, allow_outside: bool, access: Access | None) -> None:
        parent = Store(Store(src, access).url().rpartition("/")[0] or "/", access)
        url = parent.url().rstrip("/")
        self._allow, self._local, self._base = allow_outside, parent.is_local, f"{url}/"
        self._real = f"{Path(parent.root).resolve()}/" if parent.is_local else self._base
        self._scheme = "file" if parent.is_local else _family(self._base)
        self._strip: dict[str, Any] = {}

    def __call__(self, path: Any) -> str:
        """The full URL of one entry."""
        if not isinstance(path, str):
            raise ValueError(f"path {_short(path)} is not text; write it in quotes")
        if len(path) > _LONGEST or "\0" in path:
            raise ValueError(f"path {_short(path)} is not a path (longer than {_LONGEST} characters, or with NUL)")
        if "://" in path and (scheme := _SCHEME.match(path)):
            return self._resolve_url(path, scheme.group(1).lower(), path[scheme.end() :])
        return self._resolve_local(path) if path.startswith("/") else self._resolve_relative(path)

    def _refuse_outside(self, path: str, words: str) -> None:
        if not self._allow:
            raise ValueError(f"{_short(path)} {words}; move it, or allow it with --allow-outside")

    def _resolve_relative(self, path: str) -> str:
        if "//" not in path and "./" not in path and path[-1] not in "/.":
            return self._base + path  # already normal: the usual case, and normpath costs more than all the rest
        tidy = os.path.normpath(path)
        if tidy == ".":
            raise ValueError(f"{path!r} names the manifest's own folder; name a file")
        if tidy.split("/")[0] != "..":
            return self._base + tidy
        self._refuse_outside(path, "leads out of the manifest's folder")
        if self._local:
            return Store(self._base + path).url()
        prefix, _, folder = self._base.partition("://")
        bucket = folder.split("/")[0]
        whole = os.path.normpath(folder + path)
        if not whole.startswith(f"{bucket}/") or folder.count("/") <= tidy.split("/").count(".."):
            raise ValueError(f"{path!r} leads out of {prefix}://{bucket}; write a whole URL")
        return f"{prefix}://{whole}"

    def _resolve_local(self, path: str) -> str:
        url = path if not ("//" in path or "./" in path or path[-1] in "/.") else Store(path).url()
        if not self._local:
            self._refuse_outside(path, "is a file of this machine in a remote manifest")
        elif not url.startswith((self._base, self._real)):
            self._refuse_outside(path, "is outside of the manifest's folder")
        return url

    def _resolve_url(self, path: str, scheme: str, rest: str) -> str:
        if scheme == "file":
            if not rest.startswith("/"):
                raise ValueError(f"{_short(path)} is not a whole path; write file:///FOLDER/FILE")
            decoded = os.fsdecode(unquote_to_bytes(rest))
            if _source_name(decoded) == decoded or "\0" in decoded:
                return self._resolve_local(rest)  # only names that are not UTF-8 are percent-encoded
            return _source_name(self._resolve_local(decoded))
        if scheme not in self._strip:
            try:
                self._strip[scheme] = fsspec.get_filesystem_class(scheme)._strip_protocol
            except (ImportError, ValueError) as e:
                raise ValueError(f"no filesystem for '{scheme}://' ({e}); install its fsspec package") from e
        if scheme not in REMOTE and _family(scheme) != self._scheme:
            self._refuse_outside(path, "may name a file of this machine")
        stripped = self._strip[scheme](f"{scheme}://{rest}").rstrip("/")
        url = stripped if _SCHEME.match(stripped) else f"{scheme}://{stripped}"
        if not stripped:
            raise ValueError(f"{path!r} names no bucket; write {scheme}://BUCKET/PATH")
        if _family(url) == self._scheme and (not url.startswith(self._base) or ("." in url and _DOTS.search(url))):
            self._refuse_outside(path, "is outside of the manifest's folder")
        return url


def _family(url: str) -> str:
    scheme = url.partition("://")[0].lower()
    return _ALIASES.get(scheme, scheme)


def access_of(url: str, src: str, access: Access) -> Access:
    """How a source of `src` is reached: with the options that are for `src` only where it is of the same kind.

    The kind of a local manifest's options is that of its cloud URLs.
    """
    mine, theirs = _family(url), "" if _is_local(src) else _family(src)
    if mine == theirs or (not theirs and mine not in _NETWORK):
        return access
    return replace(access, options={})


def local_path(url: str) -> Path | None:
    """The path of a source of this machine; None where its url is of another place."""
    if url.startswith("file://"):
        return Path(os.fsdecode(unquote_to_bytes(url.removeprefix("file://"))))
    return Path(url) if url.startswith("/") else None
