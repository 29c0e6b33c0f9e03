"""The child in which webdataset reads and writes tars: one JSON line in, one JSON line out, until stdin closes.

Run by path under the sandbox (`python -I child.py`), so it imports webdataset and the standard library only.

Questions, and the functions that answer:

    {"op": "read", "tar", "start", "end", "wanted"}     members of a stretch of a tar → files     read_members
    {"op": "write", "tar", "clips"}                     clips → one shard                         write_shard

If the disk or a file is at fault, the answer is {"error": words, "full": whether the disk is full}. Both questions can
be asked again, of another child: what they write they write anew.

webdataset takes torch where there is one, which it needs for nothing that is done here: 600 MB, and two seconds.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import sys
from collections import Counter
from pathlib import Path
from typing import IO, Any

READ_MEMORY = 1 << 30  # address space while foreign tars are read, whose headers may promise anything


def main() -> None:
    """Answer until stdin closes. Whatever a library prints to stdout goes to stderr, never into an answer."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's, which computes nothing here: address space for each core
    sys.modules["torch"] = None  # type: ignore[assignment]
    import webdataset  # noqa: F401 - now, and not with the first question

    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")
        answers.flush()


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """The answer to one question."""
    try:
        if question["op"] == "read":
            _bound_memory(READ_MEMORY)
            return read_members(question["tar"], question["start"], question["end"], question["wanted"])
        _bound_memory(None)
        return write_shard(question["tar"], question["clips"])
    except OSError as e:
        return {"error": e.strerror or str(e), "full": e.errno in (errno.ENOSPC, errno.EDQUOT)}


def _bound_memory(limit: int | None) -> None:
    """Set the address space of this process, in bytes; None: as much as the sandbox gives it."""
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    if limit is None or (most != resource.RLIM_INFINITY and limit > most):
        limit = most
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))


# --- read members of a stretch


class _Stretch:
    """Bytes [start, end) of a file, as the stream that webdataset reads."""

    def __init__(self, file: IO[bytes], start: int, end: int) -> None:
        file.seek(start)
        self._file = file
        self._left = end - start

    def read(self, size: int) -> bytes:
        """Up to this many bytes; none at the end."""
        data = self._file.read(min(size, self._left))
        self._left -= len(data)
        return data


def read_members(tar: str, start: int, end: int, wanted: list[tuple[str, int, str]]) -> dict[str, Any]:
    """Write members of [start, end) of a tar to files; the stretch begins at a member's first header block.

    `wanted`: name, its number among the stretch's regular members of that name, file. The answer is {"done": [[name,
    number], …]}, of whole files only: reading ends with the last wanted member, or where the stretch is broken.
    """
    from webdataset.tariterators import tar_file_iterator

    files = {(name, number): path for name, number, path in wanted}
    seen: Counter[str] = Counter()
    done: list[tuple[str, int]] = []

    def select(name: str) -> bool:  # asked before a member is read; one that is not wanted is passed over in blocks
        seen[name] += 1
        return (name, seen[name] - 1) in files

    with Path(tar).open("rb") as file:
        members = tar_file_iterator(_Stretch(file, start, end), skip_meta=None, select_files=select)
        while len(done) < len(files):
            try:
                member = next(members)
            except Exception:  # noqa: BLE001 - StopIteration, or what tarfile stumbles over: the bytes may be anybody's
                break
            name = member["fname"]
            key = (name, seen[name] - 1)
            Path(files[key]).write_bytes(member["data"])
            done.append(key)
    return {"done": done}


# --- write a shard


def write_shard(tar: str, clips: list[tuple[str, str, str]]) -> dict[str, Any]:
    """Write one shard: KEY.json and KEY.mp4 of each clip, in plain USTAR, with fixed owner, mode and time.

    `clips`: key, text of the json, file of the mp4. One clip is in memory at a time. The answer is {}.
    """
    from webdataset.writer import TarWriter

    with (
        Path(tar).open("wb") as file,
        TarWriter(file, user="reelmae", group="reelmae", mode=0o444, mtime=0, encoder=False) as writer,
    ):
        for key, facts, clip in clips:
            writer.write({"__key__": key, "json": facts.encode(), "mp4": Path(clip).read_bytes()})
    return {}


if __name__ == "__main__":
    main()
