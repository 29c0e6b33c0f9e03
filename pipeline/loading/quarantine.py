"""Bad clips: they are counted, named and replaced; too many of them stop the run.

A bad clip is replaced by a clip of its dataset, drawn by (seed, epoch, bad clip, attempt). If that one is bad too, the
next attempt draws another. So the same run always plays the same clips, whatever was known to be bad at its start.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from reelmae.pipeline.errors import BadClipError, TooManyBadClipsError
from reelmae.pipeline.loading.order.philox import STREAM_REPLACE, below, raw_bits

MIN_TRIED = 1000  # the limit is a share of at least this many clips, so that one bad clip does not end a small run
MAX_ATTEMPTS = 100


def replacement(planned: int, attempt: int, *, rows: range, seed: int, epoch: int) -> int:
    """The clip, one of `rows`, that attempt 1, 2, … puts in the place of clip `planned`; pure."""
    bits = raw_bits(1, seed=seed, stream=STREAM_REPLACE, words=(epoch, planned, attempt))[0]
    return rows[below(bits, len(rows))]


class Quarantine:
    """The bad clips of one run: `reasons` maps key to why, `clips` holds their rows in the index.

    With a `file` (JSON lines: the index's digest, row, key, reason), bad clips are written there when they are found.
    Those of this index that it lists already are known from the start, so a resumed run plays what it would have played
    without the stop. Several ranks may share the file. A line that a killed process left half-written is skipped.
    """

    def __init__(self, n_clips: int, max_bad_fraction: float, *, file: Path | None = None, index: str = "") -> None:
        self._n_clips = n_clips
        self._max_bad_fraction = max_bad_fraction
        self._file = file
        self._index = index
        self._lock = threading.Lock()  # decoder threads report bad clips
        self.reasons: dict[str, str] = {}
        self.clips: set[int] = set()
        self.tried = 0  # clips that this process tried
        self._found = 0  # how many of them were bad
        if file is not None and file.exists():
            content = file.read_text(encoding="utf-8")
            for line in content.splitlines():
                self._learn(line)
            if content and not content.endswith("\n"):
                with file.open("a", encoding="utf-8") as torn:
                    torn.write("\n")

    def _learn(self, line: str) -> None:
        try:
            known = json.loads(line)
        except ValueError:
            return
        if known["index"] == self._index:
            self.clips.add(known["clip"])
            self.reasons[known["key"]] = known["reason"]

    def add(self, clip: int, bad: BadClipError) -> None:
        """Count a bad clip. TooManyBadClipsError where there are more than the limit."""
        with self._lock:
            if clip not in self.clips:
                self._write({"index": self._index, "clip": clip, "key": bad.key, "reason": bad.reason})
            self.clips.add(clip)
            self.reasons[bad.key] = bad.reason
            self._found += 1
            tried = max(min(self.tried, self._n_clips), MIN_TRIED)
            limit = self._max_bad_fraction
            if self._found > limit * tried:
                raise TooManyBadClipsError(
                    f"{self._found} bad clips of {self.tried} tried, more than max_bad_fraction={limit} of {tried}; "
                    f"the last: {bad}; run reelmae verify --deep on the dataset"
                ) from bad

    def _write(self, found: dict[str, Any]) -> None:
        if self._file is None:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("ab", buffering=0) as file:  # one write in append mode: lines of several ranks do not mix
            file.write(json.dumps(found).encode() + b"\n")

    def check_attempt(self, attempt: int) -> None:
        """TooManyBadClipsError after too many attempts to replace one clip."""
        if attempt > MAX_ATTEMPTS:
            raise TooManyBadClipsError(
                f"no good clip among {MAX_ATTEMPTS} drawn to replace a bad one "
                f"({len(self.clips)} of {self._n_clips} clips are bad); run reelmae verify --deep on the dataset"
            )
