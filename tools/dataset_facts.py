"""What a shard dataset holds: one pass over index.parquet and rejects.parquet, for the report and for `inspect`.

Memory is flat: rows pass through in batches, and what is held grows with what differs (sizes, rates, labels), not
with the number of clips. A source's clips lie side by side in the index, so different sources are counted by
where the url changes; what a source was (bytes, seconds, codec) counts once for each. Where clips repeat others, a
second pass looks up the few pairs that are shown. Nothing here judges the dataset: that is `reelmae verify`.
"""

from __future__ import annotations

import json
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

from reelmae.pipeline import schema
from reelmae.pipeline.errors import DatasetError, InputError
from reelmae.pipeline.ingest import parts
from reelmae.pipeline.ingest.config import PRESETS, ShardConfig
from reelmae.pipeline.storage import Store

ROWS = 20_000  # of a batch
EXAMPLES = 20  # rejects of a reason that are held
PAIRS = 6  # repeats that are told of
FEW = 5  # labels with the most and with the fewest clips
SHEET = 25  # clips of the contact sheet
Row = dict[str, Any]
Count = tuple[str, int]

# score → width of a bin, bins (the last takes all above), setting, the reason that it gives, whether it is an upper bound
SCORES: dict[str, tuple[float, int, str, str, bool]] = {
    "motion": (0.5, 40, "min_motion", "static", False),
    "luma": (8, 32, "min_luma", "dark", False),
    "contrast": (4, 32, "min_contrast", "blank", False),
    "border": (0.05, 20, "max_border", "borders", True),
}
UNITS = {
    "motion": "levels of 255",
    "luma": "levels of 255",
    "contrast": "levels of 255",
    "border": "share of the picture",
}


@dataclass(frozen=True)
class Job:
    """How far the job at a DST is: tasks and sources of its plan, and those that have a commit."""

    finished: bool
    tasks: int
    tasks_done: int
    sources: int
    sources_done: int


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


@dataclass(frozen=True)
class Repeat:
    """A clip that repeats an earlier one; `exact`: byte for byte, else by look."""

    key: str
    source: str
    start_s: float
    first_key: str
    first_source: str
    first_start_s: float
    exact: bool


@dataclass(frozen=True)
class Histogram:
    """A screening score of all clips in the index. Bin i is [edges[i], edges[i + 1]), the last with all above.

    `threshold` is the one in force, 0 where it is off; `sources` and `spans` were rejected for it. `common` is that
    of the preset uncurated, under (a border: over) which `beyond_common` of the clips lie.
    """

    name: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    setting: str
    reason: str
    threshold: float
    sources: int
    spans: int
    common: float
    beyond_common: int

    @property
    def at_most(self) -> bool:
        """Whether the threshold is an upper bound."""
        return SCORES[self.name][4]


@dataclass(frozen=True)
class Durations:
    """Of clips, in seconds, to a tenth; `tenths`: tenths of a second → clips."""

    shortest: float
    median: float
    mean: float
    longest: float
    tenths: dict[int, int]


@dataclass(frozen=True)
class Labels:
    """Labels of the plan, those no clip has, clips without one, and the labels with the most and the fewest clips."""

    labels: int
    without_clips: int
    clips_unlabelled: int
    largest: tuple[Count, ...]
    smallest: tuple[Count, ...]


@dataclass(frozen=True)
class Column:
    """A manifest's own column: its type, and the clips in which it is not null."""

    name: str
    type: str
    filled: int


@dataclass(frozen=True)
class DatasetFacts:
    """All there is to tell. Counts are ordered, the largest first. Sources are those that gave clips, but for
    `sources`; `seconds_in` and `bytes_in` are theirs, as far as known (`sources_timed` of them)."""

    url: str
    about: Row  # dataset.json
    job: Job | None
    sources: int
    sources_kept: int
    sources_rejected: int
    spans_rejected: int
    clips: int
    seconds_in: float
    sources_timed: int
    seconds_out: float
    bytes_in: int
    bytes_out: int
    shards: int
    largest: Count  # the source with the most clips
    durations: Durations | None
    fps_in: tuple[Count, ...]
    fps_out: tuple[Count, ...]
    size_in: tuple[Count, ...]
    size_out: tuple[Count, ...]
    codec_in: tuple[Count, ...]
    codec_out: tuple[Count, ...]
    encoders: tuple[Count, ...]
    colours: tuple[Count, ...]
    labels: Labels
    rejects: tuple[Rejects, ...]
    duplicates: int
    repeats: tuple[Repeat, ...]
    scores: tuple[Histogram, ...]
    columns: tuple[Column, ...]
    changed: tuple[tuple[str, Any, Any], ...]  # setting, its value, what the preset has
    sheet: tuple[Row, ...]  # index rows, spread evenly over the clips that repeat no other


def gather(store: Store) -> DatasetFacts:
    """Everything, of a finished dataset. InputError where there is none, DatasetError where a file is damaged."""
    about = read_about(store)
    clips, rejects = _Clips(about.get("columns") or {}), _Rejects()
    for batch in batches(store, schema.INDEX, [*schema.CLIPS.names, *(about.get("columns") or {})]):
        clips.add(batch)
    for batch in batches(store, schema.REJECTS_FILE, schema.REJECTS.names):
        rejects.add(batch)
    return _facts(store, about, clips, rejects)


def read_about(store: Store) -> Row:
    """dataset.json."""
    if not store.exists(schema.DATASET_JSON):
        raise InputError(f"{store.url()}: no finished shard dataset ({schema.DATASET_JSON} is missing)")
    return _object(store, schema.DATASET_JSON)


def _object(store: Store, name: str) -> Row:
    try:
        value = json.loads(store.read_bytes(name))
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
    except ValueError as e:
        raise DatasetError(
            f"{store.url(name)}: is damaged, no JSON ({e}); remove it and run reelmae shard again"
        ) from e
    return value


def read_job(store: Store) -> Job | None:
    """How far the job is; None where there is no plan."""
    plan = parts.read_plan(store)
    if plan is None:
        return None
    sources = sum(part.sources for part in plan.parts)
    if parts.finished(store, plan):
        return Job(True, plan.tasks, plan.tasks, sources, sources)
    names = (Path(entry.path) for entry in store.list("commits"))
    done = {int(p.stem) for p in names if p.suffix == ".parquet" and p.stem.isdigit()} & set(
        range(plan.tasks)
    )
    return Job(False, plan.tasks, len(done), sources, parts.sources_in(store, plan, done))


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


# --- the pass --------------------------------------------------------------------------------------------------


@dataclass
class _Clips:
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
        fps, frames = _numbers(batch, "fps"), _numbers(batch, "frames")
        seconds = np.divide(frames, fps, out=np.zeros_like(frames), where=fps > 0)
        self.rows += len(batch)
        self.seconds += float(seconds.sum())
        self._count("tenths", np.round(seconds * 10).astype(np.int64))
        self._count("fps_out", np.round(fps, 2))
        self._count("label_id", _numbers(batch, "label_id").astype(np.int64))
        for name in ("codec", "encoder", "colour"):
            self._count(name, batch.column(name))
        self._pairs("size_out", batch, "width", "height", "×")
        for name in self.columns:
            self.sums[f"column {name}"] += len(batch) - batch.column(name).null_count
        self._score(batch)
        self._sources(batch)
        self._single(batch)

    def _count(self, name: str, values: Any) -> None:
        known = self.counts.setdefault(name, Counter())
        for pair in pc.value_counts(values if isinstance(values, pa.Array) else pa.array(values)):
            known[pair["values"].as_py()] += pair["counts"].as_py()

    def _pairs(self, name: str, batch: pa.RecordBatch, first: str, second: str, between: str) -> None:
        texts = [pc.cast(batch.column(c), pa.string()) for c in (first, second)]
        self._count(name, pc.binary_join_element_wise(*texts, between))

    def _score(self, batch: pa.RecordBatch) -> None:
        for name, (width, bins, setting, _, at_most) in SCORES.items():
            values = _numbers(batch, name)
            values = values[~np.isnan(values)]
            where = np.clip(values // width, 0, bins - 1).astype(np.int64)
            self.bins[name] = self.bins.get(name, np.zeros(bins, np.int64)) + np.bincount(
                where, minlength=bins
            )
            common = getattr(PRESETS["uncurated"], setting)
            beyond = values > common if at_most else values < common
            self.sums[f"beyond {name}"] += int(beyond.sum())

    def _sources(self, batch: pa.RecordBatch) -> None:
        """What is of the source, of the first row of each."""
        urls = batch.column("source")
        changes = np.ones(len(urls), bool)
        changes[0] = urls[0].as_py() != self.last
        changes[1:] = pc.not_equal(urls.slice(1), urls.slice(0, len(urls) - 1)).to_numpy(zero_copy_only=False)
        self._longest(urls, np.flatnonzero(changes))
        self.last = urls[-1].as_py()
        first = batch.filter(pa.array(changes))
        seconds = _numbers(first, "source_seconds")
        known = np.isfinite(seconds) & (seconds > 0)
        self.seconds_in += float(seconds[known].sum())
        self.sums["timed"] += int(known.sum())
        self.sums["sources"] += len(first)
        self.sums["bytes_in"] += int(np.nansum(_numbers(first, "source_bytes")))
        self._count("fps_in", np.round(_numbers(first, "source_fps"), 2))
        self._pairs("size_in", first, "source_width", "source_height", "×")
        self._pairs("codec_in", first, "source_codec", "source_container", " in ")

    def _longest(self, urls: pa.Array, starts: np.ndarray) -> None:
        """The source with the most clips; its first ones may lie in the batch before."""
        bounds = (
            [0, *starts.tolist(), len(urls)]
            if not len(starts) or starts[0]
            else [*starts.tolist(), len(urls)]
        )
        lengths = np.diff(bounds)
        if not len(starts) or starts[0]:  # the first rows go on with the source before
            lengths[0] += self.run
        self.run = int(lengths[-1])
        most = int(lengths.argmax())
        if lengths[most] > self.largest[1]:
            self.largest = (urls[bounds[most]].as_py(), int(lengths[most]))

    def _single(self, batch: pa.RecordBatch) -> None:
        """Repeats, and clips for the sheet."""
        alone = batch.column("duplicate_of").is_null().to_numpy(zero_copy_only=False)
        if not alone.all():
            self.sums["duplicates"] += int((~alone).sum())
            repeats = batch.filter(pa.array(~alone)).slice(0, PAIRS)
            self.repeats = (self.repeats + repeats.to_pylist())[:PAIRS]
        numbers = self.sums["alone"] + np.cumsum(alone) - 1
        self.sums["alone"] += int(alone.sum())
        taken = np.flatnonzero(alone & (numbers % self.stride == 0))
        while len(self.sheet) + len(taken) > 4 * SHEET:
            self.stride, self.sheet = 2 * self.stride, self.sheet[::2]
            taken = np.flatnonzero(alone & (numbers % self.stride == 0))
        self.sheet += batch.take(pa.array(taken)).to_pylist()


@dataclass
class _Rejects:
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
            Rejects(reason, self.sources[reason], self.spans[reason], self._examples(reason))
            for reason in reasons
        )

    def _examples(self, reason: str) -> tuple[Reject, ...]:
        rows = (row for _, row in self.drawn[reason])
        found = [Reject(r["source"], r["span_start_s"], r["span_end_s"], r["detail"]) for r in rows]
        return tuple(sorted(found, key=lambda r: (r.source, r.start_s or 0.0)))


def _numbers(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """A column as float64; null is NaN."""
    return batch.column(name).cast(pa.float64()).to_numpy(zero_copy_only=False)


# --- the sums --------------------------------------------------------------------------------------------------


def _facts(store: Store, about: Row, clips: _Clips, rejects: _Rejects) -> DatasetFacts:
    config, listed = about.get("config") or {}, rejects.listed()
    return DatasetFacts(
        url=store.url(),
        about=about,
        job=read_job(store),
        sources=clips.sums["sources"] + rejects.sources.total(),
        sources_kept=clips.sums["sources"],
        sources_rejected=rejects.sources.total(),
        spans_rejected=rejects.spans.total(),
        clips=clips.rows,
        seconds_in=round(clips.seconds_in, 3),
        sources_timed=clips.sums["timed"],
        seconds_out=round(clips.seconds, 3),
        bytes_in=clips.sums["bytes_in"],
        bytes_out=int(about.get("bytes", 0)),
        shards=int(about.get("shards", 0)),
        largest=clips.largest,
        durations=_durations(clips),
        fps_in=_ordered(clips.counts.get("fps_in"), "{:g}"),
        fps_out=_ordered(clips.counts.get("fps_out"), "{:g}"),
        size_in=_ordered(clips.counts.get("size_in")),
        size_out=_ordered(clips.counts.get("size_out")),
        codec_in=_ordered(clips.counts.get("codec_in")),
        codec_out=_ordered(clips.counts.get("codec")),
        encoders=_ordered(clips.counts.get("encoder")),
        colours=_ordered(clips.counts.get("colour")),
        labels=_labels(store, clips.counts.get("label_id", Counter())),
        rejects=listed,
        duplicates=clips.sums["duplicates"],
        repeats=_repeats(store, clips.repeats),
        scores=tuple(_histogram(name, clips, config, listed) for name in SCORES),
        columns=tuple(
            Column(n, kind, clips.sums[f"column {n}"]) for n, kind in (about.get("columns") or {}).items()
        ),
        changed=changed(config),
        sheet=tuple(clips.sheet[i] for i in spread(len(clips.sheet), SHEET)),
    )


def _ordered(counts: Counter[Any] | None, form: str = "{}") -> tuple[Count, ...]:
    pairs = sorted((counts or {}).items(), key=lambda kv: (-kv[1], str(kv[0])))
    return tuple(("unknown" if v is None or v != v else form.format(v), n) for v, n in pairs)


def _durations(clips: _Clips) -> Durations | None:
    tenths = dict(sorted(clips.counts.get("tenths", Counter()).items()))
    if not tenths:
        return None
    values, below = list(tenths), np.cumsum(list(tenths.values()))
    median = values[int(np.searchsorted(below, (clips.rows + 1) // 2))]
    mean = round(clips.seconds / clips.rows, 3)
    return Durations(values[0] / 10, median / 10, mean, values[-1] / 10, tenths)


def _labels(store: Store, counts: Counter[int]) -> Labels:
    known = _object(store, schema.LABELS) if store.exists(schema.LABELS) else {}
    named = sorted(((name, counts[i]) for name, i in known.items() if counts[i]), key=lambda c: (-c[1], c[0]))
    smallest = named[max(FEW, len(named) - FEW) :]
    return Labels(len(known), len(known) - len(named), counts[-1], tuple(named[:FEW]), tuple(smallest))


def _repeats(store: Store, rows: list[Row]) -> tuple[Repeat, ...]:
    """The pairs, with what the first of each is."""
    wanted = pa.array({row["duplicate_of"] for row in rows}, pa.string())
    first: dict[str, Row] = {}
    if rows:
        for batch in batches(store, schema.INDEX, ["key", "source", "span_start_s", "sha256"]):
            found = batch.filter(pc.is_in(batch.column("key"), value_set=wanted))
            first |= {row["key"]: row for row in found.to_pylist()}
            if len(first) == len(wanted):
                break
    pairs = ((row, first[row["duplicate_of"]]) for row in rows if row["duplicate_of"] in first)
    return tuple(
        Repeat(
            row["key"], row["source"], row["span_start_s"], of["key"], of["source"], of["span_start_s"],
            row["sha256"] == of["sha256"],
        )
        for row, of in pairs
    )  # fmt: skip


def _histogram(name: str, clips: _Clips, config: Row, rejects: tuple[Rejects, ...]) -> Histogram:
    width, bins, setting, reason, _ = SCORES[name]
    counts = clips.bins.get(name, np.zeros(bins, np.int64))
    gone = next((r for r in rejects if r.reason == reason), Rejects(reason, 0, 0, ()))
    return Histogram(
        name=name,
        edges=tuple(round(i * width, 6) for i in range(bins + 1)),
        counts=tuple(counts.tolist()),
        setting=setting,
        reason=reason,
        threshold=float(config.get(setting) or 0),
        sources=gone.sources,
        spans=gone.spans,
        common=float(getattr(PRESETS["uncurated"], setting)),
        beyond_common=clips.sums[f"beyond {name}"],
    )


def changed(config: Row) -> tuple[tuple[str, Any, Any], ...]:
    """Settings that are not what their preset has, and the preset where it is not the default."""
    preset = config.get("preset", "kinetics")
    if preset not in PRESETS:
        return ()
    usual = ShardConfig(preset=preset).resolved().model_dump(mode="json") | {"preset": ShardConfig().preset}
    return tuple((k, v, usual[k]) for k, v in config.items() if k in usual and v != usual[k])


def spread(n: int, wanted: int) -> list[int]:
    """`wanted` of 0 … n - 1, evenly spread; all where there are no more."""
    return np.unique(np.linspace(0, n - 1, min(wanted, n)).round().astype(int)).tolist() if n else []


def duration_bins(durations: Durations, most: int = 24) -> list[tuple[float, int]]:
    """(middle of a bin in seconds, clips): bins of one round width; the last holds all that are longer than what
    99 of 100 clips reach, so that one long clip does not flatten the others."""
    tenths = durations.tenths
    below = np.cumsum(list(tenths.values()))
    reach = list(tenths)[int(np.searchsorted(below, 0.99 * below[-1]))] / 10
    widths = (w * 10.0**e for e in range(-1, 9) for w in (1, 2, 5))
    width = next(w for w in widths if reach / w <= most)
    last = int(reach / width + 0.5)
    first = min(last, int(durations.shortest / width + 0.5))
    bins = Counter(dict.fromkeys(range(first, last + 1), 0))
    for tenth, n in tenths.items():
        bins[min(last, int(tenth / 10 / width + 0.5))] += n
    return [(round(i * width, 6), bins[i]) for i in sorted(bins)]
