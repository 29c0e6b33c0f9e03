"""Files of any fsspec file system (gs, az, hf, http, memory, …), with a deadline for each request.

The file is always complete on local disk before it is written, because an exception inside `fs.open(…, "wb")` of some
file systems commits the part that was written.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from reelmae.pipeline.storage.causes import CausedError, WrongBytesError, find_cause
from reelmae.pipeline.storage.checks import Content, content_of_info
from reelmae.pipeline.storage.files import Attempt, Found
from reelmae.pipeline.storage.retry import deadline

UNKNOWN_S = 3600.0  # for a whole file of unknown size
WEB_SLOWER = 15  # than retry.SLOWEST: web servers that give a whole file at once may hold it back
WEB_STALL_S = 30.0  # for a web server's next bytes


class FsspecFiles:
    """Files (see files.Files) of one fsspec file system."""

    def __init__(self, fs: Any) -> None:
        self._fs = fs
        self.reads_ranges = "http" not in getattr(fs, "protocol", ())  # some web servers answer a range with all

    def _call(self, name: str, *args: Any, seconds: float, **keywords: Any) -> Any:
        """A method of the file system, given up after so many seconds."""
        fs = self._fs
        if fs.async_impl and hasattr(fs, f"_{name}"):
            call = asyncio.wait_for(getattr(fs, f"_{name}")(*args, **keywords), seconds)
            return asyncio.run_coroutine_threadsafe(call, fs.loop).result()
        return _run_apart(lambda: getattr(fs, name)(*args, **keywords), seconds)

    def list(self, full: str, attempt: Attempt[Any]) -> Iterator[Found]:
        """Folder by folder. A listed name that is not below its folder is left out."""
        waiting = [full]
        while waiting:
            folder = waiting.pop()

            def ls(number: int, folder: str = folder) -> Any:
                self._fs.invalidate_cache()
                return self._call("ls", folder, detail=True, seconds=deadline(number))

            try:
                found = attempt(ls)
            except (FileNotFoundError, NotADirectoryError):
                continue
            self._fs.invalidate_cache()  # else a filesystem that caches listings keeps them all
            below = sorted(
                ((info["name"].rstrip("/"), info) for info in found if info["name"].startswith(f"{folder}/")),
                key=lambda named: named[0],
            )
            folders = [name for name, info in below if info.get("type") == "directory" and name != folder]
            waiting += reversed(folders)
            for name, info in below:
                if info.get("type") == "directory":
                    continue
                etag = info.get("ETag") or info.get("etag") or info.get("LastModified") or info.get("mtime") or ""
                yield Found(name, int(info.get("size") or 0), str(etag).strip('"'))

    def exists(self, full: str, number: int) -> bool:
        """Whether there is such a file or folder."""
        try:
            self._info(full, number)
        except FileNotFoundError:
            return False
        return True

    def look(self, full: str, number: int) -> Content:
        """Size, and the MD5 where the file system gives one. A size that it does not know is -1."""
        info = self._info(full, number)
        content = content_of_info(info)
        return content if info.get("size") is not None else Content(-1, content.etag)

    def _info(self, full: str, number: int) -> dict[str, Any]:
        self._fs.invalidate_cache()
        try:
            return dict(self._call("info", full, seconds=deadline(number)))
        except FileNotFoundError as e:
            cause = find_cause(e)
            if cause is None or cause.kind == "gone":
                raise
            raise CausedError(cause) from e  # http raises it for any failure

    def read(self, full: str, offset: int, size: int, number: int) -> bytes:
        """A part of a file."""
        try:
            data = self._call("cat_file", full, start=offset, end=offset + size, seconds=deadline(number, size))
            return bytes(data)
        except FileNotFoundError:
            raise
        except OSError:  # a range that begins at or beyond the end is refused by some
            there = self.look(full, number).size
            if there < 0 or there > offset:
                raise
            return b""

    def read_start(self, full: str, size: int, number: int) -> tuple[bytes, Content]:
        """The first bytes, and size and MD5."""
        content = self.look(full, number)
        return (self.read(full, 0, min(size, content.size), number) if content.size > 0 else b""), content

    def copy_out(self, full: str, to: Path, number: int) -> None:
        """The whole file."""
        size = self.look(full, number).size
        seconds = deadline(number, size * WEB_SLOWER) if size >= 0 else UNKNOWN_S
        self._call("get_file", full, str(to), seconds=seconds)

    def write(self, local: Path, full: str, attempt: Attempt[Any], *, create: bool) -> bool:
        """One put, which is atomic on object stores; with `create`, False where the name is taken already."""
        size = local.stat().st_size

        def put(number: int) -> bool:
            if create and self.exists(full, number):
                return False
            self._call("put_file", str(local), full, seconds=deadline(number, size))
            there = self.look(full, number).size
            if there not in (-1, size):
                raise WrongBytesError(f"{size} bytes were written, {there} are there")
            return True

        return bool(attempt(put))

    def creates_exclusively(self, full: str, attempt: Attempt[Any]) -> bool:
        """fsspec has no common way to ask for it."""
        return False

    def remove(self, full: str, number: int) -> None:
        """Remove one file."""
        try:
            self._call("rm_file", full, seconds=deadline(number))
        except FileNotFoundError:
            return

    def sweep(self, full: str, attempt: Attempt[Any]) -> int:
        """Nothing is left behind that could be seen."""
        return 0

    def describe(self) -> dict[str, Any]:
        """Facts for people."""
        protocol = self._fs.protocol
        return {"kind": protocol if isinstance(protocol, str) else protocol[0]}


def web_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options of the file system of web servers: aiohttp gives up a file after 5 minutes in all, however it comes."""
    from fsspec.implementations import http  # takes a while, and few need it

    timeout = http.aiohttp.ClientTimeout(total=None, sock_connect=WEB_STALL_S, sock_read=WEB_STALL_S)
    return options | {"client_kwargs": {"timeout": timeout} | dict(options.get("client_kwargs") or {})}


def _run_apart(call: Callable[[], Any], seconds: float) -> Any:
    """Run a call in a thread of its own and give it up after so many seconds: it cannot be stopped from outside."""
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as e:  # noqa: BLE001  raised again in the caller's thread
            result.set_exception(e)

    threading.Thread(target=run, name="reelmae-storage", daemon=True).start()
    return result.result(seconds)
