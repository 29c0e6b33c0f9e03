"""One pass over a dataset's index and rejects: rows in batches, sums held. See dataset_facts.py for what they become."""

from __future__ import annotations

import tempfile
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

from reelmae.pipeline.errors import DatasetError
from reelmae.pipeline.ingest.config import PRESETS
from reelmae.pipeline.storage.store import Store

ROWS = 20_000  # of a batch
EXAMPLES = 20  # rejects of a reason that are held
PAIRS = 6  # repeats that are told of
SHEET = 25  # clips of the contact sheet
OF_ONE = 3  # of them at most of one source
Row = dict[str, Any]
Count = tuple[str, int]

# score → width of a bin, bins (the last takes all above), setting, the reason that it gives, whether it is an upper bound
SCORES: dict[str, tuple[float, int, str, str, bool]] = {
    "motion": (0.5, 60, "min_motion", "static", False),
    "luma": (8, 32, "min_luma", "dark", False),
    "contrast": (4, 32, "min_contrast", "blank", False),
    "border": (0.05, 20, "max_border", "borders", True),
}


@dataclass(frozen=True)
class Reject:
    """One rejected source (no span) or span, with the decoder's own words."""

    source: str
    start_s: float | None
    end_s: float | None
    detail: str


@dataclass(frozen=True)
class Rejects:
    """Of one reason: sources, spans of sources that gave other clips, and a fair draw of both, by name."""

    reason: str
    sources: int
    spans: int
    examples: tuple[Reject, ...]


def batches(store: Store, name: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The rows of a table, in order, a batch at a time."""
    try:
        with _file(store, name) as path, pq.ParquetFile(path) as file:
            absent = [c for c in columns if c not in file.schema_arrow.names]
            if absent:
                raise DatasetError(
                    f"{store.url(name)}: has no column {', '.join(absent)}: it is of an earlier version of reelmae; "
                    "shard the bucket anew to another DST"
                )
            yield from file.iter_batches(ROWS, columns=columns)
    except (pa.ArrowException, OSError) as e:
        if isinstance(e, OSError) and e.errno is not None:  # of the system, not of the table
            raise
        raise DatasetError(
            f"{store.url(name)}: is damaged ({str(e).splitlines()[0]}); run reelmae verify on the dataset"
        ) from e


@contextmanager
def _file(store: Store, name: str) -> Iterator[Path]:
    if not store.exists(name):
        raise DatasetError(f"{store.url(name)}: is missing; run reelmae verify on the dataset")
    if store.is_local:
        yield store.local_path(name)
        return
    with tempfile.TemporaryDirectory(prefix="reelmae-") as folder:
        path = Path(folder, "table.parquet")
        store.download(name, path)
        yield path


@dataclass
class ClipSums:
    """What the index adds up to so far."""

    columns: dict[str, str]
    rows: int = 0
    last: str | None = None  # url of the row before
    run: int = 0  # clips of it so far
    largest: Count = ("", 0)
    sums: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    seconds_in: float = 0.0
    counts: dict[str, Counter[Any]] = field(default_factory=dict)
    bins: dict[str, np.ndarray] = field(default_factory=dict)
    repeats: list[Row] = field(default_factory=list)
    sheet: list[Row] = field(default_factory=list)
    stride: int = 1  # every how manieth clip that repeats no other is held for the sheet

    def add(self, batch: pa.RecordBatch) -> None:
        """The next rows."""
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
        self._pairs("size_out", batch, "width", "height", "×")
        for name in self.columns:
            self.sums[f"column {name}"] += len(batch) - batch.column(name).null_count
        self._score(batch)
        self._single(batch, self._sources(batch))

    def _count(self, name: str, values: Any) -> None:
        known = self.counts.setdefault(name, Counter())
        for pair in pc.value_counts(values if isinstance(values, pa.Array) else pa.array(values)):
            known[pair["values"].as_py()] += pair["counts"].as_py()

    def _pairs(self, name: str, batch: pa.RecordBatch, first: str, second: str, between: str) -> None:
        texts = [pc.cast(batch.column(c), pa.string()) for c in (first, second)]
        self._count(name, pc.binary_join_element_wise(*texts, between))

    def _score(self, batch: pa.RecordBatch) -> None:
        for name, (width, bins, setting, _, at_most) in SCORES.items():
            values = numbers_of(batch, name)
            values = values[~np.isnan(values)]
            where = np.clip(values // width, 0, bins - 1).astype(np.int64)
            self.bins[name] = self.bins.get(name, np.zeros(bins, np.int64)) + np.bincount(where, minlength=bins)
            common = getattr(PRESETS["uncurated"], setting)
            beyond = values > common if at_most else values < common
            self.sums[f"beyond {name}"] += int(beyond.sum())

    def _sources(self, batch: pa.RecordBatch) -> np.ndarray:
        """What is of the source, of the first row of each; the place of each row within its source, from 0."""
        urls = batch.column("source")
        changes = np.ones(len(urls), bool)
        changes[0] = urls[0].as_py() != self.last
        changes[1:] = pc.not_equal(urls.slice(1), urls.slice(0, len(urls) - 1)).to_numpy(zero_copy_only=False)
        rows = np.arange(len(urls))
        starts = np.maximum.accumulate(np.where(changes, rows, -1))
        places = np.where(starts >= 0, rows - starts, rows + self.run)
        self._longest(urls, np.flatnonzero(changes))
        self.last = urls[-1].as_py()
        first = batch.filter(pa.array(changes))
        seconds = numbers_of(first, "source_seconds")
        known = np.isfinite(seconds) & (seconds > 0)
        self.seconds_in += float(seconds[known].sum())
        self.sums["timed"] += int(known.sum())
        self.sums["sources"] += len(first)
        self.sums["bytes_in"] += int(np.nansum(numbers_of(first, "source_bytes")))
        self._count("fps_in", np.round(numbers_of(first, "source_fps"), 2))
        self._pairs("size_in", first, "source_width", "source_height", "×")
        self._pairs("codec_in", first, "source_codec", "source_container", " in ")
        return places

    def _longest(self, urls: pa.Array, starts: np.ndarray) -> None:
        """The source with the most clips; its first ones may lie in the batch before."""
        bounds = [0, *starts.tolist(), len(urls)] if not len(starts) or starts[0] else [*starts.tolist(), len(urls)]
        lengths = np.diff(bounds)
        if not len(starts) or starts[0]:  # the first rows go on with the source before
            lengths[0] += self.run
        self.run = int(lengths[-1])
        most = int(lengths.argmax())
        if lengths[most] > self.largest[1]:
            self.largest = (urls[bounds[most]].as_py(), int(lengths[most]))

    def _single(self, batch: pa.RecordBatch, places: np.ndarray) -> None:
        """Repeats, and clips for the sheet; `places` of the rows within their sources."""
        alone = batch.column("duplicate_of").is_null().to_numpy(zero_copy_only=False)
        if not alone.all():
            self.sums["duplicates"] += int((~alone).sum())
            repeats = batch.filter(pa.array(~alone)).slice(0, PAIRS)
            self.repeats = (self.repeats + repeats.to_pylist())[:PAIRS]
        alone &= places < OF_ONE
        numbers = self.sums["for the sheet"] + np.cumsum(alone) - 1
        self.sums["for the sheet"] += int(alone.sum())
        taken = np.flatnonzero(alone & (numbers % self.stride == 0))
        while len(self.sheet) + len(taken) > 4 * SHEET:
            self.stride, self.sheet = 2 * self.stride, self.sheet[::2]
            taken = np.flatnonzero(alone & (numbers % self.stride == 0))
        self.sheet += batch.take(pa.array(taken)).to_pylist()


@dataclass
class RejectSums:
    """Counts, and of each reason those rows that draw the lowest numbers."""

    sources: Counter[str] = field(default_factory=Counter)
    spans: Counter[str] = field(default_factory=Counter)
    drawn: dict[str, list[tuple[float, Row]]] = field(default_factory=dict)
    draws: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def add(self, batch: pa.RecordBatch) -> None:
        """The next rows."""
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
            held = sorted([*self.drawn.get(reason, []), *new], key=lambda drawn: drawn[0])
            self.drawn[reason] = held[:EXAMPLES]

    def listed(self) -> tuple[Rejects, ...]:
        """The reason with the most first."""
        reasons = sorted(self.sources | self.spans, key=lambda r: (-self.sources[r] - self.spans[r], r))
        return tuple(
            Rejects(reason, self.sources[reason], self.spans[reason], self._examples(reason)) for reason in reasons
        )

    def _examples(self, reason: str) -> tuple[Reject, ...]:
        rows = (row for _, row in self.drawn[reason])
        found = [Reject(r["source"], r["span_start_s"], r["span_end_s"], r["detail"]) for r in rows]
        return tuple(sorted(found, key=lambda r: (r.source, r.start_s or 0.0)))


def numbers_of(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """A column as float64; null is NaN."""
    return batch.column(name).cast(pa.float64()).to_numpy(zero_copy_only=False)
