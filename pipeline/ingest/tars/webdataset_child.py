"""webdataset in one warm child: members out of foreign tars, and clips into shards.

The child (child.py) runs in the sandbox. It is started when it is needed and not with the job, so a job begins without
importing webdataset. Its questions can be asked again: where somebody else kills it (the system, for want of memory),
another one is asked.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reelmae.pipeline.errors import (
    ChildCrashedError,
    ChildError,
    ChildKilledError,
    ChildTimeoutError,
    StorageError,
    StorageFullError,
)
from reelmae.pipeline.ingest.sandbox import Child, Limits, Sandbox

KILLED_TRIES = 10  # of a question whose child somebody else kills each time
_PROGRAM = Path(__file__).with_name("child.py")
# a clip of 4 GiB, the most that ffmpeg may write, is held in memory; a shard is larger than its clips
_LIMITS = Limits(cpu_s=24 * 3600, memory_bytes=8 << 30, file_bytes=1 << 50)


class TarChild:
    """One warm child, started by `start` or at the first question. Not shared by threads; close it at the end."""

    def __init__(self, sandbox: Sandbox, folder: Path) -> None:
        self._sandbox = sandbox
        self._folder = folder
        self._child: Child | None = None

    def start(self) -> None:
        """Start the child if none runs. It imports webdataset, for which this does not wait."""
        if self._child is not None and not self._child.alive:
            self.close()
        if self._child is None:
            argv = [sys.executable, "-I", str(_PROGRAM)]
            self._child = self._sandbox.start(argv, limits=_LIMITS, cwd=self._folder)

    def read(
        self, tar: Path, start: int, end: int, wanted: Mapping[tuple[str, int], Path], *, wall_s: float
    ) -> list[tuple[str, int]]:
        """Write members out of bytes [start, end) of a tar to files; those of them that were written, whole.

        The stretch begins at a member's first header block. `wanted`: (name, its number from 0 among the stretch's
        regular members of that name) → file. A wanted member is held in memory (up to some 300 MiB), others are passed
        over in blocks.

        A wanted member is missing in the answer if it isn't there, if webdataset leaves it out (`__x__`, its own), or
        if it comes after a broken header or the stretch's end. None is there if the child crashed, or passed `wall_s`
        seconds: files may then hold anything. StorageFullError, or StorageError if a file cannot be read or written.
        """
        question = {
            "op": "read",
            "tar": str(tar),
            "start": start,
            "end": end,
            "wanted": [(name, number, str(path)) for (name, number), path in wanted.items()],
        }
        try:
            answer = self._ask(question, wall_s)
        except (ChildTimeoutError, ChildCrashedError):
            return []
        _raise_fault(answer, tar)
        return [(name, number) for name, number in answer["done"]]

    def write(self, tar: Path, clips: Sequence[tuple[str, bytes, Path]]) -> None:
        """Write one shard; `clips`: key, its json, its mp4. StorageFullError, or StorageError if it cannot be written."""
        listed = [(key, facts.decode(), str(clip)) for key, facts, clip in clips]
        wall_s = 600 + sum(clip.stat().st_size for _, _, clip in clips) / 1e6
        try:
            answer = self._ask({"op": "write", "tar": str(tar), "clips": listed}, wall_s)
        except ChildError as e:  # it failed, or the job is being stopped and none may begin
            raise StorageError(f"{tar}: the child that writes tars with webdataset failed: {e}") from e
        _raise_fault(answer, tar)

    def _ask(self, question: dict[str, Any], wall_s: float) -> dict[str, Any]:
        line = json.dumps(question).encode()
        for number in range(1, KILLED_TRIES + 1):
            self.start()
            assert self._child is not None
            try:
                return json.loads(self._child.ask(line, wall_s=wall_s))
            except (ChildTimeoutError, ChildCrashedError) as e:
                self.close()
                if not isinstance(e, ChildKilledError) or number == KILLED_TRIES:
                    raise
        raise AssertionError("unreachable")

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.close()
        self._child = None


def _raise_fault(answer: dict[str, Any], tar: Path) -> None:
    if answer.get("full"):
        raise StorageFullError(
            f"{tar.parent}: no space left for temporary files; free some, or set TMPDIR, and run again"
        )
    if "error" in answer:
        raise StorageError(f"{tar}: {answer['error']}")
