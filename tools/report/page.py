"""The page itself: facts → HTML text.

Properties that hold: every text from outside (file names, decoders' words, configs) is escaped; the page runs no
script, and its content policy forbids scripts and addresses; colours follow the reader's light or dark mode.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from reelmae.pipeline.dataset.contents import DatasetFacts
from reelmae.tools.report import dataset
from reelmae.tools.report.charts import bars_chart, loss_chart, number, pace_chart
from reelmae.tools.report.contact_sheet import data_uri, sheet
from reelmae.tools.report.facts import Facts
from reelmae.tools.report.style import STYLE
from reelmae.tools.show import printable, retries_text

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(facts: Facts) -> str:
    """The whole document."""
    shards_only = facts.run is None and facts.demo is None  # then the missing parts are the next steps: near the end
    sections = [
        _head(facts),
        "" if shards_only else _missing(facts),
        *_dataset(facts),
        _training(facts),
        _pictures(facts),
        _timing(facts),
        _missing(facts) if shards_only else "",
        _provenance(facts),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>reelmae report: {escape(facts.title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main></body></html>\n"
    )


# --- parts -----------------------------------------------------------------------------------------------------


def _head(facts: Facts) -> str:
    tiles: list[tuple[str, str, str]] = []
    if facts.dataset is not None:
        tiles += dataset.tiles(facts.dataset)
    if facts.rows:
        first, last = (facts.summary or {}).get("loss_first", facts.rows[0]["loss"]), facts.rows[-1]["loss"]
        last = (facts.summary or {}).get("loss_last", last)
        tiles.append(("loss", f"{first:.2f} → {last:.2f}", f"{int(facts.rows[-1]['step']):,} steps"))
        speed, wait = _pace(facts)
        tiles.append(("training", f"{speed:.1f} clips/s", f"{_percent(wait)} of the time waiting for data"))
    speedup = (facts.bench or {}).get("speedup", {})
    if "compute" in speedup:
        both = speedup.get("load_compute")
        note = f"{both:.1f}× with loading" if both else "compute only"
        tiles.append(("sparse over dense", f"{speedup['compute']:.1f}×", note))
    cells = "".join(
        f"<div class=tile><dt>{t}</dt><dd>{escape(v)}<small>{escape(n)}</small></dd></div>" for t, v, n in tiles
    )
    if facts.rows or facts.run is not None:
        title, model = "From raw video to a pretrained encoder", ", what the model learned and how fast"
    else:
        title, model = "From raw video to shards", ""
    return (
        f"<h1>{title}</h1><p class=muted>A report by reelmae on <code>{escape(printable(facts.title))}</code>: "
        f"what came in, what was made of it{model}.</p><dl class=tiles>{cells}</dl>"
    )


def _missing(facts: Facts) -> str:
    if not facts.missing:
        return ""
    items = "".join(f"<li>{escape(what)}: <code>{escape(how)}</code></li>" for what, how in facts.missing)
    return f"<div class=missing style='margin-top:36px'>Not in this report, and what makes it:<ul>{items}</ul></div>"


def _dataset(facts: Facts) -> list[str]:
    if facts.store is None or facts.dataset is None:
        return []
    d = facts.dataset
    return [
        sheet(facts.store, d),
        _ingest(facts, d),
        dataset.in_and_out(d),
        dataset.scores(d),
        dataset.labels(d),
        dataset.repeats(d),
        dataset.settings(d),
    ]


def _ingest(facts: Facts, d: DatasetFacts) -> str:
    text = (
        f"<h2>Sources kept and rejected</h2><p>Of <b>{d.sources:,}</b> sources <b>{d.sources_kept:,}</b> gave "
        f"{d.clips:,} clips in {d.shards:,} shard{'s' * (d.shards != 1)}, and <b>{d.sources_rejected:,}</b> were "
        "rejected, each for one reason"
    )
    seconds = (facts.demo or {}).get("shard_seconds")
    text += f"; it took {seconds:.0f} s" if seconds else ""
    if facts.verify is not None:
        faults = facts.verify["faults"]
        result = f"{len(faults)} faults" if faults else "no fault found"
        text += f". Verified{' by decoding every clip' * facts.verify['deep']}: {result}"
    job = d.job
    if job is not None and not job.finished:
        text += (
            f". More sources were planned since: {job.tasks_done:,} of {job.tasks:,} tasks are done, and their clips "
        )
        text += "are not on this page yet"
    claim = f"<p class=note>When this page was written: {escape(facts.claim)}.</p>" if facts.claim else ""
    return text + ".</p>" + claim + dataset.rejects(d)


def _training(facts: Facts) -> str:
    if not facts.rows:
        return ""
    config = facts.config or {}
    model, loader = config.get("model", {}), config.get("loader", {})
    plain = model.get("objective") != "motion" and model.get("target") != "hog"
    normalised = plain and model.get("target_norm") != "none"
    speed, wait = _pace(facts)
    sizes = [f"ViT-{model['preset']}"] if model.get("preset") else []
    sizes += [f"objective {model['objective']}"] if model.get("objective") else []
    sizes += [f"{name} {model[name]}" for name in ("frames", "size", "patch", "dim", "depth") if model.get(name)]
    mask = loader.get("mask", {})
    about = f"{', '.join(sizes)}; {mask.get('ratio', 0):.0%} of the patches removed ({mask.get('kind')}); batches of "
    about += f"{loader.get('batch_videos')} videos × {loader.get('repeats')} samples."
    unit = ", each normalised to mean 0 and variance 1: knowing only a patch's mean scores 1.0" if normalised else ""
    return (
        f"<h2>Pretraining</h2><p>{escape(about)} It ran at {speed:.1f} clips a second; {_percent(wait)} of the time "
        f"the model waited for data.</p>{loss_chart(facts.rows, baseline=1.0 if normalised else None)}"
        f"<p class=note>Squared error on removed patches{unit}. The bold line is a moving mean.</p>"
        f"{pace_chart(facts.rows)}{_retries(facts)}"
    )


def _retries(facts: Facts) -> str:
    """How often the dataset's store had to be asked again; "" where it never had to."""
    causes, count = (facts.summary or {}).get("retries", {}), int(facts.rows[-1].get("retries", 0))
    if not causes and not count:
        return ""
    words = retries_text(causes) if causes else f"{count:,}"
    return f"<p class=note>Reading the clips was tried again: {escape(printable(words))}. The batches are the same.</p>"


def _pictures(facts: Facts) -> str:
    if facts.reconstruction is None or facts.pictures is None:
        return ""
    caption = escape(str(facts.reconstruction["caption"]))
    figures = []
    for key, mime, alt in (("animation", "image/webp", "playing"), ("png", "image/png", "frame by frame")):
        path = facts.pictures / Path(facts.reconstruction[key]).name
        if path.is_file():
            uri = data_uri(path.read_bytes(), mime)
            image = f'<img id={key} src="{uri}" alt="original, masked, reconstructed, {alt}">'
            figures.append(f"<figure class=plate>{image}</figure>")
    first = figures[0] if figures else ""
    second = f"<details open><summary>Frame by frame</summary>{figures[1]}</details>" if len(figures) > 1 else ""
    return (
        "<h2>Reconstructions</h2><p>Windows, crops and masks that were not drawn in training; the model fills in what "
        f"was removed.</p>{first}<p class=note>{caption}</p>{second}"
    )


def _timing(facts: Facts) -> str:
    if facts.bench is None:
        return ""
    bench = facts.bench
    groups = [
        (name, bench[key]["dense"], bench[key]["sparse"]) for name, key in BARS if bench.get(key, {}).get("sparse")
    ]
    tokens = bench.get("tokens", {})
    config = bench.get("model_config", {})
    sizes = f" on {config['frames']}×{config['size']}×{config['size']}" if config else ""
    text = f"One training step (forward, backward, optimiser) of {bench.get('model', 'the model')}{sizes}"
    if "kept" in tokens:
        text += f"; the sparse encoder reads {tokens['kept']:,} of {tokens['all']:,} tokens, the dense one all of them"
    flops = bench.get("flops", {})
    lines = ""
    if flops.get("sparse"):
        lines = (
            f"<p class=note>FLOPs: dense {number(flops['dense'] / 1e9)} G, sparse {number(flops['sparse'] / 1e9)} G, "
            f"{flops['dense'] / flops['sparse']:.1f}× fewer.</p>"
        )
    return f"<h2>Dense against sparse</h2><p>{escape(text)}. Medians.</p>{bars_chart(groups, unit='ms')}{lines}"


BARS = (("compute", "step_ms"), ("load + compute", "load_step_ms"))


def _provenance(facts: Facts) -> str:
    demo, bench = facts.demo or {}, facts.bench or {}
    machine, versions = (demo.get(k) or bench.get(k) or {} for k in ("machine", "versions"))
    here = ""
    if not machine:
        here = " The machine is the one that wrote this page."
        from reelmae.tools.machine import machine as this_machine
        from reelmae.tools.machine import versions as these_versions

        machine, versions = this_machine(), these_versions()
    tools = (facts.dataset.about if facts.dataset else {}).get("tools") or {}
    versions = {**versions, **{k: v for k, v in tools.items() if k not in versions}}
    if "ffmpeg" in versions:
        versions["ffmpeg"] = str(versions["ffmpeg"]).removeprefix("ffmpeg version ").partition(" Copyright")[0]
    machine_text = ", ".join(f"{k} {_plain(v)}" for k, v in machine.items() if v) + "." * bool(here) + here
    versions_text = " · ".join(f"{k} {_plain(v)}" for k, v in versions.items())
    commands = "\n".join(demo.get("commands") or _commands(facts))
    return (
        f"<h2>Machine, versions, commands</h2><p>{escape(machine_text)}</p><p class=note>{escape(versions_text)}</p>"
        f"<pre>{escape(commands)}</pre>"
    )


def _commands(facts: Facts) -> Iterable[str]:
    if facts.dataset is not None:
        yield f"reelmae shard {facts.dataset.about.get('src', 'SRC')} {facts.data}{_flags(facts.dataset)}"
        yield f"reelmae verify {facts.data} --deep"
    if facts.run is not None:
        yield f"reelmae pretrain RECIPE data.url={facts.data or 'DST'} run.out={facts.run}"
    if facts.reconstruction is not None:
        yield f"reelmae reconstruct {facts.run or 'RUN'} {facts.data or 'DST'} --out {facts.pictures}"


def _flags(dataset: DatasetFacts) -> str:
    """The settings that differ from the defaults, as flags of the command line."""
    return "".join(
        f" --{name.replace('_', '-')}" + ("" if value is True else f" {shlex.quote(str(value))}")
        for name, value, _ in dataset.changed
        if value is not None and value is not False
    )


# --- words -----------------------------------------------------------------------------------------------------


def _pace(facts: Facts) -> tuple[float, float]:
    """(clips a second, share of time waiting) from the run's summary, or from its rows where it has not ended."""
    if facts.summary is not None:
        return facts.summary["clips_per_s"], facts.summary["wait_share"]
    n = len(facts.rows)
    return sum(r["clips_per_s"] for r in facts.rows) / n, sum(r["wait_share"] for r in facts.rows) / n


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.0995 else f"{100 * share:.0f} %"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
