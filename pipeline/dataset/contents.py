"""What a shard dataset holds, counted in one pass over index.parquet and rejects.parquet.

`facts` feeds the report and `reelmae inspect`. It does not check the dataset: `verify` does.

Memory does not grow with the number of clips. Rows pass through in batches; what is held grows with the number of
different values (sizes, rates, labels). The clips of one source are neighbours in the index, so a new source begins
where the url changes; facts about a source (bytes, seconds, codec) count once for each. Where clips repeat others,
a second pass looks up the few pairs that are shown.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reelmae.pipeline import schema
from reelmae.pipeline.dataset.sums import SCORES, SHEET_CLIPS, ClipSums, Count, RejectGroup, RejectSums, batches
from reelmae.pipeline.dataset.tables import Row
from reelmae.pipeline.errors import DatasetError, InputError
from reelmae.pipeline.ingest.config import PRESETS, ShardConfig
from reelmae.pipeline.ingest.plan import parts
from reelmae.pipeline.ingest.shards.commits import committed_tasks
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.checked import read_agreed
from reelmae.pipeline.storage.store import Store

FEW = 5  # labels with the most and with the fewest clips


@dataclass(frozen=True)
class JobState:
    """How far the sharding job at a DST is. A task is done when it has a commit."""

    finished: bool
    tasks: int
    tasks_done: int
    sources: int
    sources_done: int


@dataclass(frozen=True)
class Repeat:
    """A clip that repeats an earlier one."""

    key: str
    source: str
    start_s: float
    first_key: str
    first_source: str
    first_start_s: float
    exact: bool
    """Whether the two are the same byte for byte; else they look the same."""


@dataclass(frozen=True)
class Histogram:
    """A screening score of all clips in the index."""

    name: str
    edges: tuple[float, ...]
    """Bin i is [edges[i], edges[i + 1]). The last bin also holds all values above it."""
    counts: tuple[int, ...]
    setting: str
    """The setting that rejects by this score, such as min_motion."""
    reason: str
    threshold: float
    """The setting's value in this dataset; 0 is off."""
    sources: int
    """Sources that were rejected for it."""
    spans: int
    """Spans that were rejected for it."""
    common: float
    """The setting's value in the preset uncurated."""
    beyond_common: int
    """Clips of this dataset that `common` would reject."""

    @property
    def unit(self) -> str:
        """Unit of the edges."""
        return SCORES[self.name].unit

    @property
    def at_most(self) -> bool:
        """Whether the threshold is an upper bound."""
        return SCORES[self.name].at_most


@dataclass(frozen=True)
class Durations:
    """Durations of the clips in seconds, to a tenth."""

    shortest: float
    median: float
    mean: float
    longest: float
    tenths: dict[int, int]
    """Duration in tenths of a second → clips."""


@dataclass(frozen=True)
class Labels:
    """The labels, and how many clips have them."""

    labels: int
    """Labels of the plan."""
    without_clips: int
    """Labels that no clip has."""
    clips_unlabelled: int
    largest: tuple[Count, ...]
    """Labels with the most clips."""
    smallest: tuple[Count, ...]
    """Labels with the fewest clips."""


@dataclass(frozen=True)
class Column:
    """A column of the user's manifest."""

    name: str
    type: str
    filled: int
    """Clips in which it is not null."""


@dataclass(frozen=True)
class DatasetFacts:
    """What a finished shard dataset holds. Counts are sorted, the largest first."""

    url: str
    about: Row
    """dataset.json."""
    job: JobState | None
    """None: the dataset has no plan."""
    sources: int
    """All sources, rejected ones too. The counts below are of the sources that gave clips."""
    sources_kept: int
    """Sources that gave clips."""
    sources_rejected: int
    spans_rejected: int
    clips: int
    seconds_in: float
    """Seconds of the sources whose length is known."""
    sources_timed: int
    """Sources whose length is known."""
    seconds_out: float
    bytes_in: int
    bytes_out: int
    shards: int
    largest: Count
    """The source with the most clips."""
    durations: Durations | None
    """None: there is no clip."""
    fps_in: tuple[Count, ...]
    fps_out: tuple[Count, ...]
    size_in: tuple[Count, ...]
    size_out: tuple[Count, ...]
    codec_in: tuple[Count, ...]
    codec_out: tuple[Count, ...]
    encoders: tuple[Count, ...]
    colours: tuple[Count, ...]
    labels: Labels
    rejects: tuple[RejectGroup, ...]
    duplicates: int
    """Clips that repeat an earlier one."""
    repeats: tuple[Repeat, ...]
    """The first few duplicates."""
    scores: tuple[Histogram, ...]
    columns: tuple[Column, ...]
    changed: tuple[tuple[str, Any, Any], ...]
    """Settings that differ from the preset: name, value here, value of the preset."""
    sheet: tuple[Row, ...]
    """Index rows for a contact sheet: spread over the dataset, no duplicates, few clips of one source."""


def facts(dataset: str | Store, *, access: Access | None = None) -> DatasetFacts:
    """What the finished shard dataset at a folder, fsspec URL or Store holds.

    Raises InputError where there is no finished dataset, or one of a format that this version does not know;
    DatasetError where one of its files is damaged.
    """
    store = dataset if isinstance(dataset, Store) else Store(dataset, access)
    about = _read_about(store)
    clips, rejects = ClipSums(about.get("columns") or {}), RejectSums()
    for batch in batches(store, schema.INDEX, [*schema.clip_columns(1).names, *(about.get("columns") or {})]):
        clips.add(batch)
    for batch in batches(store, schema.REJECTS_FILE, schema.REJECTS.names):
        rejects.add(batch)
    return _collect(store, about, clips, rejects)


def _read_about(store: Store) -> Row:
    if not store.exists(schema.DATASET_JSON):
        raise InputError(f"{store.url()}: no finished shard dataset ({schema.DATASET_JSON} is missing)")
    about = _read_object(store, schema.DATASET_JSON)
    if words := schema.format_fault(about.get("format")):
        raise InputError(f"{store.url(schema.DATASET_JSON)}: {words}")
    return about


def _read_object(store: Store, name: str) -> Row:
    try:
        value = json.loads(read_agreed(store, name))
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
    except ValueError as e:
        raise DatasetError(
            f"{store.url(name)}: is damaged, no JSON ({e}); remove it and run reelmae shard again"
        ) from e
    return value


def job_state(store: Store) -> JobState | None:
    """How far the job is; None where there is no plan."""
    plan = parts.read_plan(store)
    if plan is None:
        return None
    sources = sum(part.sources for part in plan.parts)
    if parts.is_finished(store, plan):
        return JobState(True, plan.tasks, plan.tasks, sources, sources)
    done = committed_tasks(store, plan.format, lambda foreign: None) & set(range(plan.tasks))
    return JobState(False, plan.tasks, len(done), sources, parts.sources_in(store, plan, done))


def _collect(store: Store, about: Row, clips: ClipSums, rejects: RejectSums) -> DatasetFacts:
    config, groups = about.get("config") or {}, rejects.groups()
    columns = (about.get("columns") or {}).items()
    return DatasetFacts(
        url=store.url(),
        about=about,
        job=job_state(store),
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
        fps_in=_sort_counts(clips.counts.get("fps_in"), "{:g}"),
        fps_out=_sort_counts(clips.counts.get("fps_out"), "{:g}"),
        size_in=_sort_counts(clips.counts.get("size_in")),
        size_out=_sort_counts(clips.counts.get("size_out")),
        codec_in=_sort_counts(clips.counts.get("codec_in")),
        codec_out=_sort_counts(clips.counts.get("codec")),
        encoders=_sort_counts(clips.counts.get("encoder")),
        colours=_sort_counts(clips.counts.get("colour")),
        labels=_labels(store, clips.counts.get("label_id", Counter())),
        rejects=groups,
        duplicates=clips.sums["duplicates"],
        repeats=_repeats(store, clips.repeats),
        scores=tuple(_histogram(name, clips, config, groups) for name in SCORES),
        columns=tuple(Column(name, kind, clips.sums[f"column {name}"]) for name, kind in columns),
        changed=preset_differences(config),
        sheet=tuple(clips.sheet[i] for i in spread(len(clips.sheet), SHEET_CLIPS)),
    )


def _sort_counts(counts: Counter[Any] | None, form: str = "{}") -> tuple[Count, ...]:
    pairs = sorted((counts or {}).items(), key=lambda kv: (-kv[1], str(kv[0])))
    return tuple(("unknown" if v is None or v != v else form.format(v), n) for v, n in pairs)


def _durations(clips: ClipSums) -> Durations | None:
    tenths = dict(sorted(clips.counts.get("tenths", Counter()).items()))
    if not tenths:
        return None
    values, below = list(tenths), np.cumsum(list(tenths.values()))
    median = values[int(np.searchsorted(below, (clips.rows + 1) // 2))]
    mean = round(clips.seconds / clips.rows, 3)
    return Durations(values[0] / 10, median / 10, mean, values[-1] / 10, tenths)


def _labels(store: Store, counts: Counter[int]) -> Labels:
    known = _read_object(store, schema.LABELS) if store.exists(schema.LABELS) else {}
    named = sorted(((name, counts[i]) for name, i in known.items() if counts[i]), key=lambda c: (-c[1], c[0]))
    smallest = named[max(FEW, len(named) - FEW) :]
    return Labels(len(known), len(known) - len(named), counts[-1], tuple(named[:FEW]), tuple(smallest))


def _repeats(store: Store, rows: list[Row]) -> tuple[Repeat, ...]:
    """The pairs of these duplicates and the clips that they repeat."""
    wanted = pa.array({row["duplicate_of"] for row in rows}, pa.string())
    first: dict[str, Row] = {}
    if rows:
        for batch in batches(store, schema.INDEX, ["key", "source", "span_start_s", "sha256"]):
            found = batch.filter(pc.is_in(batch.column("key"), value_set=wanted))
            first |= {row["key"]: row for row in found.to_pylist()}
            if len(first) == len(wanted):
                break
    return tuple(_repeat(row, first[row["duplicate_of"]]) for row in rows if row["duplicate_of"] in first)


def _repeat(row: Row, first: Row) -> Repeat:
    return Repeat(
        key=row["key"],
        source=row["source"],
        start_s=row["span_start_s"],
        first_key=first["key"],
        first_source=first["source"],
        first_start_s=first["span_start_s"],
        exact=row["sha256"] == first["sha256"],
    )


def _histogram(name: str, clips: ClipSums, config: Row, groups: tuple[RejectGroup, ...]) -> Histogram:
    score = SCORES[name]
    counts = clips.bins.get(name, np.zeros(score.bins, np.int64))
    rejects = next((g for g in groups if g.reason == score.reason), RejectGroup(score.reason, 0, 0, ()))
    return Histogram(
        name=name,
        edges=tuple(round(i * score.bin_width, 6) for i in range(score.bins + 1)),
        counts=tuple(counts.tolist()),
        setting=score.setting,
        reason=score.reason,
        threshold=float(config.get(score.setting) or 0),
        sources=rejects.sources,
        spans=rejects.spans,
        common=float(getattr(PRESETS["uncurated"], score.setting)),
        beyond_common=clips.sums[f"beyond {name}"],
    )


def preset_differences(config: Row) -> tuple[tuple[str, Any, Any], ...]:
    """(name, value, the preset's value) of settings that differ from the preset, or of a preset that is not the default."""
    preset = config.get("preset", "kinetics")
    if preset not in PRESETS:
        return ()
    usual = ShardConfig(preset=preset).resolve().model_dump(mode="json") | {"preset": ShardConfig().preset}
    return tuple((k, v, usual[k]) for k, v in config.items() if k in usual and v != usual[k])


def spread(n: int, wanted: int) -> list[int]:
    """`wanted` numbers out of 0 … n - 1, evenly spread; all of them where n is smaller."""
    return np.unique(np.linspace(0, n - 1, min(wanted, n)).round().astype(int)).tolist() if n else []


def duration_bins(durations: Durations, most: int = 24) -> list[tuple[float, int]]:
    """(middle of a bin in seconds, clips), at most about `most` bins of one round width.

    99 of 100 clips fit into the bins before the last; the last bin holds all longer clips, so that one long clip
    does not flatten the others.
    """
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
