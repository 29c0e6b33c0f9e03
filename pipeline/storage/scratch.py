"""Folders for temporary files. What a killed process left is removed by the next job.

A process holds a lock on a file in each of its folders. The system drops the lock with the process, so a folder whose
lock can be taken is in use by no one. A folder without such a file is not one of these, and is left alone.
"""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = "reelmae-"
LOCK = ".reelmae-lock"


class Scratch:
    """One folder, at `path`, below TMPDIR or another folder; removed by `close`."""

    def __init__(self, kind: str = "", folder: str | None = None) -> None:
        made = Path(tempfile.mkdtemp(prefix=f".{PREFIX}{kind}", dir=folder)).resolve()
        self._lock = (made / LOCK).open("wb")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = made.with_name(made.name.removeprefix("."))  # under its name it is locked from the first moment on
        made.rename(self.path)

    def close(self) -> None:
        """Remove the folder with its files."""
        try:
            remove_folder(self.path)
        finally:
            self._lock.close()


@contextmanager
def scratch_folder(kind: str = "") -> Iterator[Path]:
    """A folder for the time of the block."""
    scratch = Scratch(kind)
    try:
        yield scratch.path
    finally:
        scratch.close()


def remove_folder(folder: Path) -> None:
    """Remove a scratch folder, its lock last: what is left where that fails can still be told, and swept."""
    for path in folder.iterdir():
        if path.name == LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    shutil.rmtree(folder)


def sweep() -> int:
    """Remove the folders of this user's killed processes; the number of removed folders."""
    removed = 0
    places = {Path(tempfile.gettempdir()), Path("/tmp")}  # where TMPDIR's path is long, sockets lie in /tmp
    for folder in (folder for place in places for folder in place.glob(f"{PREFIX}*")):
        try:
            with (folder / LOCK).open("r+b") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_folder(folder)
                removed += 1
        except OSError:  # none of these, in use, of another user, or removed by another job just now
            continue
    return removed
