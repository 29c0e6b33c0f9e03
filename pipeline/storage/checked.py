"""What looks damaged on a remote store is read again before anybody judges: the network may have changed it.

Two reads that give the same bytes are what the store holds, whatever is wrong with them. Files of a local store are
read once. Each read that was wrong is counted in the store's `access.retries`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from reelmae.pipeline.errors import ShortFileError, StorageError
from reelmae.pipeline.storage.scratch import scratch_folder
from reelmae.pipeline.storage.store import Store

READS = 10
"""Reads at most. Where even one read in five is wrong, one file in 200,000 is not right twice in ten reads."""
CAUSE = "checksum"
UNSTEADY = f"gave other bytes at each of {READS} reads; is it being written, or is the network damaged?"

Read = TypeVar("Read", bytes, Path)
Result = TypeVar("Result")


def read_checked(
    store: Store,
    read: Callable[[], Read],
    check: Callable[[Read], Result],
    wrong: tuple[type[Exception], ...],
) -> Result:
    """What `check` makes of what `read` reads: bytes, or the path of a file.

    Where `check` raises one of `wrong`, or `read` a ShortFileError, a remote file is read again. The error is raised
    if another read gives the same bytes; StorageError where READS reads were wrong, each in another way.
    """
    seen: set[str] = set()
    while True:
        try:
            content = read()
        except ShortFileError as e:
            error: Exception = e
            mark = str(e)
        else:
            try:
                return check(content)
            except wrong as e:
                error, mark = e, _digest(content)
        if store.is_local or mark in seen:
            raise error
        seen.add(mark)
        if len(seen) == READS:
            raise StorageError(f"{store.url()}: {error} ({UNSTEADY})") from error
        store.access.retries.add(CAUSE)


def read_agreed(store: Store, path: str) -> bytes:
    """The bytes of a file that we have nothing to hold against; as `download_agreed` copies it."""
    if store.is_local:
        return store.read_bytes(path)
    with scratch_folder() as folder:
        local = Path(folder, "data")
        download_agreed(store, path, local)
        return local.read_bytes()


def download_agreed(store: Store, path: str, to: Path) -> None:
    """Copy a file that we have nothing to hold against to a local path.

    Where the store is remote and has no checksum of it, the bytes are those that two downloads agree on; StorageError
    where no two of READS do.
    """
    seen: set[str] = set()
    while len(seen) < READS:
        content = store.download(path, to)
        if store.is_local or content.can_check or (mark := _digest(to)) in seen:
            return
        if seen:
            store.access.retries.add(CAUSE)
        seen.add(mark)
    raise StorageError(f"{store.url(path)}: {UNSTEADY}")


def _digest(content: bytes | Path) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
