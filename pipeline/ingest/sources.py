"""What a job is to read: a folder or bucket listed, or a manifest read; and one source brought to local disk.

- Nothing is skipped: dot files, side files and broken links are sources and end among the rejects.
- A source is named by its full URL, a local one by its plain absolute path. A local name that is no UTF-8 (such
  names cannot stand in a table) is named by a percent-encoded `file://` URL instead.
- A link that leads out of the bucket is not followed.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote_from_bytes, unquote_to_bytes

import pyarrow as pa
import pyarrow.parquet as pq

from reelmae.pipeline.errors import InputError, StorageError, StorageFullError
from reelmae.pipeline.schema import SOURCES
from reelmae.pipeline.storage import Store, require_folder

MANIFESTS = (".csv", ".tsv", ".jsonl", ".parquet")
LISTED = pa.schema([f for f in SOURCES if f.name != "task"])


def is_manifest(src: str) -> bool:
    """Whether SRC names a manifest (by its extension) rather than a folder."""
    return src.lower().endswith(MANIFESTS) and not (Store(src).is_local and Path(Store(src).root).is_dir())


def list_sources(src: str, labels: str) -> pa.Table:
    """Every source below or named by `src`, sorted by url (LISTED). InputError where there is none.

    labels: "folder" takes the first folder of a path as its label; a manifest's label column counts always.
    """
    if is_manifest(src):
        rows = list(_manifest(src))
    else:
        rows = list(_listing(require_folder(src), labels))
    if not rows:
        raise InputError(f"{src}: holds no file; give the folder or bucket that holds the videos")
    rows.sort()
    return pa.Table.from_pydict(dict(zip(LISTED.names, zip(*rows, strict=True), strict=True)), LISTED)


Row = tuple[str, int, str, str | None]


def _listing(store: Store, labels: str) -> Iterator[Row]:
    for entry in store.list():
        folder = entry.path.split("/")[0] if "/" in entry.path else None
        label = folder if labels == "folder" else None
        yield _name(entry.url), entry.size, entry.etag, None if label is None else _utf8(label)


def _name(url: str) -> str:
    try:
        url.encode()
    except UnicodeEncodeError:
        return "file://" + quote_from_bytes(os.fsencode(url))
    return url


def _utf8(text: str) -> str:
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def _manifest(src: str) -> Iterator[Row]:
    parent, _, name = Store(src).url().rpartition("/")
    store = Store(parent or "/")
    try:
        data = store.read_bytes(name)
    except FileNotFoundError as e:
        raise InputError(f"{src}: no such manifest; check the path") from e
    seen: dict[str, int] = {}
    for line, row in _records(src, data):
        path = str(row.get("url") or row.get("path") or "").strip("\r\n")
        if not path:
            raise InputError(f"{src}, line {line}: has no path; every row needs a `path` or `url`")
        url = _resolve(src, line, store, path)
        if url in seen:
            raise InputError(f"{src}, line {line}: {path!r} is named in line {seen[url]} already; remove one")
        seen[url] = line
        label = row.get("label")
        yield _name(url), -1, "", str(label) if label not in (None, "") else None


def _records(src: str, data: bytes) -> Iterator[tuple[int, dict[str, object]]]:
    lower = src.lower()
    try:
        if lower.endswith(".parquet"):
            table = pq.read_table(pa.BufferReader(data))
            _require_column(src, table.column_names)
            yield from enumerate(table.to_pylist(), 1)
        elif lower.endswith(".jsonl"):
            for line, text in enumerate(data.decode("utf-8-sig").splitlines(), 1):
                if text.strip():
                    row = json.loads(text)
                    if not isinstance(row, dict):
                        raise InputError(f"{src}, line {line}: is no JSON object")
                    _require_column(f"{src}, line {line}", list(row))
                    yield line, row
        else:
            tab = "\t" if lower.endswith(".tsv") else ","
            reader = csv.DictReader(
                io.StringIO(data.decode("utf-8-sig"), newline=""), delimiter=tab, strict=True
            )
            _require_column(src, list(reader.fieldnames or ()))
            for row in reader:
                if None in row:
                    raise InputError(f"{src}, line {reader.line_num}: has more fields than the header")
                yield reader.line_num, row
    except (UnicodeDecodeError, csv.Error, json.JSONDecodeError, pa.ArrowInvalid) as e:
        raise InputError(f"{src}: cannot be read as a manifest: {e}") from e


def _require_column(where: str, names: list[str]) -> None:
    if "path" not in names and "url" not in names:
        raise InputError(
            f"{where}: no column `path` or `url`; there are {', '.join(map(repr, names)) or 'none'}"
        )


def _resolve(src: str, line: int, store: Store, path: str) -> str:
    """Full URL of a manifest's entry: relative ones from the manifest's folder, which they may not leave."""
    if "://" in path or path.startswith("/"):
        return Store(path).url()
    parts = os.path.normpath(path)
    if parts.split("/")[0] == "..":
        raise InputError(
            f"{src}, line {line}: {path!r} leads out of the manifest's folder; write an absolute path"
        )
    return store.url(parts)


def fetch(url: str, to: Path, *, root: Path | None) -> int:
    """Bring a source to `to`, a name of ours on local disk; its size in bytes.

    A local file is hard-linked where that is possible, else copied. FileNotFoundError where it is gone,
    StorageError where it cannot be read, is no plain file, or leads out of `root`; StorageFullError where
    there is no room for it.
    """
    local = _local_path(url)
    if local is None:
        Store(url).download("", to)
        return to.stat().st_size
    try:
        real = local.resolve(strict=True)
        mode = real.stat().st_mode
        if root is not None and not real.is_relative_to(root):
            raise StorageError("a link that leads out of the bucket; not followed")
        if not stat.S_ISREG(mode):
            raise StorageError("no plain file")
        try:
            to.hardlink_to(real)
        except OSError:  # another filesystem, or somebody else's file
            shutil.copyfile(real, to)
    except FileNotFoundError:
        raise
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFullError(
                f"{to.parent}: no space left for temporary files; free some, or set TMPDIR, and run again"
            ) from e
        raise StorageError(str(e)) from e
    return to.stat().st_size


def _local_path(url: str) -> Path | None:
    if url.startswith("file://"):
        return Path(os.fsdecode(unquote_to_bytes(url.removeprefix("file://"))))
    return Path(url) if url.startswith("/") else None
