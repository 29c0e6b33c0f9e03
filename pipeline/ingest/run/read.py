"""Reads the sources of one task, each wherever it lies: its copy on local disk, or why it is no source.

Only what is gone, or can never be a source, is rejected as FETCH_FAILED. What is not the source's fault, such as a
failing storage, raises.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reelmae.pipeline.errors import StorageError
from reelmae.pipeline.ingest.clips.outcome import Rejected
from reelmae.pipeline.ingest.clips.source import Source
from reelmae.pipeline.ingest.plan.sources import access_of, is_folder
from reelmae.pipeline.ingest.run.fetch import Fetched, NoSourceError, fetch, refuse_lost_root
from reelmae.pipeline.ingest.run.members import MemberReader
from reelmae.pipeline.ingest.tars.webdataset_child import TarChild
from reelmae.pipeline.schema import Reason
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.store import Store

LOOKS = 2  # at a source that is missing


class SourceReader:
    """Reads sources that were planned together: rows of schema.SOURCES, maybe with TAR_COLUMNS."""

    def __init__(
        self,
        src: str,
        sources: Sequence[dict[str, Any]],
        child: TarChild,
        folder: Path,
        access: Access,
        *,
        limit: int,
        repairs: bool,
    ) -> None:
        """`src`: where they come from, reached by `access`. `sources`: those that will be read, in their order. `folder`:
        for pieces of tars, not there yet. `limit`: of bytes. `repairs`: they gave clips before, and must again."""
        self._src = src
        self._access = access
        self._limit = limit
        self._repairs = repairs
        store = Store(src)
        # real path of a local bucket, out of which no link may lead
        self._root = Path(store.root).resolve() if store.is_local and is_folder(src) else None
        access_to = functools.partial(access_of, src=src, access=access)
        self._members = MemberReader(sources, child, folder, access_to, self._root)

    def read(self, source: dict[str, Any], folder: Path, *, again: bool = False) -> tuple[Source, bool] | Rejected:
        """The source's copy in `folder`, and whether its bytes are surely those of the store; or why it is no source.

        again: it was read before, and looked damaged. StorageError where it cannot be read for another reason, or
        where a repair cannot do without it.
        """
        url, over = source["url"], f"over max_source_bytes={self._limit}"
        if source.get("fault") is not None:
            return Rejected(Reason.FETCH_FAILED, source["fault"])
        if source["size"] > self._limit:
            return Rejected(Reason.TOO_LARGE, f"{source['size']} bytes, {over}")
        path = folder / "in.bin"
        try:
            fetched = self._fetch(source, path, again=again)
        except NoSourceError as e:
            if self._repairs:
                raise StorageError(f"{url}: {e}; its shard cannot be made again without it") from e
            return Rejected(Reason.FETCH_FAILED, str(e))
        if fetched.bytes > self._limit:
            return Rejected(Reason.TOO_LARGE, f"{fetched.bytes} bytes, {over}")
        return Source(url, source["label"], source["rows"] or (), path, fetched.bytes), fetched.is_checked

    def _fetch(self, source: dict[str, Any], to: Path, *, again: bool) -> Fetched:
        """NoSourceError also where it is gone, while all around it is there."""
        url, tar = source["url"], source.get("tar")
        for _ in range(LOOKS):
            try:
                if tar is not None:
                    return self._members.fetch(source, to, again=again)
                return fetch(url, to, root=self._root, access=access_of(url, self._src, self._access))
            except FileNotFoundError:
                refuse_lost_root(tar or url, self._src, self._access)
        raise NoSourceError("gone: no such file" if tar is None else "gone: its tar is no more there")
