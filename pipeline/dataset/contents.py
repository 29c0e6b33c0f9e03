"""What a shard dataset holds: one pass over index.parquet and rejects.parquet, for the report and for `inspect`.

Memory is flat: rows pass through in batches, and what is held grows with what differs (sizes, rates, labels), not
with the number of clips. A source's clips lie side by side in the index, so different sources are counted by
where the url changes; what a source was (bytes, seconds, codec) counts once for each. Where clips repeat others, a
second pass looks up the few pairs that are shown. Nothing here judges the dataset: that is `reelmae verify`.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reelmae.pipeline import schema
from reelmae.pipeline.dataset.sums import (
    SCORES,
    SHEET,
    ClipSums,
    Count,
    Rejects,
    RejectSums,
    Row,
    batches,
)
from reelmae.pipeline.errors import DatasetError, InputError
from reelmae.pipeline.ingest.config import PRESETS, ShardConfig
from reelmae.pipeline.ingest.plan import parts
from reelmae.pipeline.storage.store import Store

FEW = 5  # labels with the most and with the fewest clips
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
    sheet: tuple[Row, ...]  # index rows, spread over the clips that repeat no other, few of one source


def gather(store: Store) -> DatasetFacts:
    """Everything, of a finished dataset. InputError where there is none, DatasetError where a file is damaged."""
    about = read_about(store)
    clips, rejects = ClipSums(about.get("columns") or {}), RejectSums()
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
    done = {int(p.stem) for p in names if p.suffix == ".parquet" and p.stem.isdigit()} & set(range(plan.tasks))
    return Job(False, plan.tasks, len(done), sources, parts.sources_in(store, plan, done))


def _facts(store: Store, about: Row, clips: ClipSums, rejects: RejectSums) -> DatasetFacts:
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
        columns=tuple(Column(n, kind, clips.sums[f"column {n}"]) for n, kind in (about.get("columns") or {}).items()),
        changed=changed(config),
        sheet=tuple(clips.sheet[i] for i in spread(len(clips.sheet), SHEET)),
    )


def _ordered(counts: Counter[Any] | None, form: str = "{}") -> tuple[Count, ...]:
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


def _histogram(name: str, clips: ClipSums, config: Row, rejects: tuple[Rejects, ...]) -> Histogram:
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
