"""Opens tars, many at a time, and lists the sources in them: headers and side files are read, never the videos.

What is wrong with a tar stops no job: its members are sources as far as they are found, and the tar itself is one that
cannot be read (`fault`). What is called a tar and has nothing of one is left to be judged by its content, like any
other file, and so is one that is gone. A remote tar with a fault is scanned again before that is believed: the network
may have done it.

A tar's sources are an arrow table as soon as it is read, so memory holds the finished table and some tars' samples.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import pyarrow as pa
import pyarrow.compute as pc

from reelmae.pipeline.errors import InputError, ShortFileError, StorageError
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.plan.deal import MEMBERS
from reelmae.pipeline.ingest.plan.manifest import MAX_COLUMNS
from reelmae.pipeline.ingest.plan.samples import (
    SampleReader,
    TarSource,
    decode_columns,
    encode_columns,
    folder_of,
)
from reelmae.pipeline.ingest.plan.tar_names import member_url, repeat_url
from reelmae.pipeline.ingest.plan.values import column_type, encode_values, kind_of_value
from reelmae.pipeline.ingest.plan.web import refused_status
from reelmae.pipeline.ingest.tars.scan import TarScan, show_name
from reelmae.pipeline.schema import SOURCES, TAR_COLUMNS, commit_columns
from reelmae.pipeline.storage.access import Access, interruptible
from reelmae.pipeline.storage.checked import CAUSE, READS, UNSTEADY
from reelmae.pipeline.storage.store import Store

SCANS = 32  # remote tars that are read at a time
_NO_MEMBER = "its tar holds no such member any more"
_ROWS = 4_000  # sources turned into arrow at once
# a tar's sources as they are found: what their side files say is in `columns`, as JSON
_FOUND = pa.schema(
    [
        *(SOURCES.field(name) for name in ("url", "size", "etag", "label")),
        pa.field("columns", pa.string()),
        *TAR_COLUMNS,
    ]
)


@dataclass(frozen=True)
class TarEntry:
    """A tar that a listing, a list or a manifest names."""

    url: str
    size: int = -1
    """-1: it is not known yet whether it is there."""
    etag: str = ""
    label: str | None = None
    """Of all members, whatever they say themselves."""
    folder: str | None = None
    """Label of members that have no other."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Values of the manifest's own columns, which hold for all members."""


@dataclass
class _Tar:
    """What was found in a tar."""

    entry: TarEntry
    found: pa.Table
    faults: list[str]
    kinds: dict[str, int]
    """Column → the kinds of its values."""
    labels: int
    unreadable: int

    @property
    def is_suspicious(self) -> bool:
        return bool(self.faults or self.unreadable)


@dataclass(frozen=True)
class TarMembers:
    """The sources in some tars."""

    table: pa.Table
    """MEMBERS."""
    columns: dict[str, str]
    """Columns of the side files: name in the index → int64, double, bool or string."""
    opened: set[str]
    """Urls of the tars that were opened; the others are sources like any file."""


def list_members(
    entries: Iterable[TarEntry],
    access_to: Callable[[str], Access],
    config: ShardConfig,
    format: int,
    *,
    own: Mapping[str, str],
    root: Path | None = None,
    in_folders: bool = False,
) -> TarMembers:
    """The sources in these tars.

    access_to: url → how it is reached. own: the columns of the manifest that names the tars; side files' columns of
    these names are left out. root: of a local bucket, out of which no link may lead. in_folders: a member without a
    label has the first folder of its path as label. InputError where there are too many columns, or no member has the
    label column that the config names.
    """
    tars: deque[_Tar] = deque()
    seen: Counter[str] = Counter()
    labels = 0
    for tar in _scan_all(entries, access_to, config, root, in_folders):
        tars.append(tar)
        labels += tar.labels
        for name, kinds in tar.kinds.items():
            seen[name] |= kinds
        if len(seen) > MAX_COLUMNS:
            raise InputError(f"{tar.entry.url}: the .json files of its bucket have more than {MAX_COLUMNS} names")
    opened = {tar.entry.url for tar in tars}
    if tars and config.label_column and not labels and not own:
        raise InputError(f"no .json in the tars has a {config.label_column!r}; name their label with --label-column")
    names = {name: kinds for name, kinds in seen.items() if name not in own and kinds}
    renamed = _rename(names, set(commit_columns(format).names) | set(own))
    types = {renamed[name]: column_type(kinds) for name, kinds in names.items()}
    tables = [MEMBERS.empty_table()]
    while tars:
        tables.append(_finish(tars.popleft(), renamed, types))
    return TarMembers(pa.concat_tables(tables), types, opened)


def number_repeats(table: pa.Table) -> pa.Table:
    """Sources sorted by url, in which members of the same name have their number in the url."""
    while True:
        keys = [("url", "ascending"), ("offset", "ascending")]  # a file of its own, without offset, comes last
        table = table.sort_by(keys)
        urls = table.column("url")
        same = pc.equal(urls.slice(1), urls.slice(0, max(0, len(urls) - 1))).to_numpy()
        if not same.any():
            return table
        new, number = urls.to_pylist(), 1
        is_member = pc.is_valid(table.column("offset")).to_pylist()
        for i, again in enumerate(same, 1):
            number = number + 1 if again else 1
            if again:
                at = i if is_member[i] else i - 1  # a file keeps its url
                new[at] = repeat_url(new[at], number)
        table = table.set_column(0, table.schema.field(0), pa.array(new, pa.string()))


def scan_again(rows: pa.Table, access_to: Callable[[str], Access], config: ShardConfig) -> pa.Table:
    """Planned sources (MEMBERS) that are tried again: members with their place and fault as their tars are now."""
    tars = pc.unique(rows.column("tar")).drop_null().to_pylist()
    wanted, opened = pa.array(rows.column("url").to_pylist()), set()
    now: dict[str, dict[str, Any]] = {}
    for tar in _scan_all(map(TarEntry, tars), access_to, config, None, False):
        opened.add(tar.entry.url)
        found = number_repeats(tar.found).select(["url", "size", "etag", *TAR_COLUMNS.names])
        now |= {row["url"]: row for row in found.filter(pc.is_in(found.column("url"), value_set=wanted)).to_pylist()}
    new = []
    for row in rows.to_pylist():
        url, tar = row["url"], row["tar"]
        if url in now:
            row |= now[url]
        elif tar in opened:
            row["fault"] = "is whole now: --append takes the members that are new" if url == tar else _NO_MEMBER
        elif url == tar:  # gone, or no tar any more: a file like any other
            row |= dict.fromkeys(TAR_COLUMNS.names)
        elif tar is not None:
            row["fault"] = None
        if row["tar"] is None:
            row["size"] = -1  # it may have changed
        new.append(row)
    return pa.Table.from_pylist(new, MEMBERS)


# --- one tar


def _scan_all(
    entries: Iterable[TarEntry],
    access_to: Callable[[str], Access],
    config: ShardConfig,
    root: Path | None,
    in_folders: bool,
) -> Iterator[_Tar]:
    """What is in each tar, in their order; nothing of those that cannot be opened."""

    def scan(entry: TarEntry) -> _Tar | None:
        path = entry.url
        if path.startswith("file://"):  # its name is not UTF-8
            path = os.fsdecode(unquote_to_bytes(path.removeprefix("file://")))
        store = Store(path, access_to(entry.url))
        if store.is_local and not _is_open(store.local_path(), root):
            return None
        try:
            if entry.size < 0:
                content = store.look("")
                entry = replace(entry, size=content.size, etag=content.etag)
            return _scan_agreed(entry, store, config.label_column or "label", in_folders)
        except FileNotFoundError:
            return None
        except StorageError as e:
            if refused_status(entry.url, e):  # as a loose source it is rejected in words
                return None
            raise

    pool = ThreadPoolExecutor(SCANS, thread_name_prefix="reelmae-tars")
    try:
        waiting: deque[Future[_Tar | None]] = deque()

        def next_of() -> _Tar | None:
            with interruptible(pool):
                return waiting.popleft().result()

        for entry in entries:
            if not entry.url.startswith(("/", "file://")):
                waiting.append(pool.submit(scan, entry))
                if len(waiting) >= 2 * SCANS and (tar := next_of()) is not None:
                    yield tar
            elif (tar := scan(entry)) is not None:  # threads would only take turns
                yield tar
        while waiting:
            if (tar := next_of()) is not None:
                yield tar
    finally:
        pool.shutdown(cancel_futures=True)


def _is_open(path: Path, root: Path | None) -> bool:
    """Whether a local path is a plain file of the bucket."""
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError):  # gone, or a link in a ring
        return False
    return real.is_file() and (root is None or real.is_relative_to(root))


def _scan_agreed(entry: TarEntry, store: Store, label_column: str, in_folders: bool) -> _Tar | None:
    """What is in one tar; None where it is none. A remote one with a fault is scanned until two scans agree."""
    scans: list[_Tar | None] = []
    size = entry.size
    for _ in range(READS):
        try:
            found = _scan(entry, store, size, label_column, in_folders)
        except ShortFileError:
            there = store.look("").size
            if there == size:
                raise InputError(
                    f"{entry.url}: its server gives other bytes than those asked for, so it cannot be read in parts; "
                    "copy it to a bucket or a disk"
                ) from None
            size = there  # it is another since it was listed
            continue
        if store.is_local or (scans and _agree(scans[-1], found)):
            return found
        if scans:
            store.access.retries.add(CAUSE)
        if found is not None and not found.is_suspicious:
            return found
        scans.append(found)
    raise StorageError(f"{entry.url}: {UNSTEADY}")


def _agree(one: _Tar | None, other: _Tar | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.faults == other.faults and one.found.equals(other.found)


def _scan(entry: TarEntry, store: Store, size: int, label_column: str, in_folders: bool) -> _Tar | None:
    reader = SampleReader(label_column)
    if size < 0:
        raise InputError(f"{entry.url}: its server does not tell its size; copy it to a bucket or a disk")
    scan = TarScan(lambda offset, length: store.read_range("", offset, length), size)
    kinds: Counter[str] = Counter()
    batches: list[pa.RecordBatch] = []
    rows: list[tuple[Any, ...]] = []

    def flush() -> None:
        columns = zip(*rows, strict=True)
        arrays = [pa.array(values, f.type) for values, f in zip(columns, _FOUND, strict=True)]
        batches.append(pa.RecordBatch.from_arrays(arrays, schema=_FOUND))
        rows.clear()

    for source in reader.read(scan):
        for name, value in source.columns.items():
            kinds[name] |= kind_of_value(value)
        rows.append(_row(entry, size, source, in_folders))
        if len(rows) == _ROWS:
            flush()
    if not scan.is_tar:
        return None
    if scan.faults:
        rows.append((entry.url, size, entry.etag, None, None, entry.url, -1, -1, f"the tar {'; '.join(scan.faults)}"))
    if rows:
        flush()
    table = pa.Table.from_batches(batches, _FOUND)
    return _Tar(entry, table, scan.faults, dict(kinds), reader.labels, reader.unreadable)


def _row(entry: TarEntry, tar_size: int, source: TarSource, in_folders: bool) -> tuple[Any, ...]:
    """A row of _FOUND."""
    member = source.member
    size = min(member.size, max(0, tar_size - member.data))  # what is there of a member that is longer than its tar
    label = entry.label or source.label or entry.folder or (folder_of(member.name) if in_folders else None)
    return (
        member_url(entry.url, show_name(member.name)),
        size,
        entry.etag,
        label,
        encode_columns(source.columns),
        entry.url,
        member.offset,
        member.data + size,
        member.fault or None,
    )


# --- columns


def _rename(names: Iterable[str], taken: set[str]) -> dict[str, str]:
    """Name in the side files → name in the index: a taken one gets `manifest_` before it, so often that it is free."""
    given = sorted(names)
    renamed = {name: name for name in given if name not in taken}
    used = taken | set(renamed)
    for name in given:
        if name not in renamed:
            new = f"manifest_{name}"
            while new in used:
                new = f"manifest_{new}"
            renamed[name] = new
            used.add(new)
    return renamed


def _finish(tar: _Tar, renamed: Mapping[str, str], types: Mapping[str, str]) -> pa.Table:
    """A tar's sources (MEMBERS), with the columns of the index in their `rows`."""
    found = tar.found
    extras = []
    for columns in decode_columns(found.column("columns").to_pylist()):
        values = ((renamed[name], types[renamed[name]], value) for name, value in columns.items() if name in renamed)
        own = ((name, _own_type(value), value) for name, value in tar.entry.extra.items())
        extras.append(encode_values((*values, *own)))
    labels = found.column("label").to_pylist()
    rows = [
        None if extra is None else [{"start_s": None, "end_s": None, "label": label, "extra": extra}]
        for label, extra in zip(labels, extras, strict=True)
    ]
    at = found.schema.get_field_index("columns")
    return found.set_column(at, MEMBERS.field("rows"), pa.array(rows, MEMBERS.field("rows").type)).cast(MEMBERS)


def _own_type(value: Any) -> str:
    """The type of a value that a manifest's column has given it already."""
    return {bool: "bool", int: "int64", float: "double"}.get(type(value), "string")
