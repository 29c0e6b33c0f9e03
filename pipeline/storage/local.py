"""Files of this machine: temporary name, fsync, rename."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reelmae.pipeline.errors import StorageError
from reelmae.pipeline.storage.checks import Content
from reelmae.pipeline.storage.files import Attempt, Found


@contextmanager
def whole_file(final: Path, *, writer: str = "", create: bool = False) -> Iterator[Path]:
    """A temporary path beside `final` to write to, so that a file under its final name is always complete.

    When the block ends, the file takes the final name; when the block raises, it is removed. A missing folder is
    made. The next writer overwrites what a killed writer left. Where several may write the same file at once, each
    needs its own `writer` name. With `create`, FileExistsError where the final name is taken then.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}{writer}.part")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        if create:
            _give_free_name(temporary, final)
        else:
            temporary.replace(final)
    except OSError as e:
        e.filename = e.filename or str(final)  # the error of a failing write has no file name
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _give_free_name(temporary: Path, final: Path) -> None:
    """Give a file a second name; FileExistsError where that is taken."""
    try:
        os.link(temporary, final)
    except OSError as e:
        if e.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            raise
        if final.exists():  # a file system without links: looked before, which is not exclusive
            raise FileExistsError(errno.EEXIST, "exists", str(final)) from e
        temporary.replace(final)


class LocalFiles:
    """Files (see files.Files) of this machine."""

    reads_ranges = True

    def list(self, full: str, attempt: Attempt[Any]) -> Iterator[Found]:
        """Every file below a folder; links to folders are listed and not followed."""

        def raise_unreadable(error: OSError) -> None:
            raise StorageError(f"{error.filename}: {error.strerror}; check the rights") from error

        for folder, folders, names in os.walk(full, onerror=raise_unreadable if Path(full).exists() else None):
            folders.sort()
            # links to folders are listed but not followed, so that they end among the rejects
            for name in sorted([*names, *(f for f in folders if Path(folder, f).is_symlink())]):
                path = f"{folder.rstrip('/')}/{name}"
                try:
                    found = os.stat(path)  # noqa: PTH116 - a Path for each of a million files takes most of the time
                except OSError:  # a dangling or circular link: listed, so that it ends among the rejects
                    yield Found(path, 0, "")
                    continue
                yield Found(path, found.st_size, str(found.st_mtime_ns))

    def exists(self, full: str, number: int) -> bool:
        """Whether there is such a file or folder."""
        return Path(full).exists()

    def look(self, full: str, number: int) -> Content:
        """Size and modification time."""
        found = Path(full).stat()
        return Content(found.st_size, str(found.st_mtime_ns))

    def read(self, full: str, offset: int, size: int, number: int) -> bytes:
        """A part of a file. What is no plain file, such as a named pipe, is refused: reading it might never end."""
        handle = os.open(full, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            mode = os.fstat(handle).st_mode
            if stat.S_ISDIR(mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), full)
            if not stat.S_ISREG(mode):
                raise OSError(errno.EINVAL, "is not a plain file", full)
            return os.pread(handle, size, offset)
        finally:
            os.close(handle)

    def read_start(self, full: str, size: int, number: int) -> tuple[bytes, Content]:
        """The first bytes, and size and time."""
        return self.read(full, 0, size, number), self.look(full, number)

    def copy_out(self, full: str, to: Path, number: int) -> None:
        """Copy a file."""
        shutil.copyfile(full, to)

    def write(self, local: Path, full: str, attempt: Attempt[Any], *, create: bool) -> bool:
        """Copy a file to its final name; with `create`, False where the name is taken."""

        def copy(number: int) -> bool:
            writer = f".{os.getpid()}.{time.monotonic_ns()}"
            try:
                with whole_file(Path(full), writer=writer, create=create) as temporary:
                    shutil.copyfile(local, temporary)
            except FileExistsError:
                if create:
                    return False
                raise
            return True

        return bool(attempt(copy))

    def creates_exclusively(self, full: str, attempt: Attempt[Any]) -> bool:
        """A name is given by linking, which fails where it is taken."""
        return True

    def remove(self, full: str, number: int) -> None:
        """Remove one file."""
        Path(full).unlink(missing_ok=True)

    def sweep(self, full: str, attempt: Attempt[Any]) -> int:
        """Remove the temporary files of killed writers."""
        left = list(Path(full).glob(".*.part"))
        for path in left:
            path.unlink(missing_ok=True)
        return len(left)

    def describe(self) -> dict[str, Any]:
        """Facts for people."""
        return {"kind": "local folder"}
