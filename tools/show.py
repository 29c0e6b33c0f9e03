"""What a person sees of a running command: a progress bar on a terminal, JSON lines elsewhere; results as a short table.

All of it goes to stderr but the result, so that a pipe gets only what was asked for. Here too: the words for
reasons, bytes and times that the report and `inspect` share.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from reelmae.pipeline.ingest.job import Progress as ShardState

LINE_EVERY_S = 5.0
WINDOW_S = 30.0  # over which rates are told
SAMPLE_S = 0.5  # of states held within it

MEANING = {
    "empty_file": "zero bytes", "not_a_video": "by its content no video container",
    "unreadable": "a container whose header cannot be read", "no_video_stream": "sound or data only",
    "encrypted": "encrypted, without a key", "unsupported_codec": "no decoder for it",
    "no_frames": "the decoder gave no picture", "too_few_frames": "too short to train on",
    "too_small": "a side too small", "too_large": "more bytes or pixels than allowed", "too_long": "longer than allowed",
    "bad_timestamps": "no frame rate can be told from its times", "decode_errors": "the decoder reported damage",
    "truncated": "far fewer frames than promised", "timeout": "took longer than allowed",
    "crashed": "its decoder died", "fetch_failed": "could not be read from storage",
    "verify_failed": "the encoded clip was not what was asked",
    "unsupported_colour": "HDR or wide gamut, and this ffmpeg cannot convert it",
    "span_outside": "the span begins beyond the end of the video", "too_short": "shorter than asked for",
    "low_fps": "too few frames a second", "bad_aspect": "too long and narrow", "static": "hardly anything moves",
    "dark": "too dark", "blank": "hardly any contrast", "borders": "mostly black border",
}  # fmt: skip


class ShardProgress:
    """Progress of a sharding job: called with its state, from the main thread.

    Rates are those of the last WINDOW_S; what is left is told from the sources that this run has done since its
    first state. Where stderr is no terminal, one JSON object a line: the first state, then one every LINE_EVERY_S,
    and, when the job has ended well, the last state as event "done". Of a run that failed there is no "done".
    """

    def __init__(self, *, now: Callable[[], float] = time.monotonic, console: Console | None = None) -> None:
        self.console = Console(stderr=True, highlight=False) if console is None else console
        self.now = now
        self.bar: Progress | None = None
        self.first: float | None = None  # when the first state came
        self.last_line = 0.0
        self.last: dict[str, Any] | None = None
        self.window: deque[tuple[float, ShardState]] = deque()

    def __enter__(self) -> ShardProgress:
        if self.console.is_terminal:
            wide = self.console.width >= 100
            columns = [
                TextColumn("sources"), BarColumn(bar_width=12 if wide else 6), MofNCompleteColumn(),
                TextColumn("{task.fields[text]}", markup=False), *([TimeElapsedColumn()] if wide else []),
                TextColumn("{task.fields[left]}", markup=False),
            ]  # fmt: skip
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task("sources", total=None, text="", left="")
            self.bar.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
        elif error is None and self.last is not None:
            self._line("done", self.last)

    def __call__(self, state: ShardState) -> None:
        """Show this state."""
        now = self.now()
        if self.first is None:
            self.first = now
        self._remember(now, state)
        values = self.last = self._values(now, state)
        if self.bar is not None:
            text = f"{values['sources_per_s']:.1f}/s  {values['clips_per_s']:.1f} clips/s  {values['read_mb_per_s']:.1f} MB/s  {state.rejected} rejected"
            left = "" if values["left_s"] is None else f"{seconds_text(values['left_s'])} left"
            self.bar.update(self.task, completed=state.sources_done, total=state.sources, text=text, left=left)
        elif now == self.first or now - self.last_line >= LINE_EVERY_S:
            self.last_line = now
            self._line("progress", values)

    def _remember(self, now: float, state: ShardState) -> None:
        """The last state of the window is always this one; the others are at least SAMPLE_S apart."""
        if len(self.window) > 1 and self.window[-1][0] - self.window[-2][0] < SAMPLE_S:
            self.window.pop()
        self.window.append((now, state))
        while len(self.window) > 2 and now - self.window[1][0] >= WINDOW_S:
            self.window.popleft()

    def _values(self, now: float, state: ShardState) -> dict[str, Any]:
        begin, before = self.window[0]
        span = now - begin

        def rate(name: str, digits: int, unit: float = 1) -> float:
            return round((getattr(state, name) - getattr(before, name)) / unit / span, digits) if span else 0.0

        done, waiting = state.sources_done - state.sources_before, state.sources - state.sources_done
        elapsed = now - (now if self.first is None else self.first)
        left = 0.0 if not waiting else round(waiting * elapsed / done, 1) if done and elapsed else None
        return {
            "sources_done": state.sources_done,
            "sources": state.sources,
            "sources_per_s": rate("sources_done", 2),
            "clips": state.clips,
            "clips_per_s": rate("clips", 2),
            "read_mb_per_s": rate("source_bytes", 2, 1e6),
            "written_mb": round(state.bytes / 1e6, 1),
            "rejected": state.rejected,
            "seconds": round(state.seconds, 1),
            "left_s": left,
        }

    def _line(self, event: str, values: dict[str, Any]) -> None:
        self.console.print(json.dumps({"event": event, **values}), soft_wrap=True, markup=False)


def bytes_text(n: float) -> str:
    """3 digits: 12345 → 12.3 kB."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 999.5:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB" if n < 999.5 else f"{n:,.0f} TB"


def seconds_text(seconds: float) -> str:
    """A length of time in the unit that fits: 8.5 s, 12.3 min, 4.1 h."""
    if seconds < 90:
        return f"{seconds:.3g} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:,.1f} h"


def printable(text: str) -> str:
    """The text on one line and with nothing in it that steers a terminal or turns the direction of reading: such
    characters as Python writes them, so that a name cannot pass for another."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def result(values: dict[str, Any], *, indent: int = 0) -> None:
    """Print a result on stdout: one line a value, nested groups indented."""
    for name, value in values.items():
        if name == "exit_status":
            continue
        if isinstance(value, dict):
            print(" " * indent + f"{name}:" + ("" if value else " none"))
            result(value, indent=indent + 2)
        elif isinstance(value, float):
            print(" " * indent + f"{name}: {value:.4g}")
        elif isinstance(value, list | tuple):
            print(" " * indent + f"{name}:" + ("" if value else " none"))
            for item in value:
                print(" " * indent + f"  - {item}")
        else:
            print(" " * indent + f"{name}: {value}")
    sys.stdout.flush()
