"""One pass over a dataset's index and rejects: rows come in batches, sums are held. contents.py makes facts of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from reelmae.pipeline.dataset.tables import Row
from reelmae.pipeline.errors import DatasetError
from reelmae.pipeline.ingest.config import PRESETS
from reelmae.pipeline.storage.checked import download_agreed
from reelmae.pipeline.storage.scratch import scratch_folder
from reelmae.pipeline.storage.store import Store

BATCH_ROWS = 20_000
EXAMPLES = 20  # rejects held of each reason
REPEATS = 6  # clips held that repeat another
SHEET_CLIPS = 25  # clips of the contact sheet
SHEET_CLIPS_PER_SOURCE = 3  # at most

Count = tuple[str, int]
"""A value and how often it occurs."""


@dataclass(frozen=True)
class Score:
    """A screening score: how it is counted, and the screen that rejects by it."""

    unit: str
    bin_width: float
    bins: int
    """The last bin also takes all values above it."""
    setting: str
    reason: str
    at_most: bool = False
    """Whether the setting is an upper bound."""


SCORES = {
    "motion": Score("levels of 255", 0.5, 60, "min_motion", "static"),
    "luma": Score("levels of 255", 8, 32, "min_luma", "dark"),
    "contrast": Score("levels of 255", 4, 32, "min_contrast", "blank"),
    "border": Score("share of the picture", 0.05, 20, "max_border", "borders", at_most=True),
}


@dataclass(frozen=True)
class RejectExample:
    """One rejected source or span, with the decoder's own words."""

    source: str
    start_s: float | None
    """None: the whole source was rejected."""
    end_s: float | None
    detail: str


@dataclass(frozen=True)
class RejectGroup:
    """All that was rejected for one reason."""

    reason: str
    sources: int
    """Sources that were rejected as a whole."""
    spans: int
    """Spans of sources that gave other clips."""
    examples: tuple[RejectExample, ...]
    """A random draw of both, sorted by name."""


def batches(store: Store, name: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The rows of a table, in order, one batch at a time."""
    try:
        with _local_file(store, name) as path, pq.ParquetFile(path, pre_buffer=False) as file:
            absent = [c for c in columns if c not in file.schema_arrow.names]
            if absent:
                raise DatasetError(
                    f"{store.url(name)}: has no column {', '.join(absent)}: an earlier version of reelmae wrote it; "
                    "shard the bucket anew to another DST"
                )
            yield from file.iter_batches(BATCH_ROWS, columns=columns)
    except (pa.ArrowException, OSError) as e:
        if isinstance(e, OSError) and e.errno is not None:  # the system failed, the table may be sound
            raise
        raise DatasetError(
            f"{store.url(name)}: is damaged ({str(e).splitlines()[0]}); run reelmae verify on the dataset"
        ) from e


@contextmanager
def _local_file(store: Store, name: str) -> Iterator[Path]:
    if not store.exists(name):
        raise DatasetError(f"{store.url(name)}: is missing; run reelmae verify on the dataset")
    if store.is_local:
        yield store.local_path(name)
        return
    with scratch_folder() as folder:
        path = Path(folder, "table.parquet")
        download_agreed(store, name, path)
        yield path


@dataclass
class ClipSums:
    """Sums over the rows of the index that were added so far."""

    columns: dict[str, str]
    """The manifest's own columns: name → type."""
    rows: int = 0
    last_source: str | None = None
    """URL of the last row's source."""
    run: int = 0
    """Clips of that source so far."""
    largest: Count = ("", 0)
    """The source with the most clips."""
    sums: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    seconds_in: float = 0.0
    counts: dict[str, Counter[Any]] = field(default_factory=dict)
    bins: dict[str, np.ndarray] = field(default_factory=dict)
    repeats: list[Row] = field(default_factory=list)
    sheet: list[Row] = field(default_factory=list)
    """Candidates for the contact sheet."""
    stride: int = 1
    """`sheet` keeps every stride-th clip that is no duplicate."""

    def add(self, batch: pa.RecordBatch) -> None:
        """Add the next rows."""
        if not len(batch):
            return
        fps, frames = numbers_of(batch, "fps"), numbers_of(batch, "frames")
        seconds = np.divide(frames, fps, out=np.zeros_like(frames), where=fps > 0)
        self.rows += len(batch)
        self.seconds += float(seconds.sum())
        self._count("tenths", np.round(seconds * 10).astype(np.int64))
        self._count("fps_out", np.round(fps, 2))
        self._count("label_id", numbers_of(batch, "label_id").astype(np.int64))
        for name in ("codec", "encoder", "colour"):
            self._count(name, batch.column(name))
        self._count_pairs("size_out", batch, "width", "height", "×")
        for name in self.columns:
            self.sums[f"column {name}"] += len(batch) - batch.column(name).null_count
        self._count_scores(batch)
        self._count_sheet(batch, self._count_sources(batch))

    def _count(self, name: str, values: Any) -> None:
        known = self.counts.setdefault(name, Counter())
        for pair in pc.value_counts(values if isinstance(values, pa.Array) else pa.array(values)):
            known[pair["values"].as_py()] += pair["counts"].as_py()

    def _count_pairs(self, name: str, batch: pa.RecordBatch, first: str, second: str, between: str) -> None:
        texts = [pc.cast(batch.column(c), pa.string()) for c in (first, second)]
        self._count(name, pc.binary_join_element_wise(*texts, between))

    def _count_scores(self, batch: pa.RecordBatch) -> None:
        for name, score in SCORES.items():
            values = numbers_of(batch, name)
            values = values[~np.isnan(values)]
            where = np.clip(values // score.bin_width, 0, score.bins - 1).astype(np.int64)
            counts = np.bincount(where, minlength=score.bins)
            self.bins[name] = self.bins.get(name, np.zeros(score.bins, np.int64)) + counts
            common = getattr(PRESETS["uncurated"], score.setting)
            beyond = values > common if score.at_most else values < common
            self.sums[f"beyond {name}"] += int(beyond.sum())

    def _count_sources(self, batch: pa.RecordBatch) -> np.ndarray:
        """Count what describes a source once, at its first row. Returns each row's place within its source, from 0."""
        urls = batch.column("source")
        changes = np.ones(len(urls), bool)
        changes[0] = urls[0].as_py() != self.last_source
        changes[1:] = pc.not_equal(urls.slice(1), urls.slice(0, len(urls) - 1)).to_numpy(zero_copy_only=False)
        rows = np.arange(len(urls))
        starts = np.maximum.accumulate(np.where(changes, rows, -1))
        places = np.where(starts >= 0, rows - starts, rows + self.run)
        self._update_largest(urls, np.flatnonzero(changes))
        self.last_source = urls[-1].as_py()
        first = batch.filter(pa.array(changes))
        seconds = numbers_of(first, "source_seconds")
        known = np.isfinite(seconds) & (seconds > 0)
        self.seconds_in += float(seconds[known].sum())
        self.sums["timed"] += int(known.sum())
        self.sums["sources"] += len(first)
        self.sums["bytes_in"] += int(np.nansum(numbers_of(first, "source_bytes")))
        self._count("fps_in", np.round(numbers_of(first, "source_fps"), 2))
        self._count_pairs("size_in", first, "source_width", "source_height", "×")
        self._count_pairs("codec_in", first, "source_codec", "source_container", " in ")
        return places

    def _update_largest(self, urls: pa.Array, starts: np.ndarray) -> None:
        """Find the source with the most clips. The clips of one source may begin in the batch before."""
        bounds = [0, *starts.tolist(), len(urls)] if not len(starts) or starts[0] else [*starts.tolist(), len(urls)]
        lengths = np.diff(bounds)
        if not len(starts) or starts[0]:  # the first rows belong to the last source of the batch before
            lengths[0] += self.run
        self.run = int(lengths[-1])
        most = int(lengths.argmax())
        if lengths[most] > self.largest[1]:
            self.largest = (urls[bounds[most]].as_py(), int(lengths[most]))

    def _count_sheet(self, batch: pa.RecordBatch, places: np.ndarray) -> None:
        """Count the duplicates, and hold clips for the sheet. `places`: each row's place within its source."""
        alone = batch.column("duplicate_of").is_null().to_numpy(zero_copy_only=False)
        if not alone.all():
            self.sums["duplicates"] += int((~alone).sum())
            repeats = batch.filter(pa.array(~alone)).slice(0, REPEATS)
            self.repeats = (self.repeats + repeats.to_pylist())[:REPEATS]
        alone &= places < SHEET_CLIPS_PER_SOURCE
        numbers = self.sums["for the sheet"] + np.cumsum(alone) - 1
        self.sums["for the sheet"] += int(alone.sum())
        taken = np.flatnonzero(alone & (numbers % self.stride == 0))
        while len(self.sheet) + len(taken) > 4 * SHEET_CLIPS:
            self.stride, self.sheet = 2 * self.stride, self.sheet[::2]
            taken = np.flatnonzero(alone & (numbers % self.stride == 0))
        self.sheet += batch.take(pa.array(taken)).to_pylist()


@dataclass
class RejectSums:
    """Counts of rejects by reason, and a random draw of each reason's rows."""

    sources: Counter[str] = field(default_factory=Counter)
    spans: Counter[str] = field(default_factory=Counter)
    lowest: dict[str, list[tuple[float, Row]]] = field(default_factory=dict)
    """Each row draws a random number; of each reason, the EXAMPLES rows with the lowest numbers."""
    draws: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def add(self, batch: pa.RecordBatch) -> None:
        """Add the next rows."""
        if not len(batch):
            return
        reasons = np.asarray(batch.column("reason").to_pylist(), dtype=object)
        whole = batch.column("span_start_s").is_null().to_numpy(zero_copy_only=False)
        self.sources.update(reasons[whole].tolist())
        self.spans.update(reasons[~whole].tolist())
        lots = self.draws.random(len(batch))
        for reason in set(reasons.tolist()):
            rows = np.flatnonzero(reasons == reason)
            rows = rows[np.argsort(lots[rows], kind="stable")[:EXAMPLES]]
            new = zip(lots[rows].tolist(), batch.take(pa.array(rows)).to_pylist(), strict=True)
            held = sorted([*self.lowest.get(reason, []), *new], key=lambda draw: draw[0])
            self.lowest[reason] = held[:EXAMPLES]

    def groups(self) -> tuple[RejectGroup, ...]:
        """One group for each reason, the largest first."""
        reasons = sorted(self.sources | self.spans, key=lambda r: (-self.sources[r] - self.spans[r], r))
        return tuple(RejectGroup(r, self.sources[r], self.spans[r], self._examples(r)) for r in reasons)

    def _examples(self, reason: str) -> tuple[RejectExample, ...]:
        rows = (row for _, row in self.lowest[reason])
        found = [RejectExample(r["source"], r["span_start_s"], r["span_end_s"], r["detail"]) for r in rows]
        return tuple(sorted(found, key=lambda r: (r.source, r.start_s or 0.0)))


def numbers_of(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """A column as float64; null becomes NaN."""
    return batch.column(name).cast(pa.float64()).to_numpy(zero_copy_only=False)
