"""The page's sections about a shard dataset: contact sheet, rejects, what came in and out, scores, labels, repeats.

Properties that hold: the sheet's bytes come by ranged reads out of the tars, so it shows what lies in the shards and
nothing else; a clip that cannot be read is told of, not left out. Names and decoders' words are escaped and stay on
one line. A section with nothing to tell is "".
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import av
from PIL import Image

from reelmae.pipeline.dataset.contents import (
    UNITS,
    Count,
    DatasetFacts,
    Histogram,
    Rejects,
    duration_bins,
)
from reelmae.pipeline.dataset.sums import OF_ONE, Reject
from reelmae.pipeline.errors import StorageError
from reelmae.pipeline.storage.store import Store
from reelmae.tools.report.charts import Panel, durations_chart, scores_chart
from reelmae.tools.show import MEANING, bytes_text, printable, seconds_text

THUMB_HEIGHT = 108
SHOWN_FPS = 7.5
SHOWN_SECONDS = 2.4
EXAMPLES = 3  # rejects of a reason, before the rest is folded away
DETAIL = 180  # characters of the decoder's words
_NUMBER = re.compile(r"[\d.]+|[0-9a-f]{8,}")
COUNTED = 8  # values of a distribution, before the rest is one line


@dataclass(frozen=True)
class Thumb:
    """One clip: its index row, and its pictures as data: URIs (None where it could not be read, with the reason)."""

    row: dict[str, Any]
    playing: str | None
    still: str | None
    problem: str = ""


def sheet(store: Store, dataset: DatasetFacts) -> str:
    """Some clips as small playing pictures; none that repeats another."""
    if not dataset.sheet:
        return ""
    src = str(dataset.about.get("src", ""))
    shown = f"{len(dataset.sheet)} of {dataset.clips:,} clips, spread over the whole dataset, at most {OF_ONE} of one source"
    if len(dataset.sheet) == dataset.clips:
        shown = "All clips"
    cards = "".join(_card(_thumb(store, row), src) for row in dataset.sheet)
    return (
        f"<h2>Clips</h2><p>{shown}, read out of "
        "the shards as a trainer reads them; the first seconds of each, at their own speed."
        f"{' None of them repeats another.' if dataset.duplicates else ''}</p><div class=sheet>{cards}</div>"
    )


def _card(thumb: Thumb, src: str) -> str:
    row = thumb.row
    name = short(row["source"], src)
    text = f"{row['width']}×{row['height']} · {row['fps']:.4g} fps · {row['frames'] / row['fps']:.3g} s"
    if thumb.playing is None:
        picture = f"<span class=note>cannot be read: {escape(printable(thumb.problem[:80]))}</span>"
    else:
        picture = (
            f'<picture><source media="(prefers-reduced-motion: reduce)" srcset="{thumb.still}">'
            f'<img src="{thumb.playing}" alt="{escape(name)}"></picture>'
        )
    label = printable(str(row["label"] or Path(name).name))
    return (
        f'<figure><div class=frame>{picture}</div><figcaption title="{escape(name)} at {row["span_start_s"]:g} s">'
        f"{escape(label)}<br>{text}</figcaption></figure>"
    )


def _thumb(store: Store, row: dict[str, Any]) -> Thumb:
    try:
        frames = _frames(store.read_range(row["shard"], row["offset"], row["size"]), row["fps"])
    except (StorageError, FileNotFoundError, av.error.FFmpegError) as e:
        return Thumb(row, None, None, str(e))
    if not frames:
        return Thumb(row, None, None, "no frame could be decoded")
    playing, still = io.BytesIO(), io.BytesIO()
    frames[0].save(
        playing, "WEBP", save_all=True, append_images=frames[1:], duration=round(1000 / SHOWN_FPS), loop=0, quality=62, method=4
    )  # fmt: skip
    frames[0].save(still, "WEBP", quality=70)
    return Thumb(row, data_uri(playing.getvalue(), "image/webp"), data_uri(still.getvalue(), "image/webp"))


def _frames(data: bytes, fps: float) -> list[Image.Image]:
    """Frames of the first seconds at `SHOWN_FPS`, `THUMB_HEIGHT` high."""
    stride = max(1, round(fps / SHOWN_FPS))
    frames: list[Image.Image] = []
    with av.open(io.BytesIO(data)) as container:
        for i, frame in enumerate(container.decode(video=0)):
            if i % stride:
                continue
            width = max(2, round(frame.width * THUMB_HEIGHT / frame.height))
            frames.append(frame.to_image().resize((width, THUMB_HEIGHT), Image.Resampling.BILINEAR, reducing_gap=2))
            if len(frames) >= SHOWN_FPS * SHOWN_SECONDS:
                break
    return frames


def data_uri(data: bytes, mime: str) -> str:
    """The bytes within an address, so that a page needs no other file."""
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


# --- sections --------------------------------------------------------------------------------------------------


def rejects(dataset: DatasetFacts) -> str:
    """By reason, with examples and the decoder's own words."""
    if not dataset.rejects:
        return "<p class=note>Nothing was rejected.</p>"
    src = str(dataset.about.get("src", ""))
    spans = bool(dataset.spans_rejected)
    lines = "".join(_reason(r, src, spans=spans) for r in dataset.rejects)
    note = (
        "<p class=note>A source counts where all of it was rejected; a span, where other spans of its source gave clips.</p>"
        if spans
        else ""
    )
    return (
        "<div class=scroll><table id=rejects><thead><tr><th>reason</th><th class=n>sources</th>"
        f"{'<th class=n>spans</th>' * spans}<th>which, and what was found</th></tr></thead><tbody>{lines}</tbody></table>"
        f"</div>{note}"
    )


def _reason(found: Rejects, src: str, *, spans: bool) -> str:
    first = _different(found.examples)
    folded = [e for e in found.examples if e not in first]
    shown = f"<ul>{''.join(_reject(e, src) for e in first)}</ul>"
    if folded:
        more = found.sources + found.spans - len(first)
        words = f"{more:,} more" + ("" if more == len(folded) else f", {len(folded)} of them here")
        shown += f"<details><summary>{words}</summary><ul>{''.join(_reject(e, src) for e in folded)}</ul></details>"
    numbers = f"<td class=n>{_count(found.sources)}</td>" + f"<td class=n>{_count(found.spans)}</td>" * spans
    meaning = MEANING.get(found.reason, "")
    return (
        f"<tr><td><code>{escape(found.reason)}</code><br><span class=detail>{meaning}</span></td>{numbers}"
        f"<td>{shown}</td></tr>"
    )


def _different(examples: Sequence[Reject]) -> list[Reject]:
    """EXAMPLES of them: those whose words differ (but for numbers), then of other sources, then any."""
    chosen: list[Reject] = []
    for told in (lambda e: _NUMBER.sub("", e.detail), lambda e: e.source, lambda e: e):
        seen = {told(e) for e in chosen}
        for example in examples:
            if len(chosen) < EXAMPLES and told(example) not in seen:
                seen.add(told(example))
                chosen.append(example)
    return chosen


def _reject(example: Reject, src: str) -> str:
    detail = printable(" ".join(example.detail.split()))
    detail = detail if len(detail) <= DETAIL else detail[: DETAIL - 1] + "…"
    span = "" if example.start_s is None else f" <span class=detail>{_span(example)}</span>"
    return (
        f"<li><code>{escape(short(example.source, src))}</code>{span}<br>"
        f"<span class=detail>{escape(detail)}</span></li>"
    )


def _span(example: Reject) -> str:
    end = "its end" if example.end_s is None else f"{example.end_s:g} s"
    return f"{example.start_s:g} s to {end}"


def in_and_out(dataset: DatasetFacts) -> str:
    """Durations, sizes, rates and codecs, of the sources that gave clips and of the clips."""
    lengths = dataset.durations
    if lengths is None:
        return ""
    text = (
        f"Clips last {_length(lengths.shortest)} to {_length(lengths.longest)}, half of them {_length(lengths.median)} or less. "
        f"The source with the most of them gave {dataset.largest[1]:,} ({share(dataset.largest[1], dataset.clips)})."
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
        f"<p class=note>Left: the {dataset.sources_kept:,} sources that gave clips; of those rejected no such facts are "
        f"kept. Right: the {dataset.clips:,} clips. A rule of colour says what was converted; “none” left them as they "
        f"were, “?” marks an assumed matrix.</p><div class=counts>{cells}</div>"
    )


def _counts(title: str, values: Sequence[Count], unit: str, top: int = 0) -> str:
    """One distribution as a table with bars, the longest of `top` (the largest unless given)."""
    total, top = sum(n for _, n in values) or 1, top or max((n for _, n in values), default=1)
    listed = list(values) if len(values) <= COUNTED + 1 else list(values[:COUNTED])
    rows = "".join(
        f"<tr><td>{escape(printable(name))}</td><td class=n>{n:,}</td><td class=bar><i style='width:{100 * n / top:.1f}%'></i>"
        "</td></tr>"
        for name, n in listed
    )
    rest = total - sum(n for _, n in listed)
    if rest and len(values) > len(listed):
        others = len(values) - len(listed)
        rows += f"<tr class=muted><td>{others:,} others</td><td class=n>{rest:,}</td><td class=bar></td></tr>"
    return f"<table><thead><tr><th>{escape(title)}</th><th class=n>{unit}</th><th></th></tr></thead><tbody>{rows}</tbody></table>"


def scores(dataset: DatasetFacts) -> str:
    """Histograms of the screening scores, with their thresholds."""
    if not dataset.clips:
        return ""
    panels = [
        Panel(
            title=h.name, unit=UNITS[h.name], edges=h.edges, counts=h.counts,
            threshold=h.threshold or h.common, in_force=bool(h.threshold),
            open_end=h.name == "motion", words=_threshold(h),
        )
        for h in dataset.scores
    ]  # fmt: skip
    return (
        "<h2>Screening scores</h2><p>Of every clip in the index. What a screen rejected is not in the bars but counted "
        "beside its line: whole sources, and spans of sources that gave other clips; each was rejected by the first screen "
        f"that it failed.</p>{scores_chart(panels)}<p class=note>Motion: how much neighbouring small frames differ. Luma: "
        "mean brightness. Contrast: standard deviation within a frame. Border: share of the picture that is black border. "
        "Levels are of 255. A dashed line is not in force: it is where the preset uncurated would draw it.</p>"
    )


def _threshold(h: Histogram) -> str:
    if not h.threshold:
        side = "over" if h.at_most else "under"
        return f"off; at {h.common:g}: {h.beyond_common:,} clips {side} it"
    gone = [f"{n:,} {unit}{'s' * (n != 1)}" for n, unit in ((h.sources, "source"), (h.spans, "span")) if n]
    return f"{h.setting} {h.threshold:g}: rejected {', '.join(gone) or 'none'}"


def labels(dataset: DatasetFacts) -> str:
    """How many, the largest and the smallest; the manifest's own columns."""
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
            "<h2>The manifest’s own columns</h2><table><thead><tr><th>column</th><th>type</th><th class=n>clips with a value"
            f"</th><th class=n>share</th></tr></thead><tbody>{rows}</tbody></table>"
        )
    return out


def repeats(dataset: DatasetFacts) -> str:
    """How many clips repeat another, and some pairs."""
    mode = str((dataset.about.get("config") or {}).get("duplicates", "off"))
    if not dataset.duplicates:
        said = "were not looked for (duplicates: off)" if mode == "off" else f"were looked for ({mode}): none"
        return f"<h2>Repeats</h2><p class=note>Clips that repeat another {escape(said)}.</p>"
    src = str(dataset.about.get("src", ""))
    rows = "".join(
        f"<tr><td><code>{escape(short(r.source, src))}</code> <span class=detail>at {r.start_s:g} s</span></td>"
        f"<td><code>{escape(short(r.first_source, src))}</code> <span class=detail>at {r.first_start_s:g} s</span></td>"
        f"<td>{'byte for byte' if r.exact else 'by look'}</td></tr>"
        for r in dataset.repeats
    )
    return (
        f"<h2>Repeats</h2><p><b>{dataset.duplicates:,}</b> of {dataset.clips:,} clips "
        f"({share(dataset.duplicates, dataset.clips)}) repeat an earlier one. They lie in the shards and are marked in the "
        f"index; the loader leaves them out.</p><div class=scroll><table><thead><tr><th>clip</th><th>repeats</th><th></th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
        + (f"<p class=note>The first {len(dataset.repeats)} of them.</p>" if dataset.duplicates > len(dataset.repeats) else "")
    )  # fmt: skip


def how_made(dataset: DatasetFacts) -> str:
    """Settings that are not the preset's own, and the tools."""
    about = dataset.about
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(str(value))}</td><td class=muted>{escape(str(usual))}</td></tr>"
        for name, value, usual in dataset.changed
    )
    table = (
        f"<table><thead><tr><th>setting</th><th>here</th><th>default</th></tr></thead><tbody>{rows}</tbody></table>"
        if rows
        else "<p>With the default settings.</p>"
    )
    said = [
        f"encoder {about.get('encoder', 'unknown')}",
        str((about.get("tools") or {}).get("ffmpeg", "ffmpeg unknown")).partition(" Copyright")[0],
        f"reelmae {about.get('reelmae', 'unknown')}",
        f"config {about.get('config_digest', 'unknown')}",
    ]
    return f"<h2>How it was made</h2>{table}<p class=note>{escape(' · '.join(said))}</p>"


# --- words -----------------------------------------------------------------------------------------------------


def tiles(dataset: DatasetFacts) -> list[tuple[str, str, str]]:
    """Title, value, note."""
    d = dataset
    whole = d.sources_timed == d.sources_kept
    seconds = _from_to(seconds_text(d.seconds_in), seconds_text(d.seconds_out))
    yields = f"{share(d.seconds_out, d.seconds_in)} of the sources kept" if whole and d.seconds_in else "video"
    ratio = f"{d.bytes_in / d.bytes_out:.1f}× smaller" if d.bytes_out and d.bytes_in > d.bytes_out else "larger"
    reasons = len(d.rejects)
    spans = f", and {d.spans_rejected:,} spans" if d.spans_rejected else ""
    marked = f"; {d.duplicates:,} repeat others" if d.duplicates else ""
    return [
        ("sources → clips", f"{d.sources:,} → {d.clips:,}", f"{d.sources_kept:,} sources kept{marked}"),
        ("rejected", f"{d.sources_rejected:,}", f"sources{spans}, for {reasons} reason{'s' * (reasons != 1)}"),
        ("video in → out", seconds, yields),
        ("bytes in → out", _from_to(bytes_text(d.bytes_in), bytes_text(d.bytes_out)), f"of the sources kept; {ratio}"),
        ("shards", f"{d.shards:,}", f"{bytes_text(d.bytes_out / d.shards)} each, about" if d.shards else "none"),
    ]  # fmt: skip


def _from_to(before: str, after: str) -> str:
    """Both with their units, the first without where it is the same."""
    (first, unit), (second, other) = before.split(" "), after.split(" ")
    return f"{first} → {second}\N{NO-BREAK SPACE}{unit}" if unit == other else f"{first} {unit} → {second} {other}"


def short(source: str, src: str) -> str:
    """The source relative to its bucket, on one line."""
    return printable(source.removeprefix(src.rstrip("/") + "/") if src else source)


def share(part: float, whole: float) -> str:
    """Percent."""
    value = 100 * part / whole if whole else 0.0
    return f"{value:.0f} %" if value >= 9.95 or value == 0 else f"{value:.2g} %"


def _length(seconds: float) -> str:
    return f"{seconds:g} s" if seconds < 90 else seconds_text(seconds)


def _count(n: int) -> str:
    return f"{n:,}" if n else "–"
