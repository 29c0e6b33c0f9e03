"""Members of tars, for the sources of one task in their order.

The stretch of a tar that the task needs is read in pieces of at most PIECE bytes, each byte once: webdataset takes the
members out of a piece (tars/webdataset_child.py). On disk is one piece at most, with what was taken out of it. What
webdataset does not give, and what is asked for again, is copied by its range of the tar, if its header is still where
the plan has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from reelmae.pipeline.errors import ShortFileError, StorageError, StorageFullError
from reelmae.pipeline.ingest.plan.samples import is_side
from reelmae.pipeline.ingest.plan.sources import local_path
from reelmae.pipeline.ingest.plan.tar_names import member_of
from reelmae.pipeline.ingest.plan.web import refused_status
from reelmae.pipeline.ingest.run.fetch import Fetched, NoSourceError, real_path
from reelmae.pipeline.ingest.tars.scan import BrokenHeaderError, read_header, show_name
from reelmae.pipeline.ingest.tars.webdataset_child import TarChild
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.checked import read_checked
from reelmae.pipeline.storage.retry import Outage, retry
from reelmae.pipeline.storage.store import MAX_GAP, Store

PIECE = 64 << 20  # bytes of a tar that are on disk at a time; a longer member is copied by its range
_START_S, _SLOWEST = 60.0, 1e6  # the child may take so long for a piece: seconds, and bytes a second
MISSES = 3  # times that it may give nothing of a piece
CHANGED = "the tar has changed since it was planned"


class MemberReader:
    """Reads the members of tars among a task's sources (schema.SOURCES and TAR_COLUMNS), best in their order."""

    def __init__(
        self,
        sources: Sequence[dict[str, Any]],
        child: TarChild,
        folder: Path,
        access_to: Callable[[str], Access],
        root: Path | None,
    ) -> None:
        """`folder`: for the piece, not there yet. `access_to`: url of a tar → how it is reached. `root`: of a local
        bucket, out of which no link may lead."""
        self._sources = sources
        self._child = child
        self._folder = folder
        self._access_to = access_to
        self._root = root
        self._at = {source["url"]: i for i, source in enumerate(sources)}
        self._piece: set[str] = set()  # urls of its members
        self._files: dict[str, Path] = {}  # those that are there and were not fetched yet: url → file

    def fetch(self, source: dict[str, Any], to: Path, *, again: bool = False) -> Fetched:
        """Copy a member to a local path. `again`: it was read before, and looked damaged.

        FileNotFoundError where its tar is gone; NoSourceError where the tar is no plain file, leads out of the root or
        has changed since it was planned; StorageError, StorageFullError as `fetch.fetch`.
        """
        store, local = self._open(source["tar"])
        try:
            if not again and _is_plain(source) and source["url"] not in self._piece:
                self._read_piece(self._at[source["url"]], store, local)
            file = None if again else self._files.pop(source["url"], None)
            if file is not None:
                file.replace(to)
            else:
                _copy_member(source, store, to)
        except StorageError as e:
            if status := refused_status(source["tar"], e):
                raise NoSourceError(f"the server of its tar answers {status}") from e
            raise
        return Fetched(source["size"], is_checked=store.is_local)

    def _open(self, tar: str) -> tuple[Store, Path | None]:
        """The tar, and its path where it is local."""
        access, local = self._access_to(tar), local_path(tar)
        if local is None:
            return Store(tar, access), None
        real = retry(lambda _: real_path(local, self._root), url=tar, access=access, outage=Outage())
        return Store(str(real), access), real

    def _read_piece(self, first: int, store: Store, local: Path | None) -> None:
        """Read the piece that begins with this source, instead of the last one."""
        for file in self._files.values():  # nobody wanted these
            file.unlink()
        self._files = {}
        members = self._piece_from(first)
        self._piece = {m["url"] for m in members}
        self._folder.mkdir(exist_ok=True)
        start, end = members[0]["offset"], members[-1]["end"]
        if local is not None:
            self._take_out(members, local, 0, end)
            return
        stretch = self._folder / "stretch.tar"
        try:
            store.copy_range("", start, end - start, stretch)
            self._take_out(members, stretch, start, end)
        except ShortFileError:  # the tar has changed: each of its members will say so
            return
        finally:
            stretch.unlink(missing_ok=True)

    def _piece_from(self, first: int) -> list[dict[str, Any]]:
        """The sources, from this plain one on, that lie close together in the tar and can be taken out by name."""
        members = [self._sources[first]]
        for source in self._sources[first + 1 :]:
            begin, last = members[0]["offset"], members[-1]
            if source["tar"] != last["tar"]:
                break
            if source["fault"] is not None:
                continue
            if not last["end"] <= source["offset"] <= last["end"] + MAX_GAP or source["end"] - begin > PIECE:
                break
            if _is_plain(source):
                members.append(source)
        return members

    def _take_out(self, members: list[dict[str, Any]], tar: Path, begin: int, end: int) -> None:
        """Write members to files of their own. `tar` holds the tar from byte `begin` on.

        webdataset stops at a broken header and at an end mark, and is asked again from the next member on.
        """
        waiting, misses = {member_of(m["url"], m["tar"]): m for m in members}, 0
        while waiting and misses < MISSES:
            start = next(iter(waiting.values()))["offset"]
            wanted = {(name, 0): self._folder / str(m["offset"]) for (name, _), m in waiting.items()}
            wall_s = _START_S + (end - start) / _SLOWEST
            try:
                done = self._child.read(tar, start - begin, end - begin, wanted, wall_s=wall_s)
            except StorageFullError:
                raise
            except StorageError:  # reading the range tells what is wrong, and waits for it
                done = []
                misses = MISSES
            for name, _ in done:
                member, file = waiting.pop((name, 1)), wanted[name, 0]
                if file.stat().st_size == member["size"]:
                    self._files[member["url"]] = file
                else:
                    file.unlink()
            if not done:
                for file in wanted.values():  # begun by a child that died, or ran past its time
                    file.unlink(missing_ok=True)
                del waiting[next(iter(waiting))]
                misses += 1


def _is_plain(source: dict[str, Any]) -> bool:
    """Whether a member can be taken out of a piece: not too long, and the first of its name in the tar."""
    name, number = member_of(source["url"], source["tar"])
    return source["size"] <= PIECE and number == 1 and not is_side(name)


def _copy_member(source: dict[str, Any], store: Store, to: Path) -> None:
    """Copy a member by its range."""
    data = source["end"] - source["size"]

    def check(header: bytes) -> None:
        name, size = read_header(header)
        if (show_name(name), size) != (member_of(source["url"], source["tar"])[0], source["size"]):
            raise BrokenHeaderError("another member")

    try:
        read_checked(
            store, lambda: store.read_range("", source["offset"], data - source["offset"]), check, (BrokenHeaderError,)
        )
        store.copy_range("", data, source["size"], to)
    except BrokenHeaderError:
        raise NoSourceError(CHANGED) from None
    except ShortFileError:
        if store.look("").size >= source["end"]:
            raise
        raise NoSourceError(CHANGED) from None
