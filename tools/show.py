"""What a person sees of a command: a progress bar on a terminal, JSON lines elsewhere; the result as a short table.

Progress goes to stderr, results to stdout, so that a pipe gets the result alone. The texts for bytes, times and
names that the report and `inspect` share are here too.
"""

from __future__ import annotations

import json
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from reelmae.pipeline.ingest.job import Progress as ShardState

Result = dict[str, Any]
"""What a command returns: values that JSON can hold."""
LINE_EVERY_S = 5.0
WINDOW_S = 30.0  # rates are those of this time
SAMPLE_S = 0.5  # at least between two states that are held


class _ProgressDisplay(ABC):
    """A progress bar on a terminal; elsewhere one JSON object a line. All of it goes to stderr.

    The lines are: the first state, one state every LINE_EVERY_S and, when the work has ended well, the last state as
    event "done". After an error there is no "done". A context manager.
    """

    unit: ClassVar[str]

    def __init__(self, *, now: Callable[[], float] = time.monotonic, console: Console | None = None) -> None:
        self.console = Console(stderr=True, highlight=False) if console is None else console
        self.now = now
        self.bar: Progress | None = None
        self.last: dict[str, Any] | None = None
        self.last_line: float | None = None

    @abstractmethod
    def _columns(self) -> Sequence[ProgressColumn]:
        """What the bar shows on a terminal, from left to right."""

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.bar = Progress(*self._columns(), console=self.console)
            self.task = self.bar.add_task(self.unit, total=None, text="", left="")
            self.bar.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
        elif error is None and self.last is not None:
            self._print_line("done", self.last)

    def _show(self, now: float, values: dict[str, Any], done: int, total: int, **texts: Any) -> None:
        """Show a state: `done` of `total` and `texts` in the bar, or `values` on a line."""
        self.last = values
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=total, **texts)
        elif self.last_line is None or now - self.last_line >= LINE_EVERY_S:
            self.last_line = now
            self._print_line("progress", values)

    def _print_line(self, event: str, values: dict[str, Any]) -> None:
        self.console.print(json.dumps({"event": event, **values}), soft_wrap=True, markup=False)


class ShardProgress(_ProgressDisplay):
    """Progress of a sharding job. Call it with the job's state, from the main thread.

    Rates are those of the last WINDOW_S. The time left follows from the sources done since this run's first state.
    """

    unit = "sources"

    def __init__(self, *, now: Callable[[], float] = time.monotonic, console: Console | None = None) -> None:
        super().__init__(now=now, console=console)
        self.first: float | None = None  # time of the first state
        self.window: deque[tuple[float, ShardState]] = deque()

    def _columns(self) -> Sequence[ProgressColumn]:
        wide = self.console.width >= 100
        elapsed = [TimeElapsedColumn()] if wide else []
        return [
            TextColumn(self.unit),
            BarColumn(bar_width=12 if wide else 6),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            *elapsed,
            TextColumn("{task.fields[left]}", markup=False),
        ]

    def __call__(self, state: ShardState) -> None:
        """Show this state."""
        now = self.now()
        if self.first is None:
            self.first = now
        self._remember(now, state)
        values = self._values(now, state)
        rates = f"{values['sources_per_s']:.1f}/s  {values['clips_per_s']:.1f} clips/s"
        text = f"{rates}  {values['read_mb_per_s']:.1f} MB/s  {state.rejected} rejected"
        text += f"  {state.retries} retries" if state.retries else ""
        left = "" if values["left_s"] is None else f"{seconds_text(values['left_s'])} left"
        self._show(now, values, state.sources_done, state.sources, text=text, left=left)

    def _remember(self, now: float, state: ShardState) -> None:
        """Add this state to the window. Earlier states are kept at least SAMPLE_S apart."""
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
            "retries": state.retries,
            "seconds": round(state.seconds, 1),
            "left_s": left,
        }


class ClipProgress(_ProgressDisplay):
    """Progress of `features`. Call it with the clips that are done and all clips."""

    unit = "clips"

    def _columns(self) -> Sequence[ProgressColumn]:
        return [TextColumn(self.unit), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]

    def __call__(self, clips: int, of: int) -> None:
        """Show this state."""
        self._show(self.now(), {"clips": clips, "of": of}, clips, of)


def bytes_text(n: float) -> str:
    """A number of bytes to three digits: 12345 → 12.3 kB."""
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


def retries_text(retries: Mapping[str, int]) -> str:
    """How often stores were asked again, and why: 12 (9 x 503 SlowDown, 3 x timed out)."""
    causes = ", ".join(f"{n:,} x {cause}" for cause, n in sorted(retries.items(), key=lambda kv: (-kv[1], kv[0])))
    return f"{sum(retries.values()):,} ({causes})" if retries else "none"


def length_text(seconds: float) -> str:
    """The length of a clip: exact under a minute and a half, else as `seconds_text`."""
    return f"{seconds:g} s" if seconds < 90 else seconds_text(seconds)


def short_name(source: str, src: str) -> str:
    """The source's url relative to its bucket `src`, on one line."""
    return printable(source.removeprefix(src.rstrip("/") + "/") if src else source)


def printable(text: str) -> str:
    """The text on one line. Characters that could control a terminal or turn the direction of reading are escaped as
    Python writes them, so that one name cannot pass for another."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def print_result(values: dict[str, Any], *, indent: int = 0) -> None:
    """Print a command's result on stdout: one line for each value, nested groups indented."""
    for name, value in values.items():
        if name == "exit_status":
            continue
        if isinstance(value, dict):
            print(" " * indent + f"{name}:" + ("" if value else " none"))
            print_result(value, indent=indent + 2)
        elif isinstance(value, float):
            print(" " * indent + f"{name}: {value:.4g}")
        elif isinstance(value, list | tuple):
            print(" " * indent + f"{name}:" + ("" if value else " none"))
            for item in value:
                print(" " * indent + f"  - {item}")
        else:
            print(" " * indent + f"{name}: {value}")
    sys.stdout.flush()
