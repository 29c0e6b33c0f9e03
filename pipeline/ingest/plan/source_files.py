"""The files of a plan's sources: `plan/sources-HEX.parquet`, HEX the first 16 hex of its sha256.

Format 1 numbers them instead: `plan/sources.parquet`, `plan/sources-0001.parquet`.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pyarrow.parquet as pq

from reelmae.pipeline.errors import DatasetError
from reelmae.pipeline.schema import PLAN_SOURCES
from reelmae.pipeline.storage.checked import download_agreed, read_checked
from reelmae.pipeline.storage.store import Store

_BY_DIGEST = re.compile(r"plan/sources-([0-9a-f]{16})\.parquet")


def name_file(local: Path, number: int, format: int) -> str:
    """What a local file with the sources of the plan's part `number` is called at the dataset."""
    if format > 1:
        return f"plan/sources-{_digest(local)}.parquet"
    return PLAN_SOURCES if not number else PLAN_SOURCES.replace(".", f"-{number:04d}.")


def is_named_by_digest(file: str) -> bool:
    """Whether this path is one of such a file, not of format 1."""
    return _BY_DIGEST.fullmatch(file) is not None


def download_sources(store: Store, file: str, to: Path) -> None:
    """Copy a file of sources to a local path; DatasetError where it is not the one that its name says."""
    named = _BY_DIGEST.fullmatch(file)
    if named is None:  # format 1
        download_agreed(store, file, to)
        return
    wanted = named.group(1)

    def download() -> Path:
        store.download(file, to)
        return to

    def check(path: Path) -> None:
        if _digest(path) != wanted:
            raise DatasetError(
                f"{store.url(file)}: its bytes are not those of its name (sha256); put it back from a copy, "
                "or shard the bucket anew to another DST"
            )

    read_checked(store, download, check, (DatasetError,))


def read_places(file: pq.ParquetFile, groups: list[int]) -> list[tuple[str, str | None]]:
    """Of the sources in these row groups: url, and the file that must be there for it: a member's is its tar.

    None where it was planned as one that cannot be read.
    """
    table = file.read_row_groups(groups, [n for n in ("url", "tar", "fault") if n in file.schema_arrow.names])
    urls = table.column("url").to_pylist()
    if "tar" not in table.column_names:
        return [(url, url) for url in urls]
    tars, faults = table.column("tar").to_pylist(), table.column("fault").to_pylist()
    return [(url, (tar or url) if fault is None else None) for url, tar, fault in zip(urls, tars, faults, strict=True)]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
