"""What a kind of storage must do for `Store`: one try of each operation. Retries, patience and checks are Store's.

A method's `number` is that of the try, from 0; it gives the request's deadline (retry.deadline). Methods raise whatever
their client raises; causes.py tells what it means. Paths are full ones, as `Store.full_path` gives them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from reelmae.pipeline.storage.checks import Content

T = TypeVar("T")
Attempt = Callable[[Callable[[int], T]], T]
"""Runs a call, given the number of the try, until it works or patience ends."""


@dataclass(frozen=True)
class Entry:
    """One listed file. `path` is relative to the store's root, with forward slashes."""

    path: str
    url: str
    size: int
    etag: str


@dataclass(frozen=True)
class Found:
    """One file of a listing, by its full path."""

    full: str
    size: int
    etag: str


class Files(Protocol):
    """The files of one file system."""

    reads_ranges: bool
    """Whether a part of a file costs only that part."""

    def list(self, full: str, attempt: Attempt[Any]) -> Iterator[Found]:
        """Every file below a folder, sorted within each folder; nothing where there is none. Pages are tried apart."""

    def exists(self, full: str, number: int) -> bool:
        """Whether there is such a file or folder."""

    def look(self, full: str, number: int) -> Content:
        """What is said of a file now, never from a cache; FileNotFoundError where there is none."""

    def read(self, full: str, offset: int, size: int, number: int) -> bytes | memoryview:
        """A part of a file, shorter where the file ends before."""

    def read_start(self, full: str, size: int, number: int) -> tuple[bytes, Content]:
        """The first bytes of a file, all where it is not longer, and what is said of it."""

    def copy_out(self, full: str, to: Path, number: int) -> None:
        """The whole file to a local path, for those that cannot read parts."""

    def write(self, local: Path, full: str, attempt: Attempt[Any], *, create: bool) -> bool:
        """Publish a local file, whole or not at all, and hold it against what is there then.

        With `create`, False where the name is taken and the system can tell.
        """

    def creates_exclusively(self, full: str, attempt: Attempt[Any]) -> bool:
        """Whether `write` with `create` surely refuses a name below this folder that is taken."""

    def remove(self, full: str, number: int) -> None:
        """Remove one file; no error where there is none."""

    def sweep(self, full: str, attempt: Attempt[Any]) -> int:
        """Remove what killed writers left in a folder, or at this path; how many there were."""

    def describe(self) -> dict[str, Any]:
        """Facts for people: kind, endpoint."""
