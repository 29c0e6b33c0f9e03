"""What a person sees of a running command: a progress bar on a terminal, plain lines elsewhere; results as a short table.

All of it goes to stderr but the result, so that a pipe gets only what was asked for.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from reelmae.pipeline.ingest.job import Progress as ShardState

LINE_EVERY_S = 5.0


class ShardProgress:
    """Progress of a sharding job: called with its state, from the main thread."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.bar: Progress | None = None
        self.last_line = 0.0
        self.done_before: int | None = None  # sources of tasks that earlier runs finished
        self.ended = False

    def __enter__(self) -> ShardProgress:
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("sources"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=self.console,
            )  # fmt: skip
            self.task = self.bar.add_task("sources", total=None, text="")
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, state: ShardState) -> None:
        """Show this state."""
        seconds = max(state.seconds, 1e-9)
        text = f"{state.clips} clips {state.clips / seconds:.1f}/s  {state.bytes / 1e6:.0f} MB  {state.rejected} rejected"
        if self.bar is not None:
            self.bar.update(self.task, completed=state.sources_done, total=state.sources, text=text)
            return
        if self.done_before is None:
            self.done_before = state.sources_before
        ends = state.sources_done == state.sources
        if self.ended or (not ends and time.monotonic() - self.last_line < LINE_EVERY_S):
            return
        self.last_line, self.ended = time.monotonic(), ends
        left = (state.sources - state.sources_done) * seconds / max(state.sources_done - self.done_before, 1)
        self.console.print(
            f"shard: {state.sources_done}/{state.sources} sources  {text}  {left:.0f} s left", soft_wrap=True
        )


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
