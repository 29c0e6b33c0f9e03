"""The metrics of a run: metrics.jsonl, TensorBoard, and a line or a bar on stderr.

Properties that hold: metrics.jsonl has one row for each logged step, in order, each step once. On a resume the rows
after the checkpoint are dropped, since those steps are run again.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard.writer import SummaryWriter

from reelmae.pipeline.storage.store import whole_file

Row = dict[str, float]
LINE_EVERY_S = 5.0  # between plain lines, where stderr is no terminal


def read_rows(path: Path) -> list[Row]:
    """The complete rows of a metrics.jsonl; none where there is no file. A half-written last row is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


class MetricsLog:
    """Appends rows to OUT/metrics.jsonl and OUT/tensorboard; rows after `step` are dropped first."""

    def __init__(self, out: Path, step: int) -> None:
        path = out / "metrics.jsonl"
        kept = [row for row in read_rows(path) if row["step"] <= step]
        with whole_file(path) as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, row: Row) -> None:
        """Add one row."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step":
                self._board.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        """Close both files."""
        self._file.close()
        self._board.close()


class Display:
    """A bar with loss, clips/s and the share of time spent waiting for data; plain lines off a terminal."""

    def __init__(self, steps: int, start: int) -> None:
        self._steps = steps
        self._last_line = 0.0
        console = Console(stderr=True)
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("train"),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[text]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task("train", total=steps, completed=start, text="")

    def __enter__(self) -> Display:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, row: Row) -> None:
        """Show a row: at once on a terminal; elsewhere one line every few seconds at most, and one at the end."""
        text = f"loss {row['loss']:.4f}  {row['clips_per_s']:.1f} clips/s  waiting {row['wait_share']:.0%}"
        text += f"  {row['retries']:.0f} retries" if row.get("retries") else ""
        step = int(row["step"])
        if self._bar:
            self._bar.update(self._task, completed=step, text=text)
        elif step == self._steps or time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._last_line = time.monotonic()
            self.note(f"step {step}/{self._steps}  {text}")

    def note(self, text: str) -> None:
        """One line on stderr, above the bar where there is one."""
        if self._bar:
            self._bar.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)


def as_json(value: Any) -> str:
    """Indented JSON that ends with a newline, as in the files of a run."""
    return json.dumps(value, indent=2, default=str) + "\n"
