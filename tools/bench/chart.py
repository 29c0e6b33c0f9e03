"""`reelmae bench chart [RESULTS]`: the measured figures of a folder of results as one picture for a README.

The files are what the other benchmarks print with --json, kept under names that say what they are:

    step_*.json      bench step      how many times faster a step with the sparse encoder is
    loaders*.json    bench loaders   clips per processor second: ours and two that a user would write
    shard_*.json     bench shard     speed of sharding as a share of bare ffmpeg's
    load_*.json      bench load      clips per second with one and with two workers

Properties that hold: each number in the picture is one of the files' own, rounded; the result of the command holds
them unrounded. A file that is missing or cannot be used is left out, and the result says which and why. The picture
names the machines of the files it shows, and says whether one of them had a GPU. The same files give the same bytes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from reelmae.pipeline.errors import ConfigError, InputError
from reelmae.pipeline.storage.store import whole_file
from reelmae.tools.bench.config import SMALL_S, ChartConfig
from reelmae.tools.show import Result

OWN_RESULTS = Path(__file__).parent / "results"  # there in a checkout, not in an installed package
BLUE, ORANGE, GREY = "#0072b2", "#e69f00", "#a7adb4"  # told apart by colour-blind eyes too (Okabe and Ito)
INK, MUTED, LINE, PAPER = "#1f2328", "#59636e", "#d1d9e0", "#ffffff"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "svg.hashsalt": "reelmae",
}
OBJECTIVES = {"mae": "MAE-ST", "slowfast": "MAE-ST (SlowFast)", "videomae": "VideoMAE", "motion": "MotionMAE"}
MODELS = {"vit_t": "ViT-T", "vit_s": "ViT-S", "vit_b": "ViT-B", "vit_l": "ViT-L", "vit_h": "ViT-H"}
LOADERS = {
    "reelmae": "reelmae",
    "webdataset_torchcodec": "webdataset + torchcodec",
    "webdataset_pyav": "webdataset + PyAV",
    "mae_st": "MAE-ST style",
}
# folders of the datasets that the committed results were measured on
DATASETS = {
    "d30": "default, 30 fps",
    "d7": "default, 7.5 fps",
    "f30": "fast-decode, 30 fps",
    "f7": "fast-decode, 7.5 fps",
    "v30": "vp9, 30 fps",
}


@dataclass(frozen=True)
class Bars:
    """A panel of horizontal bars."""

    title: str
    note: str
    """What a number means, under the title."""
    series: Sequence[tuple[str, str]]
    """Name in the legend and colour of each bar of a group."""
    groups: dict[str, list[float | None]]
    """Label of a group → the values of its bars. None: not measured."""
    form: str
    """Format of the numbers."""
    mark: tuple[float, str] | None = None
    """A line at this value, and what it means."""
    footnote: str = ""


def draw_chart(config: ChartConfig) -> Result:
    """Draw the picture at `config.out`; returns the plotted values, the machines, and the files that were left out.

    ConfigError where the name of the picture ends in neither .png nor .svg. InputError where nothing can be drawn.
    """
    if config.out.suffix not in (".png", ".svg"):
        raise ConfigError(f"--out {config.out}: give a name that ends in .png or .svg")
    folder = OWN_RESULTS if config.results is None else config.results
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the folder that holds the JSON of `reelmae bench … --json`")
    results = _Results(folder)
    panels = [panel for make in PANELS if (panel := make(results)) is not None]
    for name, reason in results.skipped.items():
        print(f"{name}: left out: {reason}", file=sys.stderr)
    if not panels:
        raise InputError(f"{folder}: holds no result that can be drawn; see `reelmae bench chart --help`")
    with mpl.rc_context(STYLE):
        figure = _draw(panels, results.machines)
        with whole_file(config.out) as part:
            if config.out.suffix == ".svg":
                figure.savefig(part, format="svg", facecolor=PAPER, metadata={"Date": None})
            else:
                figure.savefig(part, format="png", facecolor=PAPER, pil_kwargs={"optimize": True})
    return {
        "out": str(config.out),
        "results": str(folder),
        "plotted": {
            panel.title: {
                group: {name: value for (name, _), value in zip(panel.series, values, strict=True) if value is not None}
                for group, values in panel.groups.items()
            }
            for panel in panels
        },
        "machines": results.machines,
        "files": results.used,
        "skipped": results.skipped,
    }


class _Results:
    """The JSON files of a folder: which are shown, on which machines those were measured, which are left out."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.used: list[str] = []
        self.machines: list[dict[str, Any]] = []
        self.skipped: dict[str, str] = {}
        self._machine_of: dict[str, dict[str, Any]] = {}

    def read(self, pattern: str, value_of: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """Name of a file of this pattern → `value_of` its content."""
        paths = sorted(self.folder.glob(pattern))
        if not paths:
            self.skipped[pattern] = "there is no such file"
        values = {}
        for path in paths:
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                value = value_of(content)
                self._machine_of[path.name] = {name: content["machine"][name] for name in ("cpu", "cores", "gpu")}
            except (ValueError, KeyError, TypeError, AttributeError) as e:
                self.skipped[path.name] = f"it is not a result of this benchmark ({type(e).__name__}: {e})"
            else:
                values[path.name] = value
        return values

    def show(self, name: str) -> None:
        """This file is in the picture."""
        self.used.append(name)
        if (machine := self._machine_of[name]) not in self.machines:
            self.machines.append(machine)

    def skip(self, name: str, reason: str) -> None:
        """This file is not in the picture."""
        self.skipped[name] = reason


# --- the panels ------------------------------------------------------------------------------------------------


def steps(results: _Results) -> Bars | None:
    """Dense time over sparse time of a training step, with and without decoder masking."""

    def read(found: dict[str, Any]) -> tuple[str, str, float, float | None, float | None, bool]:
        settings, masked = found["settings"], found.get("decoder_mask")
        name = f"{OBJECTIVES[settings['objective']]} {MODELS[found['model']]}"
        name += ", bf16" if settings["dtype"] == "bfloat16" else ""
        clip = f"{settings['frames']}×{settings['size']}×{settings['size']}, {settings['mask_ratio']:.0%} masked"
        ratio, speedup = (masked["ratio"], masked["speedup"]["compute"]) if masked else (None, None)
        return name, clip, found["speedup"]["compute"], speedup, ratio, settings["data"] is not None

    found = results.read("step_*.json", read)
    for file in [file for file, values in found.items() if values[-1]]:
        results.skip(file, "it times the loader as well; the step without it is drawn")
        del found[file]
    if not found:
        return None
    clips = {clip for _, clip, *_ in found.values()}
    ratios = {ratio for *_, ratio, _ in found.values() if ratio is not None}
    groups: dict[str, list[float | None]] = {}
    for file, (name, clip, plain, masked, _, _) in found.items():
        _add(groups, name if len(clips) == 1 else f"{name}, {clip}", [plain, masked], file)
        results.show(file)
    predicted = f"{1 - ratios.pop():.0%}" if len(ratios) == 1 else "a part"
    return Bars(
        "Training step: sparse encoder against dense",
        "how many times faster" + (f"; {clips.pop()}" if len(clips) == 1 else ""),
        [("whole decoder", BLUE), (f"decoder masking, {predicted} of tokens predicted", ORANGE)],
        dict(sorted(groups.items(), key=lambda group: (", bf16" in group[0], -(group[1][0] or 0)))),
        "{:.1f}×",
    )


def loaders(results: _Results) -> Bars | None:
    """Clips per processor second of our loader and of two others, for each dataset of the first file."""

    def read(found: dict[str, Any]) -> tuple[dict[str, dict[str, float]], int]:
        rates: dict[str, dict[str, float]] = {}
        for row in found["rows"]:
            rates.setdefault(DATASETS.get(row["data"], row["data"]), {})[row["loader"]] = row["clips_per_cpu_s"]
        return rates, found["config"]["repeats"]

    found = results.read("loaders*.json", read)
    if not found:
        return None
    file, *others = found
    results.show(file)
    for other in others:
        results.skip(other, f"{file} is drawn")
    rates, repeats = found[file]
    there = {name for group in rates.values() for name in group}
    names = [name for name in LOADERS if name in there]
    if len(names) == len(LOADERS):  # of the two over webdataset the faster is drawn
        names.remove("webdataset_pyav")
    return Bars(
        "Loader against two that a user would write",
        f"clips per processor second; {repeats} samples of each decoded clip",
        [(LOADERS[name], colour) for name, colour in zip(names, (BLUE, ORANGE, GREY)[: len(names)], strict=True)],
        {group: [values.get(name) for name in names] for group, values in rates.items()},
        "{:.0f}",
        footnote="MAE-ST style: decodes all frames of a clip, as its code does.",
    )


def loading(results: _Results) -> Bars | None:
    """Clips per second of the loader alone, where one worker and two were measured."""

    def read(found: dict[str, Any]) -> tuple[str, int | None, float]:
        config = found["config"]
        sample = config.get("sample", config)  # in older results these stand beside the other settings
        name = f"{DATASETS.get(config['data'], config['data'])}, R = {config['repeats']}"
        if (sample["frames"], sample["size"]) != (16, 224):
            name += f", {sample['frames']}×{sample['size']}×{sample['size']}"
        return name, config["workers"], found["clips_per_s"]

    found = results.read("load_*.json", read)
    groups: dict[str, list[float | None]] = {}
    for name in dict.fromkeys(name for name, _, _ in found.values()):
        files = {workers: file for file, (other, workers, _) in found.items() if other == name}
        if 1 in files and 2 in files:
            groups[name] = [found[files[workers]][2] for workers in (1, 2)]
            for workers in (1, 2):
                results.show(files[workers])
    for file in found.keys() - set(results.used):
        results.skip(file, "the same with one and with two workers was not measured")
    if not groups:
        return None
    return Bars(
        "Loader alone",
        "clips per second; R samples of each decoded clip",
        [("one worker", GREY), ("two workers", BLUE)],
        groups,
        "{:.0f}",
        footnote="default, fast-decode: profile of the shards, with their frame rate.",
    )


def sharding(results: _Results) -> Bars | None:
    """Speed of sharding over that of bare ffmpeg."""

    def read(found: dict[str, Any]) -> tuple[str, float]:
        small = f"files of {SMALL_S:g} s"
        kind = small if found["config"]["small_files"] else f"files, {60 * found['source_hours']:.0f} min"
        return f"{found['sources']:,} {kind}", found["ratio"]

    groups: dict[str, list[float | None]] = {}
    for file, (name, ratio) in results.read("shard_*.json", read).items():
        _add(groups, name, [ratio], file)
        results.show(file)
    if not groups:
        return None
    return Bars(
        "Sharding against bare ffmpeg",
        "speed as a share of ffmpeg's for the same encodes",
        [("sharding", BLUE)],
        dict(sorted(groups.items(), key=lambda group: -(group[1][0] or 0))),
        "{:.2f}",
        (1.0, "bare ffmpeg"),
    )


def _add(groups: dict[str, list[float | None]], name: str, values: list[float | None], file: str) -> None:
    """Under its name, or with the file's where two are called the same."""
    groups[f"{name} ({Path(file).stem})" if name in groups else name] = values


PANELS = (steps, loaders, loading, sharding)

# --- drawing ---------------------------------------------------------------------------------------------------

GAP = 0.7  # between two groups of bars, in bars
HEAD = 0.088  # height of a panel's title, note and legend, in heights of the figure
BELOW = 0.034  # space below a panel
NUMBER = 0.045  # room for the number beside the longest bar, in widths of the figure


def _draw(panels: Sequence[Bars], machines: Sequence[dict[str, Any]]) -> Figure:
    """Panels in two columns, 1500 × 1050 pixels; all bars are equally thick."""
    figure = Figure(figsize=(10, 7), dpi=150)
    FigureCanvasAgg(figure)
    figure.text(0.02, 0.985, "What was measured", fontsize=15, fontweight="bold", va="top")
    figure.text(0.02, 0.94, _machines_text(machines), fontsize=10.5, color=MUTED, va="top")
    columns, top, bottom = [panels[0::2], panels[1::2]], 0.885, 0.0
    unit = min((top - bottom - (HEAD + BELOW) * len(column)) / sum(map(_rows, column)) for column in columns if column)
    for column, left in zip(columns, (0.02, 0.52), strict=True):
        end = _draw_column(figure, column, left, 0.46, top, unit)
    notes = [panel.footnote for panel in panels if panel.footnote] + ["Drawn by `reelmae bench chart`."]
    figure.text(0.52, end, "\n".join(notes), fontsize=9.5, color=MUTED, va="top", linespacing=1.5)
    return figure


def _machines_text(machines: Sequence[dict[str, Any]]) -> str:
    """Processor and cores of each machine, and whether a GPU took part."""
    names = [f"{m['cores']} cores of {m['cpu']}" + (f" with {m['gpu']}" if m["gpu"] else "") for m in machines]
    if any(m["gpu"] for m in machines):
        return f"Measured on {' and on '.join(names)}."
    return f"Measured on a CPU: {' and '.join(names)}. Nothing here was measured on a GPU."


def _rows(panel: Bars) -> float:
    """Height of a panel in bars."""
    return len(panel.groups) * (len(panel.series) + GAP)


def _draw_column(figure: Figure, panels: Sequence[Bars], left: float, width: float, top: float, unit: float) -> float:
    """Panels one below the other, from `top`, a bar `unit` high; returns where the column ends."""
    labels = _text_width(figure, [name for panel in panels for name in panel.groups]) + 0.012
    for panel in panels:
        height = _rows(panel) * unit
        figure.text(left, top, panel.title, fontsize=12, fontweight="bold", va="top")
        figure.text(left, top - 0.033, panel.note, fontsize=9.5, color=MUTED, va="top")
        axes = figure.add_axes((left + labels, top - HEAD - height, width - labels - NUMBER, height))
        _draw_bars(axes, panel)
        _draw_legend(figure, panel, left, top - 0.061)
        top -= HEAD + height + BELOW
    return top


def _text_width(figure: Figure, names: Sequence[str]) -> float:
    """Width of the longest of these labels, in widths of the figure."""
    widths = [0.0]
    for name in names:
        text = figure.text(0, 0, name, fontsize=10.5)
        widths.append(text.get_window_extent().width / figure.bbox.width)
        text.remove()
    return max(widths)


def _draw_bars(axes: Axes, panel: Bars) -> None:
    high = max(v for values in panel.groups.values() for v in values if v is not None)
    high = max(high, panel.mark[0]) if panel.mark else high
    pitch = len(panel.series) + GAP
    for g, values in enumerate(panel.groups.values()):
        for i, ((_, colour), value) in enumerate(zip(panel.series, values, strict=True)):
            if value is not None:
                y = g * pitch + i
                axes.barh(y, value, height=0.86, color=colour)
                axes.text(value + high * 0.015, y, panel.form.format(value), va="center_baseline", fontsize=10)
    middles = [g * pitch + (len(panel.series) - 1) / 2 for g in range(len(panel.groups))]
    axes.set_yticks(middles, list(panel.groups), va="center_baseline")
    axes.set_ylim(_rows(panel) - 0.5 - GAP / 2, -0.5 - GAP / 2)
    axes.set_xlim(0, high)
    axes.set_xticks([])
    axes.tick_params(length=0, labelsize=10.5, labelcolor=INK)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    if panel.mark is not None:
        axes.axvline(panel.mark[0], color=MUTED, linewidth=2)


def _draw_legend(figure: Figure, panel: Bars, left: float, top: float) -> None:
    """What each colour means, and the line."""
    handles: list[Any] = [Patch(color=colour, label=name) for name, colour in panel.series]
    if panel.mark is not None:
        handles.append(Line2D([], [], color=MUTED, linewidth=2, label=panel.mark[1]))
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(left, top),
        ncols=len(handles),
        frameon=False,
        fontsize=9.5,
        borderpad=0,
        borderaxespad=0,
        handlelength=1.1,
        handletextpad=0.5,
        columnspacing=1.2,
    )
