"""Lists the keys below a prefix: page by page in flat memory, and several folders at a time where there are folders.

Keys come sorted, as the server sorts them. A listing of one page costs one request. For a longer one the server is
asked for the folders of the prefix. Up to LISTERS of them are read at a time, each at most PAGES pages ahead of the
consumer. Where there are no folders, or more than fit into one answer, the pages are read one after the other.
"""

from __future__ import annotations

import heapq
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from reelmae.pipeline.storage.access import interruptible

LISTERS = 8
PAGES = 2
KEYS = 1000  # in one answer, the most that a server gives
POLL_S = 0.2
Page = Callable[[dict[str, Any]], dict[str, Any]]
_Item = list[dict[str, Any]] | BaseException | None  # a page, an error, or the end


def list_keys(page: Page, prefix: str) -> Iterator[dict[str, Any]]:
    """The entries below `prefix`, as `list_objects_v2` gives them; `page` makes one such request."""
    first = _ask(page, prefix)
    if not first.get("IsTruncated"):
        yield from first.get("Contents", ())
        return
    top = _ask(page, prefix, Delimiter="/")
    folders = [found["Prefix"] for found in top.get("CommonPrefixes", ())]
    files = top.get("Contents", [])
    if top.get("IsTruncated") or not folders:
        yield from first.get("Contents", ())
        yield from _rest(page, prefix, first)
    elif len(folders) == 1 and not files:
        yield from list_keys(page, folders[0])
    else:
        yield from _fan_out(page, files, folders)


def _ask(page: Page, prefix: str, **more: Any) -> dict[str, Any]:
    return page({"Prefix": prefix, "MaxKeys": KEYS, **more})


def _rest(page: Page, prefix: str, last: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What comes after a page."""
    for entries in _pages_after(page, prefix, last):
        yield from entries


def _pages_after(page: Page, prefix: str, last: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    while last.get("IsTruncated"):
        last = _ask(page, prefix, ContinuationToken=last["NextContinuationToken"])
        yield list(last.get("Contents", ()))


def _next_of(pages: queue.Queue[_Item], pool: ThreadPoolExecutor) -> _Item:
    with interruptible(pool):
        return pages.get()


def _fan_out(page: Page, files: list[dict[str, Any]], folders: list[str]) -> Iterator[dict[str, Any]]:
    """Files and the contents of folders, in the order of their keys."""
    stopped = threading.Event()
    queues: dict[str, queue.Queue[_Item]] = {folder: queue.Queue(PAGES) for folder in folders}

    def put(folder: str, item: _Item) -> None:
        while not stopped.is_set():
            try:
                queues[folder].put(item, timeout=POLL_S)
                return
            except queue.Full:
                continue

    def read(folder: str) -> None:
        try:
            if stopped.is_set():
                return
            first = _ask(page, folder)
            put(folder, list(first.get("Contents", ())))
            for entries in _pages_after(page, folder, first):
                put(folder, entries)
                if stopped.is_set():
                    return
            put(folder, None)
        except BaseException as e:  # noqa: BLE001  raised again in the consumer's thread
            put(folder, e)

    # the pool takes folders in this order, so the folder that the consumer waits for is always being read
    with ThreadPoolExecutor(LISTERS, thread_name_prefix="reelmae-list") as pool:
        try:
            for folder in folders:
                pool.submit(read, folder)
            named = ((file["Key"], file) for file in files)
            for name, file in heapq.merge(named, ((f, None) for f in folders), key=lambda pair: pair[0]):
                if file is not None:
                    yield file
                    continue
                while (item := _next_of(queues[name], pool)) is not None:
                    if isinstance(item, BaseException):
                        raise item
                    yield from item
                del queues[name]
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)
