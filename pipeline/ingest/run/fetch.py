"""Copies one source to local disk, or says why it is none.

- A link that leads out of the bucket is not followed.
- A source is gone only if what it was in is still there: an unmounted disk is not a thousand gone files.
"""

from __future__ import annotations

import errno
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

from reelmae.pipeline.errors import ReelmaeError, StorageError, StorageFullError
from reelmae.pipeline.ingest.plan.sources import is_folder, local_path
from reelmae.pipeline.ingest.plan.web import refused_status
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.retry import Outage, retry
from reelmae.pipeline.storage.store import Store

_NO_SOURCE = {errno.ELOOP: "a link in a ring", errno.ENAMETOOLONG: "its name is too long"}


class NoSourceError(ReelmaeError):
    """This is no source and will never be one: no plain file, a link that leads nowhere good, a refused web address."""


@dataclass(frozen=True)
class Fetched:
    """A source's copy on local disk."""

    bytes: int
    is_checked: bool
    """Whether its bytes are surely those of the store: it is local, or was held against a checksum."""


def fetch(url: str, to: Path, *, root: Path | None, access: Access | None = None) -> Fetched:
    """Copy a source to `to` on local disk. A local file is hard-linked where that is possible.

    FileNotFoundError where it is gone; NoSourceError where it is no plain file, or a link that leads out of `root` or
    in a ring, or a web address that is refused for good; StorageError where it cannot be read; StorageFullError where
    there is no room for the copy.
    """
    access = access or Access()
    local = local_path(url)
    if local is not None:
        retry(lambda number: _link_or_copy(local, to, root), url=url, access=access, outage=Outage())
        return Fetched(to.stat().st_size, is_checked=True)
    try:
        content = Store(url, access).download("", to)
    except StorageError as e:
        if status := refused_status(url, e):
            raise NoSourceError(f"the server answers {status}") from e
        raise
    return Fetched(to.stat().st_size, content.can_check)


def real_path(local: Path, root: Path | None) -> Path:
    """A local file's own path; FileNotFoundError where it is gone, NoSourceError where it is no source."""
    try:
        real = local.resolve(strict=True)
    except NotADirectoryError:  # a folder above it is a file now
        raise FileNotFoundError(str(local)) from None
    except (RuntimeError, OSError) as e:  # pathlib makes a RuntimeError of ELOOP
        number = errno.ELOOP if isinstance(e, RuntimeError) else e.errno
        if number in _NO_SOURCE:
            raise NoSourceError(_NO_SOURCE[number]) from None  # its cause would be taken for the storage's
        raise
    if root is not None and not real.is_relative_to(root):
        raise NoSourceError("a link that leads out of the bucket; not followed")
    if not stat.S_ISREG(real.stat().st_mode):
        raise NoSourceError("no plain file")
    return real


def _link_or_copy(local: Path, to: Path, root: Path | None) -> None:
    real = real_path(local, root)
    to.unlink(missing_ok=True)
    try:
        to.hardlink_to(real)
    except OSError:  # another filesystem, or somebody else's file
        try:
            shutil.copyfile(real, to)
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageFullError(
                    f"{to.parent}: no space left for temporary files; free some, or set TMPDIR, and run again"
                ) from e
            raise


def refuse_lost_root(url: str, src: str, access: Access | None = None) -> None:
    """StorageError where a source is missing and so is all around it: the storage is away, not the source.

    For a folder or bucket `src`, it must be there and hold something. For a manifest or a list of tars, the nearest
    folder above the source that is there must hold something, if that is a local one.
    """
    local = local_path(url)
    if is_folder(src):
        store = Store(src, access)
        if store.is_local:
            _refuse_empty(Path(store.root), url)
        elif next(iter(store.list()), None) is None:
            raise StorageError(f"{url}: is missing, and {src} holds nothing any more; put it back and run again")
    elif local is not None:
        _refuse_empty(next(folder for folder in local.parents if folder.is_dir()), url)


def _refuse_empty(folder: Path, url: str) -> None:
    try:
        empty = next(folder.iterdir(), None) is None
    except OSError as e:
        raise StorageError(f"{url}: is missing, and {folder} cannot be read ({e.strerror}); mount it, run again") from e
    if empty:
        raise StorageError(
            f"{url}: is missing, and {folder} is empty: is a disk not mounted? Mount it and run again; where that "
            "folder is empty for good, remove it"
        )
