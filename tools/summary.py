"""`reelmae inspect`: what a shard dataset holds, on a terminal, as JSON, or line by line.

The facts are those of the report (dataset_facts.py). An unfinished dataset is told of with how far its job is. Names
and decoders' words are printed on one line with nothing in them that steers a terminal; in lines of fields a
backslash is doubled, so that every name can be told. The lists of rejects and of sources stream: memory is flat.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table
from rich.text import Text

from reelmae.pipeline import schema
from reelmae.pipeline.dataset import contents
from reelmae.pipeline.dataset.contents import (
    UNITS,
    Count,
    DatasetFacts,
    Histogram,
    Job,
    Rejects,
    duration_bins,
)
from reelmae.pipeline.errors import InputError
from reelmae.pipeline.storage.store import Store
from reelmae.tools.show import MEANING, bytes_text, printable, seconds_text

WIDTH = 100
BAR = 34  # columns of the longest bar
SHOWN = 8  # values of a distribution
ROWS = 16  # of a histogram
EXAMPLES = 2  # rejects of a reason
DETAIL = 110  # characters of the decoder's words
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def inspect(
    dst: str, *, rejects: Sequence[str] | None = None, source: str | None = None, as_json: bool = False
) -> dict[str, Any]:
    """Print what there is at `dst`; with `as_json` print nothing and return it.

    rejects: list what was rejected instead, for these reasons (none: any). source: list what became of the sources
    whose url holds this text. InputError where there is no dataset, or it is not finished and a list is asked for.
    """
    store = Store(dst)
    ready = store.exists(schema.DATASET_JSON)
    if ready and (rejects is not None or source is not None):
        return _lists(store, rejects, source, as_json)
    facts = contents.gather(store) if ready else None
    job = contents.read_job(store) if facts is None else facts.job
    if facts is None and job is None:
        raise InputError(f"{dst}: no shard dataset (neither {schema.DATASET_JSON} nor {schema.PLAN_JSON})")
    if facts is None and (rejects is not None or source is not None):
        raise InputError(f"{dst}: {_unfinished(job)}; its lists are there when it has ended")
    finished = facts is not None and (job is None or job.finished)
    if as_json:
        told = {"url": store.url(), "job": asdict(job) if job else None} if facts is None else as_dict(facts)
        return {"finished": finished} | told
    console = Console(highlight=False, markup=False)
    console.width = min(WIDTH, console.width) if console.is_terminal else WIDTH
    if not finished:
        before = "" if facts is None else "; what follows was there before"
        console.print(Text(f"{printable(store.url())}: {_unfinished(job)}{before}\n", style="yellow"))
    for title, table in tables(facts) if facts is not None else ():
        console.print(Text(printable(title), style="bold"))
        console.print(table)
        console.print()
    return {}


def as_dict(facts: DatasetFacts) -> dict[str, Any]:
    """All facts as JSON takes them; the contact sheet's rows are left out."""
    return {k: v for k, v in asdict(replace(facts, sheet=())).items() if k != "sheet"}


def _unfinished(job: Job | None) -> str:
    if job is None:
        return "not finished"
    return (
        f"not finished: {job.tasks_done:,} of {job.tasks:,} tasks and {job.sources_done:,} of {job.sources:,} sources "
        "are done; run reelmae shard again to go on"
    )


# --- lines -----------------------------------------------------------------------------------------------------


def _lists(store: Store, reasons: Sequence[str] | None, source: str | None, as_json: bool) -> dict[str, Any]:
    unknown = [r for r in reasons or () if r not in list(schema.Reason)]
    if unknown:
        raise InputError(
            f"--rejects {unknown[0]}: is no reason; take one of {', '.join(r.value for r in schema.Reason)}"
        )
    bad = reject_rows(store, reasons or (), source) if reasons is not None or source is not None else iter(())
    good = clip_rows(store, source) if source is not None and reasons is None else iter(())
    if as_json:
        found = {"clips": list(good), "rejects": list(bad)}
        return found if source is not None and reasons is None else {"rejects": found["rejects"]}
    seen = _write(
        [
            (("clip", r["source"], r["span_start_s"], r["span_end_s"], _kept(r)) for r in good),
            ((r["reason"], r["source"], r["span_start_s"], r["span_end_s"], r["detail"]) for r in bad),
        ]
    )
    if not seen and source is not None:
        raise InputError(f"--source {source}: no clip and no reject at {store.url()} is of such a source")
    return {}


def reject_rows(store: Store, reasons: Sequence[str], source: str | None) -> Iterator[dict[str, Any]]:
    """Rows of rejects.parquet, of these reasons (none: any) and of sources whose url holds the text."""
    for batch in contents.batches(store, schema.REJECTS_FILE, schema.REJECTS.names):
        if reasons:
            batch = batch.filter(pc.is_in(batch.column("reason"), value_set=pa.array(reasons, pa.string())))
        yield from _of(batch, source).to_pylist()


def clip_rows(store: Store, source: str | None) -> Iterator[dict[str, Any]]:
    """Rows of index.parquet of sources whose url holds the text."""
    names = ["source", "span_start_s", "span_end_s", "key", "shard", "label", "duplicate_of"]
    for batch in contents.batches(store, schema.INDEX, names):
        yield from _of(batch, source).to_pylist()


def _of(batch: pa.RecordBatch, source: str | None) -> pa.RecordBatch:
    return batch if source is None else batch.filter(pc.match_substring(batch.column("source"), source))


def _kept(row: dict[str, Any]) -> str:
    repeats = f", repeats {row['duplicate_of']}" if row["duplicate_of"] else ""
    label = f", label {row['label']}" if row["label"] is not None else ""
    return f"{row['key']} in {row['shard']}{label}{repeats}"


def _write(groups: Iterable[Iterable[tuple[str, str, float | None, float | None, str]]]) -> int:
    """Lines of five fields on stdout; how many. Ends in silence where the reader has gone (`| head`)."""
    lines = 0
    try:
        for rows in groups:
            for kind, url, start, end, detail in rows:
                times = ["" if t is None else f"{t:g}" for t in (start, end)]
                print("\t".join((kind, _field(url), *times, _field(detail))))
                lines += 1
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails again at its end
    return lines


def _field(text: str) -> str:
    return printable(text.replace("\\", "\\\\"))


# --- tables ----------------------------------------------------------------------------------------------------


def tables(facts: DatasetFacts) -> Iterator[tuple[str, Table]]:
    """What is printed, part by part, each with its title."""
    yield facts.url, _totals(facts)
    if facts.durations is not None:
        d = facts.durations
        words = f"{_length(d.shortest)} to {_length(d.longest)}, median {_length(d.median)}, mean {_length(d.mean)}"
        yield f"Duration of clips: {words}", _bars([(f"{at:g} s", n) for at, n in duration_bins(d, ROWS)])
    for title, values in (
        ("Sources that gave clips, by codec and container", facts.codec_in),
        ("… by size, pixels as coded", facts.size_in),
        ("… by frames a second", facts.fps_in),
        ("Clips by codec", facts.codec_out),
        ("… by size, pixels", facts.size_out),
        ("… by frames a second", facts.fps_out),
        ("… by encoder", facts.encoders),
        ("… by colour rule", facts.colours),
    ):
        if values:
            shown = len(values) if len(values) <= SHOWN + 1 else SHOWN
            yield title, _bars(values[:shown], values[shown:])
    if facts.rejects:
        yield "Rejected; reelmae inspect DST --rejects lists all", _rejects(facts)
    if facts.duplicates:
        yield f"Clips that repeat another: {facts.duplicates:,}; the first of them", _repeats(facts)
    if facts.clips:
        yield from ((_title(h), _bars(_coarse(h))) for h in facts.scores)
    yield from _labels(facts)
    yield "How it was made", _how_made(facts)


def _totals(f: DatasetFacts) -> Table:
    table = _table("", "", plain=True)
    known = "" if f.sources_timed == f.sources_kept else f" (of {f.sources_timed:,} sources)"
    rows = {
        "sources": f"{f.sources:,}: {f.sources_kept:,} gave clips, {f.sources_rejected:,} rejected",
        "spans rejected": f"{f.spans_rejected:,}, of sources that gave other clips" if f.spans_rejected else "",
        "clips": f"{f.clips:,}"
        + (f", {f.duplicates:,} of them repeat others and are left out in training" if f.duplicates else ""),
        "video": f"{seconds_text(f.seconds_in)} in{known}, {seconds_text(f.seconds_out)} out",
        "bytes": f"{bytes_text(f.bytes_in)} in, {bytes_text(f.bytes_out)} out, in {f.shards:,} shards",
        "most clips of": f"{_short(f.largest[0], f)}: {f.largest[1]:,}" if f.clips else "",
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, Text(value))
    return table


def _rejects(f: DatasetFacts) -> Table:
    table = _table("reason", "sources", "spans", "for example")
    for r in f.rejects:
        table.add_row(Text(r.reason), _n(r.sources), _n(r.spans), _examples(r, f))
    return table


def _examples(r: Rejects, f: DatasetFacts) -> Text:
    text = Text(f"{MEANING.get(r.reason, '')}", style="dim")
    for example in r.examples[:EXAMPLES]:
        detail = printable(" ".join(example.detail.split()))
        span = "" if example.start_s is None else f" from {example.start_s:g} s"
        text.append(f"\n{_short(example.source, f)}{span}\n", style="not dim")
        text.append("  " + (detail if len(detail) <= DETAIL else detail[: DETAIL - 1] + "…"))
    return text


def _repeats(f: DatasetFacts) -> Table:
    table = _table("clip", "repeats", "")
    for r in f.repeats:
        table.add_row(
            Text(f"{_short(r.source, f)} at {r.start_s:g} s"),
            Text(f"{_short(r.first_source, f)} at {r.first_start_s:g} s"),
            "byte for byte" if r.exact else "by look",
        )
    return table


def _title(h: Histogram) -> str:
    side = "over" if h.at_most else "under"
    if not h.threshold:
        off = f"{h.setting} is off; {h.beyond_common:,} clips lie {side} {h.common:g} (preset uncurated)"
        return f"{h.name.capitalize()}, {UNITS[h.name]}; {off}"
    gone = f"rejected {side} it: {h.sources:,} sources, {h.spans:,} spans"
    return f"{h.name.capitalize()}, {UNITS[h.name]}; {h.setting} {h.threshold:g}, {gone}"


def _coarse(h: Histogram) -> list[Count]:
    """Bins joined to ROWS of them at most, up to the last that holds a clip; the one with the threshold is marked."""
    last = max((i for i, n in enumerate(h.counts) if n), default=0) + 1
    joined = -(-last // ROWS)
    found = []
    for i in range(0, last, joined):
        low, high = h.edges[i], h.edges[min(i + joined, len(h.counts))]
        open_end = i + joined >= len(h.counts) and h.name == "motion"
        mark = f" ← {h.setting}" if h.threshold and low <= h.threshold < high else ""
        found.append(
            (
                f"{low:g} and more{mark}" if open_end else f"{low:g} to {high:g}{mark}",
                sum(h.counts[i : i + joined]),
            )
        )
    return found


def _labels(f: DatasetFacts) -> Iterator[tuple[str, Table]]:
    found = f.labels
    if found.labels:
        words = f"{found.labels:,} labels, {found.without_clips:,} without a clip, {found.clips_unlabelled:,} clips unlabelled"
        yield f"{words}; those with the most", _bars(found.largest, total=f.clips)
        if found.smallest:
            yield (
                "… and those with the fewest clips",
                _bars(found.smallest, top=found.largest[0][1], total=f.clips),
            )
    if f.columns:
        table = _table("column", "type", "clips with a value", "")
        for c in f.columns:
            table.add_row(Text(printable(c.name)), c.type, _n(c.filled), _share(c.filled, f.clips))
        yield "The manifest's own columns", table


def _how_made(f: DatasetFacts) -> Table:
    table = _table("", "", plain=True)
    for name, value, usual in f.changed:
        table.add_row(name, Text(f"{value} (default {usual})"))
    table.add_row("encoder", str(f.about.get("encoder", "unknown")))
    ffmpeg = str((f.about.get("tools") or {}).get("ffmpeg", "unknown"))
    table.add_row("ffmpeg", Text(ffmpeg.removeprefix("ffmpeg version ").partition(" Copyright")[0]))
    table.add_row("reelmae", str(f.about.get("reelmae", "unknown")))
    return table


def _bars(values: Sequence[Count], others: Sequence[Count] = (), *, top: int = 0, total: int = 0) -> Table:
    """Name, count, bar and share of each value; the longest bar is `top` (the largest unless given), the shares are
    of `total` (their sum unless given)."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(min_width=22, overflow="fold")
    table.add_column(justify="right", min_width=7)
    table.add_column(no_wrap=True, style="cyan", min_width=BAR)
    table.add_column(justify="right", style="dim")
    rest = sum(n for _, n in others)
    total, top = total or sum(n for _, n in values) + rest, top or max((n for _, n in values), default=0)
    for name, n in values:
        table.add_row(Text(printable(name)), _n(n), bar(n, top), "" if not n else _share(n, total))
    if others:
        table.add_row(f"{len(others):,} others", _n(rest), "", _share(rest, total), style="dim")
    return table


def bar(n: int, top: int, width: int = BAR) -> str:
    """A bar of block characters, to an eighth of a column; never empty where there is something."""
    eighths = max(round(8 * width * n / top), 1) if n else 0
    return "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")


def _table(*columns: str, plain: bool = False) -> Table:
    table = Table(box=None, show_header=not plain, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        number = name in ("sources", "spans", "clips with a value")
        table.add_column(name, justify="right" if number else "left", overflow="fold", no_wrap=number)
    return table


def _n(n: int) -> str:
    return f"{n:,}" if n else "–"


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""


def _length(seconds: float) -> str:
    return f"{seconds:g} s" if seconds < 90 else seconds_text(seconds)


def _short(source: str, f: DatasetFacts) -> str:
    src = str(f.about.get("src", ""))
    return printable(source.removeprefix(src.rstrip("/") + "/") if src else source)
