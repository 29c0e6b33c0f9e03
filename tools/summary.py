"""`reelmae inspect`: what a shard dataset holds, on a terminal, as JSON, or line by line.

The facts are those of the report (pipeline/dataset/contents.py). Of an unfinished dataset it prints how far the job
is. Names and decoders' words are printed on one line without characters that control a terminal. In lines of fields
a backslash is doubled, so that no two names look the same. The lists of rejects and of sources stream: memory does
not grow with their length.
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
from reelmae.pipeline.dataset.contents import DatasetFacts, Histogram, JobState, duration_bins, job_state
from reelmae.pipeline.dataset.contents import facts as dataset_facts
from reelmae.pipeline.dataset.sums import Count, RejectGroup, batches
from reelmae.pipeline.errors import InputError
from reelmae.pipeline.schema import reason_meaning
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.claim import CLAIM, read_holder
from reelmae.pipeline.storage.store import Store
from reelmae.tools.show import bytes_text, length_text, printable, seconds_text, short_name

WIDTH = 100
BAR = 34  # columns of the longest bar
COUNTED = 8  # values of a distribution that have a line each
HISTOGRAM_ROWS = 16
EXAMPLES = 2  # rejects of each reason
DETAIL = 110  # characters of the decoder's words
AT_WORK = "a job is at work"
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def inspect(
    dst: str,
    *,
    rejects: Sequence[str] | None = None,
    source: str | None = None,
    as_json: bool = False,
    access: Access | None = None,
) -> dict[str, Any]:
    """Print what the dataset at `dst` holds; with `as_json` print nothing and return it.

    `rejects`: list the rejects for these reasons instead (no reason: all rejects). `source`: list the clips and rejects
    of the sources whose url contains this text. `access`: how `dst` is reached. Raises InputError where there is no
    dataset, or where a list is asked for and the dataset is not finished.
    """
    store = Store(dst, access)
    ready = store.exists(schema.DATASET_JSON)
    if ready and (rejects is not None or source is not None):
        return _lists(store, rejects, source, as_json)
    facts, claim = dataset_facts(store) if ready else None, claim_text(store)
    job = job_state(store) if facts is None else facts.job
    if facts is None and job is None:
        raise InputError(f"{dst}: no shard dataset (neither {schema.DATASET_JSON} nor {schema.PLAN_JSON})")
    if facts is None and (rejects is not None or source is not None):
        raise InputError(f"{dst}: {_progress(job, claim)}; there are no lists before the job has ended")
    finished = facts is not None and (job is None or job.finished)
    if as_json:
        values = {"url": store.url(), "job": asdict(job) if job else None} if facts is None else as_dict(facts)
        return {"finished": finished, "claim": claim} | values
    console = Console(highlight=False, markup=False)
    console.width = min(WIDTH, console.width) if console.is_terminal else WIDTH
    if not finished:
        before = "" if facts is None else "; the tables show the dataset as it was before"
        console.print(Text(f"{printable(store.url())}: {_progress(job, claim)}{before}\n", style="yellow"))
    if claim:
        console.print(Text(f"{claim}\n", style="yellow"))
    for title, table in tables(facts) if facts is not None else ():
        console.print(Text(printable(title), style="bold"))
        console.print(table)
        console.print()
    return {}


def claim_text(store: Store) -> str | None:
    """Who writes to this store, in one line; None where nobody claims it."""
    try:
        data = store.read_bytes(CLAIM)
    except (FileNotFoundError, NotADirectoryError):
        return None
    holder = read_holder(data)
    if holder is None:
        return f"claimed by a job that cannot be told; {CLAIM} is not readable"
    who = printable(holder.words())
    lives = None if holder.process is None else holder.process.lives()
    if lives is None:
        return f"claimed by a job: {who}"
    return f"{AT_WORK}: {who}" if lives else f"a job died here: {who}; the next one takes its place"


def as_dict(facts: DatasetFacts) -> dict[str, Any]:
    """The facts as JSON takes them, without the rows of the contact sheet."""
    return {k: v for k, v in asdict(replace(facts, sheet=())).items() if k != "sheet"}


def _progress(job: JobState | None, claim: str | None) -> str:
    if job is None:
        return "not finished"
    text = (
        f"not finished: {job.tasks_done:,} of {job.tasks:,} tasks and {job.sources_done:,} of {job.sources:,} sources "
    )
    return text + ("are done" if claim and claim.startswith(AT_WORK) else "are done; run reelmae shard again to go on")


# --- lines -----------------------------------------------------------------------------------------------------


def _lists(store: Store, reasons: Sequence[str] | None, source: str | None, as_json: bool) -> dict[str, Any]:
    unknown = [r for r in reasons or () if r not in list(schema.Reason)]
    if unknown:
        reasons_text = ", ".join(r.value for r in schema.Reason)
        raise InputError(f"--rejects {unknown[0]}: is not a reason; take one of {reasons_text}")
    bad = reject_rows(store, reasons or (), source) if reasons is not None or source is not None else iter(())
    good = clip_rows(store, source) if source is not None and reasons is None else iter(())
    if as_json:
        found = {"clips": list(good), "rejects": list(bad)}
        return found if source is not None and reasons is None else {"rejects": found["rejects"]}
    seen = _write_lines(
        [
            (("clip", r["source"], r["span_start_s"], r["span_end_s"], _clip_text(r)) for r in good),
            ((r["reason"], r["source"], r["span_start_s"], r["span_end_s"], r["detail"]) for r in bad),
        ]
    )
    if not seen and source is not None:
        raise InputError(f"--source {source}: no clip and no reject at {store.url()} has a source with this text")
    return {}


def reject_rows(store: Store, reasons: Sequence[str], source: str | None) -> Iterator[dict[str, Any]]:
    """Rows of rejects.parquet for these reasons (none: all), of sources whose url contains the text."""
    for batch in batches(store, schema.REJECTS_FILE, schema.REJECTS.names):
        if reasons:
            batch = batch.filter(pc.is_in(batch.column("reason"), value_set=pa.array(reasons, pa.string())))
        yield from _filter_source(batch, source).to_pylist()


def clip_rows(store: Store, source: str | None) -> Iterator[dict[str, Any]]:
    """Rows of index.parquet, of sources whose url contains the text."""
    names = ["source", "span_start_s", "span_end_s", "key", "shard", "label", "duplicate_of"]
    for batch in batches(store, schema.INDEX, names):
        yield from _filter_source(batch, source).to_pylist()


def _filter_source(batch: pa.RecordBatch, source: str | None) -> pa.RecordBatch:
    return batch if source is None else batch.filter(pc.match_substring(batch.column("source"), source))


def _clip_text(row: dict[str, Any]) -> str:
    repeats = f", repeats {row['duplicate_of']}" if row["duplicate_of"] else ""
    label = f", label {row['label']}" if row["label"] is not None else ""
    return f"{row['key']} in {row['shard']}{label}{repeats}"


def _write_lines(groups: Iterable[Iterable[tuple[str, str, float | None, float | None, str]]]) -> int:
    """Write lines of five fields to stdout; returns how many. Stops quietly when the reader has gone (`| head`)."""
    lines = 0
    try:
        for rows in groups:
            for kind, url, start, end, detail in rows:
                times = ["" if t is None else f"{t:g}" for t in (start, end)]
                print("\t".join((kind, _field(url), *times, _field(detail))))
                lines += 1
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python fails again when it exits
    return lines


def _field(text: str) -> str:
    return printable(text.replace("\\", "\\\\"))


# --- tables ----------------------------------------------------------------------------------------------------


def tables(facts: DatasetFacts) -> Iterator[tuple[str, Table]]:
    """The tables that are printed, each with its title."""
    yield facts.url, _totals(facts)
    if facts.durations is not None:
        d = facts.durations
        words = f"{length_text(d.shortest)} to {length_text(d.longest)}"
        words += f", median {length_text(d.median)}, mean {length_text(d.mean)}"
        yield f"Duration of clips: {words}", _bars([(f"{at:g} s", n) for at, n in duration_bins(d, HISTOGRAM_ROWS)])
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
            shown = len(values) if len(values) <= COUNTED + 1 else COUNTED
            yield title, _bars(values[:shown], values[shown:])
    if facts.rejects:
        yield "Rejected; reelmae inspect DST --rejects lists all", _rejects(facts)
    if facts.duplicates:
        yield f"Clips that repeat another: {facts.duplicates:,}; the first of them", _repeats(facts)
    if facts.clips:
        yield from ((_title(h), _bars(_coarse(h))) for h in facts.scores)
    yield from _labels(facts)
    yield "How it was made", _settings(facts)


def _totals(f: DatasetFacts) -> Table:
    table = _table("", "", plain=True)
    known = "" if f.sources_timed == f.sources_kept else f" (of {f.sources_timed:,} sources)"
    repeats = f", {f.duplicates:,} of them repeat others and are left out in training" if f.duplicates else ""
    rows = {
        "sources": f"{f.sources:,}: {f.sources_kept:,} gave clips, {f.sources_rejected:,} rejected",
        "spans rejected": f"{f.spans_rejected:,}, of sources that gave other clips" if f.spans_rejected else "",
        "clips": f"{f.clips:,}{repeats}",
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


def _examples(r: RejectGroup, f: DatasetFacts) -> Text:
    text = Text(reason_meaning(r.reason), style="dim")
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
        return f"{h.name.capitalize()}, {h.unit}; {off}"
    gone = f"rejected {side} it: {h.sources:,} sources, {h.spans:,} spans"
    return f"{h.name.capitalize()}, {h.unit}; {h.setting} {h.threshold:g}, {gone}"


def _coarse(h: Histogram) -> list[Count]:
    """The histogram in at most HISTOGRAM_ROWS bins, up to the last with a clip; the threshold's bin is marked."""
    last = max((i for i, n in enumerate(h.counts) if n), default=0) + 1
    stride = -(-last // HISTOGRAM_ROWS)
    found = []
    for i in range(0, last, stride):
        low, high = h.edges[i], h.edges[min(i + stride, len(h.counts))]
        open_end = i + stride >= len(h.counts) and h.name == "motion"
        span = f"{low:g} and more" if open_end else f"{low:g} to {high:g}"
        mark = f" ← {h.setting}" if h.threshold and low <= h.threshold < high else ""
        found.append((span + mark, sum(h.counts[i : i + stride])))
    return found


def _labels(f: DatasetFacts) -> Iterator[tuple[str, Table]]:
    found = f.labels
    if found.labels:
        words = f"{found.labels:,} labels, {found.without_clips:,} without a clip"
        words += f", {found.clips_unlabelled:,} clips unlabelled; those with the most"
        yield words, _bars(found.largest, total=f.clips)
        if found.smallest:
            bars = _bars(found.smallest, top=found.largest[0][1], total=f.clips)
            yield "… and those with the fewest clips", bars
    if f.columns:
        table = _table("column", "type", "clips with a value", "")
        for c in f.columns:
            table.add_row(Text(printable(c.name)), c.type, _n(c.filled), _share(c.filled, f.clips))
        yield "The manifest's own columns", table


def _settings(f: DatasetFacts) -> Table:
    table = _table("", "", plain=True)
    for name, value, usual in f.changed:
        table.add_row(name, Text(f"{value} (default {usual})"))
    table.add_row("encoder", str(f.about.get("encoder", "unknown")))
    ffmpeg = str((f.about.get("tools") or {}).get("ffmpeg", "unknown"))
    table.add_row("ffmpeg", Text(ffmpeg.removeprefix("ffmpeg version ").partition(" Copyright")[0]))
    table.add_row("reelmae", str(f.about.get("reelmae", "unknown")))
    return table


def _bars(values: Sequence[Count], others: Sequence[Count] = (), *, top: int = 0, total: int = 0) -> Table:
    """Name, count, bar and share of each value.

    The longest possible bar stands for `top`, by default the largest count. Shares are of `total`, by default the sum.
    """
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
    """A bar of block characters, to an eighth of a column; empty only where n is 0."""
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


def _short(source: str, f: DatasetFacts) -> str:
    return short_name(source, str(f.about.get("src", "")))
