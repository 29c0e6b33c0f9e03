"""The page's sections about a shard dataset: rejects, what came in and out, scores, labels, repeats, settings.

Properties that hold: names and decoders' words are escaped and stay on one line; a section without content is "".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from reelmae.pipeline.dataset.contents import DatasetFacts, Histogram, duration_bins
from reelmae.pipeline.dataset.sums import Count, RejectExample, RejectGroup
from reelmae.pipeline.schema import reason_meaning
from reelmae.tools.report.charts import Panel, durations_chart, scores_chart
from reelmae.tools.show import bytes_text, length_text, printable, seconds_text, short_name

EXAMPLES = 3  # rejects of a reason that are shown; the rest is folded away
DETAIL = 180  # characters of the decoder's words
COUNTED = 8  # values of a distribution that have a line each; the rest is one line
_NUMBER = re.compile(r"[\d.]+|[0-9a-f]{8,}")


def rejects(dataset: DatasetFacts) -> str:
    """The rejects by reason, with examples and the decoder's own words."""
    if not dataset.rejects:
        return "<p class=note>Nothing was rejected.</p>"
    src = str(dataset.about.get("src", ""))
    spans = bool(dataset.spans_rejected)
    lines = "".join(_reason(r, src, spans=spans) for r in dataset.rejects)
    note = "A source counts where all of it was rejected; a span, where other spans of its source gave clips."
    return (
        "<div class=scroll><table id=rejects><thead><tr><th>reason</th><th class=n>sources</th>"
        f"{'<th class=n>spans</th>' * spans}<th>which, and what was found</th></tr></thead>"
        f"<tbody>{lines}</tbody></table></div>" + f"<p class=note>{note}</p>" * spans
    )


def _reason(found: RejectGroup, src: str, *, spans: bool) -> str:
    first = _choose(found.examples)
    folded = [e for e in found.examples if e not in first]
    shown = f"<ul>{''.join(_reject(e, src) for e in first)}</ul>"
    if folded:
        more = found.sources + found.spans - len(first)
        words = f"{more:,} more" + ("" if more == len(folded) else f", {len(folded)} of them here")
        shown += f"<details><summary>{words}</summary><ul>{''.join(_reject(e, src) for e in folded)}</ul></details>"
    numbers = f"<td class=n>{_count(found.sources)}</td>" + f"<td class=n>{_count(found.spans)}</td>" * spans
    meaning = reason_meaning(found.reason)
    return (
        f"<tr><td><code>{escape(found.reason)}</code><br><span class=detail>{meaning}</span></td>{numbers}"
        f"<td>{shown}</td></tr>"
    )


def _choose(examples: Sequence[RejectExample]) -> list[RejectExample]:
    """EXAMPLES of them: first those with different words (numbers apart), then those of other sources, then any."""
    chosen: list[RejectExample] = []
    for trait in (lambda e: _NUMBER.sub("", e.detail), lambda e: e.source, lambda e: e):
        seen = {trait(e) for e in chosen}
        for example in examples:
            if len(chosen) < EXAMPLES and trait(example) not in seen:
                seen.add(trait(example))
                chosen.append(example)
    return chosen


def _reject(example: RejectExample, src: str) -> str:
    detail = printable(" ".join(example.detail.split()))
    detail = detail if len(detail) <= DETAIL else detail[: DETAIL - 1] + "…"
    span = "" if example.start_s is None else f" <span class=detail>{_span(example)}</span>"
    return (
        f"<li><code>{escape(short_name(example.source, src))}</code>{span}<br>"
        f"<span class=detail>{escape(detail)}</span></li>"
    )


def _span(example: RejectExample) -> str:
    end = "its end" if example.end_s is None else f"{example.end_s:g} s"
    return f"{example.start_s:g} s to {end}"


def in_and_out(dataset: DatasetFacts) -> str:
    """Durations, sizes, rates and codecs of the sources that gave clips, and of the clips."""
    lengths = dataset.durations
    if lengths is None:
        return ""
    text = (
        f"Clips last {length_text(lengths.shortest)} to {length_text(lengths.longest)}, "
        f"half of them {length_text(lengths.median)} or less. "
        f"The source with the most clips gave {dataset.largest[1]:,} ({share(dataset.largest[1], dataset.clips)})."
    )
    bins = duration_bins(lengths)
    if len(bins) > 1 and lengths.longest > 1.5 * bins[-1][0] - 0.5 * bins[-2][0]:
        text += " The last bar holds all that are longer."
    pairs = (
        ("codec and container", dataset.codec_in, "codec", dataset.codec_out),
        ("size, pixels as coded", dataset.size_in, "size, pixels", dataset.size_out),
        ("frames a second", dataset.fps_in, "frames a second", dataset.fps_out),
        ("colours: rule", dataset.colours, "encoder", dataset.encoders),
    )
    cells = "".join(
        _counts(title, values, "sources" if i % 2 == 0 and not title.startswith("colours") else "clips")
        for left, into, right, out in pairs
        for i, (title, values) in enumerate(((left, into), (right, out)))
    )
    return (
        f"<h2>What came in, what came out</h2><p>{text}</p>{durations_chart(bins)}"
        f"<p class=note>Left: the {dataset.sources_kept:,} sources that gave clips; nothing of this is kept of "
        f"rejected sources. Right: the {dataset.clips:,} clips. The colour rule says what was converted: “none” changed "
        f"nothing, “?” marks an assumed matrix.</p><div class=counts>{cells}</div>"
    )


def _counts(title: str, values: Sequence[Count], unit: str, top: int = 0) -> str:
    """One distribution as a table with bars. A full bar stands for `top`, by default the largest count."""
    total, top = sum(n for _, n in values) or 1, top or max((n for _, n in values), default=1)
    listed = list(values) if len(values) <= COUNTED + 1 else list(values[:COUNTED])
    rows = "".join(
        f"<tr><td>{escape(printable(name))}</td><td class=n>{n:,}</td>"
        f"<td class=bar><i style='width:{100 * n / top:.1f}%'></i></td></tr>"
        for name, n in listed
    )
    rest = total - sum(n for _, n in listed)
    if rest and len(values) > len(listed):
        others = len(values) - len(listed)
        rows += f"<tr class=muted><td>{others:,} others</td><td class=n>{rest:,}</td><td class=bar></td></tr>"
    head = f"<thead><tr><th>{escape(title)}</th><th class=n>{unit}</th><th></th></tr></thead>"
    return f"<table>{head}<tbody>{rows}</tbody></table>"


def scores(dataset: DatasetFacts) -> str:
    """Histograms of the screening scores, with their thresholds."""
    if not dataset.clips:
        return ""
    panels = [_panel(h) for h in dataset.scores]
    return (
        "<h2>Screening scores</h2><p>The bars count every clip in the index. Beside each threshold stands what its screen "
        "rejected, which is not in the bars: whole sources, and spans of sources that gave other clips. Each counts at "
        f"the first screen that it failed.</p>{scores_chart(panels)}<p class=note>Motion: how much neighbouring small "
        "frames differ. Luma: mean brightness. Contrast: standard deviation within a frame. Border: share of the picture "
        "that is black border. Levels go from 0 to 255. A dashed line is a threshold that is off, drawn at the value of "
        "the preset uncurated.</p>"
    )


def _panel(h: Histogram) -> Panel:
    return Panel(
        title=h.name,
        unit=h.unit,
        edges=h.edges,
        counts=h.counts,
        threshold=h.threshold or h.common,
        in_force=bool(h.threshold),
        open_end=h.name == "motion",
        words=_threshold(h),
    )


def _threshold(h: Histogram) -> str:
    if not h.threshold:
        side = "over" if h.at_most else "under"
        return f"off; at {h.common:g}: {h.beyond_common:,} clips {side} it"
    gone = [f"{n:,} {unit}{'s' * (n != 1)}" for n, unit in ((h.sources, "source"), (h.spans, "span")) if n]
    return f"{h.setting} {h.threshold:g}: rejected {', '.join(gone) or 'none'}"


def labels(dataset: DatasetFacts) -> str:
    """How many labels there are, the largest and the smallest; the manifest's own columns."""
    out, found = "", dataset.labels
    if found.labels:
        none = f", {found.without_clips:,} of them without a clip" if found.without_clips else ""
        rest = f"; {found.clips_unlabelled:,} clips have none" if found.clips_unlabelled else "; every clip has one"
        tables = _counts("most clips", found.largest, "clips")
        tables += _counts("fewest clips", found.smallest, "clips", found.largest[0][1]) if found.smallest else ""
        out += f"<h2>Labels</h2><p>{found.labels:,} labels{none}{rest}.</p><div class=counts>{tables}</div>"
    if dataset.columns:
        rows = "".join(
            f"<tr><td><code>{escape(printable(c.name))}</code></td><td>{escape(c.type)}</td>"
            f"<td class=n>{c.filled:,}</td><td class=n>{share(c.filled, dataset.clips)}</td></tr>"
            for c in dataset.columns
        )
        out += (
            "<h2>The manifest’s own columns</h2><table><thead><tr><th>column</th><th>type</th>"
            f"<th class=n>clips with a value</th><th class=n>share</th></tr></thead><tbody>{rows}</tbody></table>"
        )
    return out


def repeats(dataset: DatasetFacts) -> str:
    """How many clips repeat another, and some of the pairs."""
    mode = str((dataset.about.get("config") or {}).get("duplicates", "off"))
    if not dataset.duplicates:
        result = "were not looked for (duplicates: off)" if mode == "off" else f"were looked for ({mode}): none"
        return f"<h2>Repeats</h2><p class=note>Clips that repeat another {escape(result)}.</p>"
    src = str(dataset.about.get("src", ""))
    rows = "".join(
        f"<tr><td><code>{escape(short_name(r.source, src))}</code> <span class=detail>at {r.start_s:g} s</span></td>"
        f"<td><code>{escape(short_name(r.first_source, src))}</code> "
        f"<span class=detail>at {r.first_start_s:g} s</span></td>"
        f"<td>{'byte for byte' if r.exact else 'by look'}</td></tr>"
        for r in dataset.repeats
    )
    more = dataset.duplicates > len(dataset.repeats)
    note = f"<p class=note>The first {len(dataset.repeats)} of them.</p>" if more else ""
    return (
        f"<h2>Repeats</h2><p><b>{dataset.duplicates:,}</b> of {dataset.clips:,} clips "
        f"({share(dataset.duplicates, dataset.clips)}) repeat an earlier one. They lie in the shards and are marked in "
        "the index; the loader leaves them out.</p><div class=scroll><table><thead><tr><th>clip</th><th>repeats</th>"
        f"<th></th></tr></thead><tbody>{rows}</tbody></table></div>{note}"
    )


def settings(dataset: DatasetFacts) -> str:
    """Settings that differ from the preset, and the tools' versions."""
    about = dataset.about
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(str(value))}</td>"
        f"<td class=muted>{escape(str(usual))}</td></tr>"
        for name, value, usual in dataset.changed
    )
    table = (
        f"<table><thead><tr><th>setting</th><th>here</th><th>default</th></tr></thead><tbody>{rows}</tbody></table>"
        if rows
        else "<p>With the default settings.</p>"
    )
    versions = [
        f"encoder {about.get('encoder', 'unknown')}",
        str((about.get("tools") or {}).get("ffmpeg", "ffmpeg unknown")).partition(" Copyright")[0],
        f"reelmae {about.get('reelmae', 'unknown')}",
        f"config {about.get('config_digest', 'unknown')}",
    ]
    return f"<h2>How it was made</h2>{table}<p class=note>{escape(' · '.join(versions))}</p>"


def tiles(dataset: DatasetFacts) -> list[tuple[str, str, str]]:
    """The dataset's tiles at the head of the page: (title, value, note)."""
    d = dataset
    whole = d.sources_timed == d.sources_kept
    seconds = _from_to(seconds_text(d.seconds_in), seconds_text(d.seconds_out))
    yields = f"{share(d.seconds_out, d.seconds_in)} of the sources kept" if whole and d.seconds_in else "video"
    ratio = f"{d.bytes_in / d.bytes_out:.1f}× smaller" if d.bytes_out and d.bytes_in > d.bytes_out else "larger"
    reasons = len(d.rejects)
    spans = f", and {d.spans_rejected:,} spans" if d.spans_rejected else ""
    marked = f"; {d.duplicates:,} repeat others" if d.duplicates else ""
    size = _from_to(bytes_text(d.bytes_in), bytes_text(d.bytes_out))
    shard_size = f"about {bytes_text(d.bytes_out / d.shards)} each" if d.shards else "none"
    return [
        ("sources → clips", f"{d.sources:,} → {d.clips:,}", f"{d.sources_kept:,} sources kept{marked}"),
        ("rejected", f"{d.sources_rejected:,}", f"sources{spans}, for {reasons} reason{'s' * (reasons != 1)}"),
        ("video in → out", seconds, yields),
        ("bytes in → out", size, f"of the sources kept; {ratio}"),
        ("shards", f"{d.shards:,}", shard_size),
    ]


def _from_to(before: str, after: str) -> str:
    """Both with their units; one unit only where both have the same."""
    (first, unit), (second, other) = before.split(" "), after.split(" ")
    return f"{first} → {second}\N{NO-BREAK SPACE}{unit}" if unit == other else f"{first} {unit} → {second} {other}"


def share(part: float, whole: float) -> str:
    """`part` in percent of `whole`, as text."""
    value = 100 * part / whole if whole else 0.0
    return f"{value:.0f} %" if value >= 9.95 or value == 0 else f"{value:.2g} %"


def _count(n: int) -> str:
    return f"{n:,}" if n else "–"
