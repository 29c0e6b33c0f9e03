"""A source that was fetched: what is known of it before anything reads its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reelmae.pipeline.ingest.clips.cut import Span


@dataclass(frozen=True)
class Source:
    """One source and its local copy."""

    url: str
    label: str | None
    rows: Sequence[dict[str, Any]]
    """The manifest's rows of this source (see schema.SOURCES); empty without a manifest."""
    path: Path
    """The local copy."""
    bytes: int

    def manifest_spans(self) -> list[tuple[float, float | None]]:
        """Start and end in seconds of every row that names a span; the end is None where the video's end is meant."""
        return [
            (row["start_s"] or 0.0, row["end_s"])
            for row in self.rows
            if row["start_s"] is not None or row["end_s"] is not None
        ]

    def row_of(self, span: Span) -> dict[str, Any] | None:
        """The manifest's row of this span: for windows and scenes its first row; None without a manifest."""
        return self.rows[span.row or 0] if self.rows else None
