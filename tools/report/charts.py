"""The report's charts: matplotlib figures as inline SVG whose colours follow the page.

Properties that hold: text stays text, in the page's own font; every colour is a CSS variable, so that the charts follow
the page's light or dark mode; the same data gives the same bytes; nothing refers to another file or address.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

# Stand-ins that matplotlib writes into the SVG; _svg replaces them by the page's variables. The two series are blue and
# orange of Okabe and Ito, which colour-blind readers can tell apart, and each also has a label.
INK, MUTED, LINE, FIRST, SECOND, PALE = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    FIRST: "var(--first)",
    SECOND: "var(--second)",
    PALE: "var(--pale)",
}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "reelmae",
    "font.size": 11,
    "font.family": "DejaVu Sans",
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "axes.labelsize": 11,
    "axes.titlesize": 11,
    "lines.linewidth": 2,
}
Rows = Sequence[dict[str, float]]
Bins = Sequence[tuple[float, int]]


@dataclass(frozen=True)
class Panel:
    """One histogram with its threshold."""

    title: str
    unit: str
    edges: Sequence[float]
    counts: Sequence[int]
    threshold: float
    in_force: bool
    """Whether the threshold rejects clips; else it is only drawn for comparison."""
    open_end: bool
    """Whether the last bin also holds all values above it."""
    words: str
    """Text about the threshold."""


def smooth(values: Sequence[float], share: float = 0.06) -> list[float]:
    """Centred moving mean over `share` of the series; the window shrinks at both ends."""
    half = int(len(values) * share / 2)
    out = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        window = values[i - reach : i + reach + 1]
        out.append(sum(window) / len(window))
    return out


def loss_chart(rows: Rows, *, baseline: float | None) -> str:
    """Loss over steps as SVG, with the loss of predicting each patch's mean as a dashed line."""
    with mpl.rc_context(_STYLE):
        figure = _figure(9.4, 3.5)
        axes = figure.subplots()
        steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
        axes.plot(steps, losses, color=PALE, linewidth=1.4, marker="o" if len(rows) < 8 else None, markersize=3)
        axes.plot(steps, smooth(losses), color=FIRST)
        if baseline is not None:
            axes.axhline(baseline, color=MUTED, linewidth=1.2, linestyle=(0, (5, 4)))
            axes.annotate(
                "predicting each patch's mean",
                (1, baseline),
                (-4, 4),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
                va="bottom",
                color=MUTED,
                fontsize=10,
            )
        shown = losses if baseline is None else [*losses, baseline]
        low, high = min(shown), max(shown)
        axes.set_ylim(max(0, low - 0.12 * (high - low)), high + 0.1 * (high - low) + 1e-9)
        _steps_axis(axes, steps)
        axes.set_ylabel("loss on removed patches")
        return _svg(figure, "Pretraining loss by step")


def pace_chart(rows: Rows) -> str:
    """Learning rate, clips a second and share of time spent waiting, side by side, as SVG."""
    with mpl.rc_context(_STYLE):
        figure = _figure(9.4, 2.3)
        panels = figure.subplots(1, 3)
        steps = [row["step"] for row in rows]
        titles = {"lr": "learning rate", "clips_per_s": "clips / s", "wait_share": "time waiting for data"}
        for axes, (key, title) in zip(panels, titles.items(), strict=True):
            values = [row[key] for row in rows]
            axes.plot(steps, values, color=FIRST, linewidth=1.6)
            axes.set_title(title, loc="left", color=INK)
            axes.set_ylim(0, max([*values, 0.02 if key == "wait_share" else 1e-12]) * 1.12)
            _steps_axis(axes, steps)
        panels[0].yaxis.set_major_formatter(
            FuncFormatter(lambda v, _: f"{v:.1e}".replace(".0e", "e").replace("e-0", "e-") if v else "0")
        )
        panels[2].yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.3g} %"))
        return _svg(figure, "Learning rate, clips per second and share of time waiting, by step")


def bars_chart(groups: Sequence[tuple[str, float, float]], *, unit: str) -> str:
    """Pairs of horizontal bars, (name, dense, sparse), each with its value and the ratio, as SVG."""
    with mpl.rc_context(_STYLE | {"axes.grid": False}):
        figure = _figure(9.4, 0.55 + 1.02 * len(groups))
        axes = figure.subplots()
        longest = max(max(dense, sparse) for _, dense, sparse in groups)
        for i, (_, dense, sparse) in enumerate(groups):
            faster = f" · {dense / sparse:.1f}× faster"
            bars = ((-0.2, dense, SECOND, "dense", ""), (0.2, sparse, FIRST, "sparse", faster))
            for offset, value, colour, name, more in bars:
                axes.barh(i + offset, value, 0.36, color=colour)
                text = f"{name} {number(value)} {unit}{more}"
                axes.text(value + longest * 0.012, i + offset, text, va="center", ha="left", fontsize=10.5)
        axes.set_yticks(range(len(groups)), [name for name, _, _ in groups])
        axes.tick_params(axis="y", length=0, labelcolor=INK, labelsize=11)
        axes.spines["left"].set_visible(False)
        axes.set_xlim(0, longest * 1.22)
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.set_xlabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        label = "; ".join(f"{n}: dense {number(d)} {unit}, sparse {number(s)} {unit}" for n, d, s in groups)
        return _svg(figure, label)


def durations_chart(bins: Bins) -> str:
    """Clips by duration, as SVG. `bins`: (middle of a bin in seconds, clips); the last one holds all longer clips."""
    with mpl.rc_context(_STYLE):
        figure = _figure(9.4, 2.5)
        axes = figure.subplots()
        width = bins[1][0] - bins[0][0] if len(bins) > 1 else 1.0
        axes.bar([at for at, _ in bins], [n for _, n in bins], 0.86 * width, color=FIRST)
        axes.set_xlim(min(0.0, bins[0][0] - width), bins[-1][0] + width)
        axes.set_xlabel("duration of a clip, seconds")
        _counts_axis(axes)
        axes.xaxis.set_major_locator(MaxNLocator(12, steps=[1, 2, 2.5, 5, 10]))
        return _svg(figure, "; ".join(f"{at:g} s: {n} clips" for at, n in bins if n))


def scores_chart(panels: Sequence[Panel]) -> str:
    """Histograms two by two, as SVG, each with its threshold: a solid line where it is in force, else a dashed one."""
    with mpl.rc_context(_STYLE):
        figure = _figure(9.4, 2.6 * -(-len(panels) // 2))
        figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.1)
        places = figure.subplots(-(-len(panels) // 2), 2).flatten().tolist()
        for unused in places[len(panels) :]:  # the last place, where the number of panels is odd
            unused.remove()
        for axes, panel in zip(places[: len(panels)], panels, strict=True):
            edges, top = panel.edges, max([*panel.counts, 1])
            width = edges[1] - edges[0]
            axes.bar(edges[:-1], panel.counts, 0.86 * width, align="edge", color=FIRST)
            colour, style = (SECOND, "-") if panel.in_force else (MUTED, (0, (5, 4)))
            axes.axvline(panel.threshold, color=colour, linewidth=1.6, linestyle=style)
            axes.set_title(panel.title, loc="left", color=INK)
            axes.set_title(panel.words, loc="right", color=colour, fontsize=9.5)
            axes.set_xlabel(panel.unit)
            axes.set_xlim(edges[0] - width / 2, edges[-1])
            axes.set_ylim(0, top * 1.08)
            _counts_axis(axes)
            axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
            if panel.open_end:
                last = edges[-1]
                axes.xaxis.set_major_formatter(
                    FuncFormatter(lambda v, _, last=last: f"{v:g}+" if v == last else f"{v:g}")
                )
        return _svg(figure, "; ".join(f"{p.title}: {p.words}" for p in panels))


def number(value: float) -> str:
    """Three digits or so: 1234 → 1,234, 12.34 → 12.3."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    figure.patch.set_alpha(0)
    return figure


def _steps_axis(axes: Axes, steps: Sequence[float]) -> None:
    axes.patch.set_alpha(0)
    axes.set_xlabel("step")
    axes.set_xlim(0, max(steps) * 1.005)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))


def _counts_axis(axes: Axes) -> None:
    axes.patch.set_alpha(0)
    axes.set_ylabel("clips")
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))


def _svg(figure: Figure, label: str) -> str:
    for axes in figure.axes:
        axes.patch.set_alpha(0)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style type.*?</style>", "", text, flags=re.DOTALL)  # such a style would apply to the whole page
    text = re.sub(r" font-family: [^;\"]*;", "", text)  # the family is the page's own
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, variable)
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    assert box is not None
    width, height = float(box[1]), float(box[2])
    head = (
        f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {width} {height}" width="{width:.0f}" '
        f'height="{height:.0f}" xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return head + text[text.index(">") + 1 :]
