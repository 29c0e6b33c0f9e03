"""The page itself: facts → HTML text.

Properties that hold: every text that comes from outside (file names, decoders' words, configs) is escaped, the page
runs no script and its content policy forbids scripts and addresses; colours follow the reader's light or dark mode.
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
from reelmae.tools.report.dataset import data_uri
from reelmae.tools.report.write import Facts
from reelmae.tools.show import printable

STYLE = """
:root{color-scheme:light dark;--ink:#1f2328;--muted:#5c6670;--line:#d8dee4;--paper:#fff;--card:#f6f8fa;
--first:#0072b2;--second:#d55e00;--pale:#9ecbe3;--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
@media (prefers-color-scheme:dark){:root{--ink:#e6edf3;--muted:#9aa5b1;--line:#30363d;--paper:#0d1117;--card:#161b22;
--first:#56b4e9;--second:#e69f00;--pale:#2b5f80}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:980px;margin:0 auto;padding:40px 24px 72px}h1{font-size:30px;line-height:1.2;margin:0 0 6px}
h2{font-size:21px;margin:52px 0 6px;padding-top:18px;border-top:1px solid var(--line)}
p{margin:6px 0 14px;max-width:74ch}.muted,.note,figcaption{color:var(--muted)}.note,figcaption{font-size:14px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(164px,1fr));gap:10px;margin:26px 0 0;padding:0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 14px}
.tile dt{color:var(--muted);font-size:13px}.tile dd{margin:2px 0 0;font-size:16.5px;font-weight:600;line-height:1.3}
.tile small{display:block;white-space:normal;font-size:12.5px;font-weight:400;color:var(--muted);line-height:1.35;margin-top:3px}
.sheet{display:grid;grid-template-columns:repeat(auto-fill,minmax(172px,1fr));gap:12px;margin-top:16px}
.sheet figure{margin:0;min-width:0}.sheet .frame{display:flex;justify-content:center;align-items:center;height:108px;
background:var(--card);border:1px solid var(--line);border-radius:6px;overflow:hidden}
.sheet img{display:block;max-width:100%;max-height:108px}.sheet figcaption{font-size:12px;line-height:1.35;margin-top:4px;
overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
figure{margin:16px 0}figure img{max-width:100%;height:auto;display:block}.plate img{width:100%}.plate{background:#fff;border:1px solid var(--line);
border-radius:8px;padding:12px}svg{display:block;width:100%;height:auto;margin:10px 0;font-family:inherit;
stroke-linejoin:round}table{border-collapse:collapse;width:100%;font-size:14.5px;margin:14px 0}
th{text-align:left;font-weight:600;color:var(--muted);font-size:13px}th,td{padding:7px 12px 7px 0;border-bottom:1px solid var(--line);
vertical-align:top}td.n,th.n{text-align:right;padding-right:22px;font-variant-numeric:tabular-nums}
td ul{margin:0;padding:0;list-style:none}td li{margin-bottom:5px;overflow-wrap:anywhere}code,pre{font-family:var(--mono);font-size:13px}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:14px;overflow-x:auto;line-height:1.6}
details summary{cursor:pointer;color:var(--muted);font-size:13.5px}.detail{color:var(--muted);font-size:13px}
.scroll{overflow-x:auto}.missing{background:var(--card);border-left:3px solid var(--second);padding:10px 14px;border-radius:4px}
.missing ul{margin:6px 0 0;padding-left:20px}
.counts{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:4px 40px;align-items:start}.counts table{font-size:14px}
.counts td,.counts th{padding:5px 0}.counts td:first-child{overflow-wrap:anywhere}.counts td.n,.counts th.n{padding:5px 12px 5px 8px;width:1%;
white-space:nowrap}.counts .bar{width:34%;vertical-align:middle}.bar i{display:block;height:10px;min-width:2px;border-radius:2px;background:var(--first)}
@media (max-width:640px){.counts{grid-template-columns:minmax(0,1fr)}}
@media (max-width:560px){main{padding:24px 14px}h1{font-size:25px}}
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(facts: Facts) -> str:
    """The whole document."""
    alone = facts.run is None and facts.demo is None  # a shard dataset: what is missing is what comes next
    sections = [
        _head(facts), "" if alone else _missing(facts), *_dataset(facts), _training(facts), _pictures(facts),
        _timing(facts), _missing(facts) if alone else "", _provenance(facts),
    ]  # fmt: skip
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
        tiles.append(
            (
                "sparse over dense",
                f"{speedup['compute']:.1f}×",
                f"{both:.1f}× with loading" if both else "compute only",
            )
        )
    cells = "".join(
        f"<div class=tile><dt>{t}</dt><dd>{escape(v)}<small>{escape(n)}</small></dd></div>" for t, v, n in tiles
    )
    if facts.rows or facts.run is not None:
        head, told = "From raw video to a pretrained encoder", ", what the model learned and how fast"
    else:
        head, told = "From raw video to shards", ""
    return (
        f"<h1>{head}</h1><p class=muted>A report by reelmae on <code>{escape(printable(facts.title))}</code>: what came in, "
        f"what was made of it{told}.</p><dl class=tiles>{cells}</dl>"
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
        dataset.sheet(facts.store, d), _ingest(facts, d), dataset.in_and_out(d), dataset.scores(d),
        dataset.labels(d), dataset.repeats(d), dataset.how_made(d),
    ]  # fmt: skip


def _ingest(facts: Facts, d: DatasetFacts) -> str:
    text = (
        f"<h2>Sources kept and rejected</h2><p>Of <b>{d.sources:,}</b> sources <b>{d.sources_kept:,}</b> gave {d.clips:,} clips "
        f"in {d.shards:,} shard{'s' * (d.shards != 1)}, and <b>{d.sources_rejected:,}</b> were rejected, each for one reason"
    )
    seconds = (facts.demo or {}).get("shard_seconds")
    text += f"; it took {seconds:.0f} s" if seconds else ""
    if facts.verify is not None:
        faults = facts.verify["faults"]
        text += f". Verified{' by decoding every clip' * facts.verify['deep']}: {f'{len(faults)} faults' if faults else 'no fault found'}"
    job = d.job
    if job is not None and not job.finished:
        text += f". More sources were planned since: {job.tasks_done:,} of {job.tasks:,} tasks are done, and what they gave is not on this page yet"
    return text + ".</p>" + dataset.rejects(d)


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
    sizes += [
        f"{name.replace('_', ' ')} {model[name]}"
        for name in ("frames", "size", "patch", "dim", "depth")
        if model.get(name)
    ]
    mask = loader.get("mask", {})
    about = f"{', '.join(sizes)}; {mask.get('ratio', 0):.0%} of the patches removed ({mask.get('kind')}); batches of "
    about += f"{loader.get('batch_videos')} videos × {loader.get('repeats')} samples."
    return (
        f"<h2>Pretraining</h2><p>{escape(about)} It went at {speed:.1f} clips a second; {_percent(wait)} of the time the model "
        f"waited for data.</p>{loss_chart(facts.rows, baseline=1.0 if normalised else None)}"
        "<p class=note>Squared error on removed patches"
        + (", each normalised to mean 0 and variance 1: knowing only a patch's mean scores 1.0" if normalised else "")
        + f". The bold line is a moving mean.</p>{pace_chart(facts.rows)}"
    )


def _pictures(facts: Facts) -> str:
    if facts.reconstruction is None or facts.pictures is None:
        return ""
    caption = escape(str(facts.reconstruction["caption"]))
    parts = []
    for key, mime, alt in (("animation", "image/webp", "playing"), ("png", "image/png", "frame by frame")):
        path = facts.pictures / Path(facts.reconstruction[key]).name
        if path.is_file():
            uri = data_uri(path.read_bytes(), mime)
            parts.append(
                f'<figure class=plate><img id={key} src="{uri}" alt="original, masked, reconstructed, {alt}"></figure>'
            )
    return (
        "<h2>Reconstructions</h2><p>Windows, crops and masks that were not drawn in training; the model fills in what was "
        f"removed.</p>{parts[0] if parts else ''}<p class=note>{caption}</p>"
        + (f"<details open><summary>Frame by frame</summary>{parts[1]}</details>" if len(parts) > 1 else "")
    )


def _timing(facts: Facts) -> str:
    if facts.bench is None:
        return ""
    b = facts.bench
    groups = [(name, b[key]["dense"], b[key]["sparse"]) for name, key in BARS if b.get(key, {}).get("sparse")]
    tokens = b.get("tokens", {})
    c = b.get("model_config", {})
    sizes = f" on {c['frames']}×{c['size']}×{c['size']}" if c else ""
    text = f"One training step (forward, backward, optimiser) of {b.get('model', 'the model')}{sizes}"
    if "kept" in tokens:
        text += f"; the sparse encoder reads {tokens['kept']:,} of {tokens['all']:,} tokens, the dense one all of them"
    flops = b.get("flops", {})
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
    out = "<h2>Machine, versions, commands</h2><p>" + escape(
        ", ".join(f"{k} {_plain(v)}" for k, v in machine.items() if v) + "." * bool(here) + here
    )
    out += "</p><p class=note>" + escape(" · ".join(f"{k} {_plain(v)}" for k, v in versions.items())) + "</p>"
    commands = demo.get("commands") or _commands(facts)
    return out + f"<pre>{escape(chr(10).join(commands))}</pre>"


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
    """(clips a second, share of time waiting) of the run: of its summary, or of its rows where it has not ended."""
    if facts.summary is not None:
        return facts.summary["clips_per_s"], facts.summary["wait_share"]
    n = len(facts.rows)
    return sum(r["clips_per_s"] for r in facts.rows) / n, sum(r["wait_share"] for r in facts.rows) / n


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.0995 else f"{100 * share:.0f} %"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
