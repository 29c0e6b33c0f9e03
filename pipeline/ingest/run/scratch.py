"""A worker's folder for temporary files. If the worker was killed, the next job removes the folder.

A live worker holds a lock on its folder's lock file. The system drops the lock with the process, so a folder whose
lock can be taken is in use by no one. Folders younger than YOUNG_S are left alone: their worker may not hold the lock
yet.
"""

from __future__ import annotations

import fcntl
import shutil
import tempfile
import time
from pathlib import Path

PREFIX = "reelmae-work-"
YOUNG_S = 60.0


class Scratch:
    """One worker's folder; removed by `close`."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX)).resolve()
        self._lock = (self.path / "lock").open("wb")
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def close(self) -> None:
        """Remove the folder with its files."""
        shutil.rmtree(self.path)
        self._lock.close()


def sweep() -> int:
    """Remove the folders of this user's killed workers; the number of removed folders."""
    removed = 0
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            if time.time() - folder.stat().st_mtime < YOUNG_S:
                continue
            with (folder / "lock").open("r+b") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
                removed += 1
        except OSError:  # in use, of another user, or removed by another job just now
            continue
    return removed
