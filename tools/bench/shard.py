"""`reelmae bench shard SRC`: sharding against bare ffmpeg doing the same encodes, as many at a time, in one run.

Bare ffmpeg is what a shell would do: `xargs -P WORKERS` over one ffmpeg command line per source, with the same decoder,
filters, encoder and windows (cut by the segment muxer). It does no listing, probing, sandbox, scores, checks of the
output, shards or index, and it gets only the sources that sharding encodes. Both run in turn, `rounds` times, each timed
from start-up to end. `ratio` is the sum of ffmpeg's times over the sum of sharding's: 1 is as fast, less is slower.

With `small_files` N the sources are N two-second files cut from those at SRC first.

With `--runner ray` or `--tars N` sharding is compared with itself instead (shard_ways.py).
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from reelmae.pipeline.cores import usable_cores
from reelmae.pipeline.errors import InputError
from reelmae.pipeline.ingest import encoders
from reelmae.pipeline.ingest.clips.colour import Colour, choose_colour
from reelmae.pipeline.ingest.clips.cut import cut_windows
from reelmae.pipeline.ingest.clips.probe import Probe, Prober
from reelmae.pipeline.ingest.clips.screen import Kept, screen_source
from reelmae.pipeline.ingest.clips.transcode import EncodePlan, main_filters
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.ffmpeg import Tool, find_ffmpeg
from reelmae.pipeline.ingest.plan.sources import list_sources
from reelmae.pipeline.ingest.sandbox import Sandbox
from reelmae.pipeline.storage.store import Store
from reelmae.tools.bench.config import SMALL_S, BenchShardConfig
from reelmae.tools.bench.shard_ways import compare_ways, flags_of, read_facts
from reelmae.tools.machine import machine, versions


def bench_shard(config: BenchShardConfig) -> dict[str, Any]:
    """Measure; raises InputError if SRC is not a local folder, or if nothing in it can be used."""
    store = Store(config.src)
    if not store.is_local or not Path(store.root).is_dir():
        raise InputError(f"{config.src}: give a local folder of videos, since storage is not compared here")
    workers = config.workers or usable_cores()
    with tempfile.TemporaryDirectory(prefix="reelmae-bench-") as folder:
        src = Path(store.root)
        if config.small_files:
            src = small_files(src, Path(folder, "small"), config.small_files, config.shard)
        compare = _compare_ffmpeg if config.contender == "ffmpeg" else compare_ways
        found = compare(config, src, Path(folder), workers)
    return found | {
        "config": config.model_dump(),
        "workers": workers,
        "ffmpeg": find_ffmpeg().version,
        "machine": machine(),
        "versions": versions(),
    }


def _compare_ffmpeg(config: BenchShardConfig, src: Path, folder: Path, workers: int) -> dict[str, Any]:
    settings = config.shard
    scripts, hours = bare_scripts(src, folder, settings)
    rounds = [_round(src, folder, scripts, settings, workers) for _ in range(config.rounds)]
    dataset = rounds[-1].pop("dataset")
    for other in rounds[:-1]:
        other.pop("dataset")
    ours, bare = (sum(r[name] for r in rounds) for name in ("shard_s", "ffmpeg_s"))
    return {
        "ratio": bare / ours,
        "rounds": rounds,
        "sources": dataset["sources"],
        "sources_encoded": len(scripts),
        "clips": dataset["clips"],
        "source_hours": hours,
        "realtime": hours * 3600 * config.rounds / ours,
        "clips_per_s": dataset["clips"] * config.rounds / ours,
    }


def _round(src: Path, folder: Path, scripts: list[Path], settings: ShardConfig, workers: int) -> dict[str, Any]:
    dst, out = folder / "dst", folder / "bare"
    argv = [sys.executable, "-m", "reelmae.tools.cli", "shard", str(src), str(dst), "--json", f"--workers={workers}"]
    argv += flags_of(settings)
    begin = time.perf_counter()
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ours = time.perf_counter() - begin
    listing = "\0".join(str(s) for s in scripts)
    begin = time.perf_counter()
    xargs = ["xargs", "-0", f"-P{workers}", "-n1", "sh"]
    subprocess.run(xargs, input=listing.encode(), check=True, stderr=subprocess.DEVNULL)
    bare = time.perf_counter() - begin
    facts = read_facts(dst)
    files = list(out.rglob("*.mp4"))
    shutil.rmtree(dst)
    for file in files:
        file.unlink()
    return {
        "shard_s": ours,
        "ffmpeg_s": bare,
        "shard_clips": facts["clips"],
        "ffmpeg_clips": len(files),
        "dataset": facts,
    }


def bare_scripts(src: Path, folder: Path, settings: ShardConfig) -> tuple[list[Path], float]:
    """One shell script per usable source below `src`, in the order of names, and the hours of all sources."""
    tool, seconds = find_ffmpeg(), 0.0
    scripts: list[Path] = []
    encoder = encoders.choose(settings, tool.path)
    sandbox = Sandbox()
    prober = Prober(sandbox, folder)
    try:
        for url in list_sources(str(src), settings).table.column("url").to_pylist():
            found = _plan(Path(url), prober, settings, encoder)
            if found is None:
                continue
            probe, plan = found
            out = folder / "bare" / f"{len(scripts):06d}"
            out.mkdir(parents=True)
            script = out / "run.sh"
            script.write_text("exec " + shlex.join(bare_command(tool, Path(url), out, probe, plan, settings)) + "\n")
            scripts.append(script)
            seconds += probe.duration_s
    finally:
        prober.close()
    if not scripts:
        raise InputError(f"{src}: holds no video that can be sharded")
    return scripts, seconds / 3600


def _plan(path: Path, prober: Prober, settings: ShardConfig, encoder: str) -> tuple[Probe, EncodePlan] | None:
    probe = prober.probe(path, max_pixels=settings.max_pixels, wall_s=120)
    if not isinstance(probe, Probe):
        return None
    kept, rule = screen_source(probe, settings), choose_colour(probe, tonemaps=find_ffmpeg().tonemaps)
    if not isinstance(kept, Kept) or not isinstance(rule, Colour):
        return None
    spans, _ = cut_windows(kept.frames, kept.fps, settings.clip_seconds, settings.remainder)
    return probe, EncodePlan(kept, rule, tuple(spans), encoder)


def bare_command(
    tool: Tool, source: Path, out: Path, probe: Probe, plan: EncodePlan, settings: ShardConfig
) -> list[str]:
    """ffmpeg's plain command line for one source: the same picture, encoder and windows."""
    cuts = [span.start for span in plan.spans[1:]]
    options = encoders.options(settings, plan.encoder, scenes=False)
    argv = [tool.path, "-nostdin", "-v", "error", "-threads", "1", "-i", str(source), "-map", f"0:{probe.stream}"]
    argv += ["-vf", main_filters(probe, plan), "-filter_threads", "1", "-frames:v", str(plan.frames)]
    argv += [word for name, value in options.items() for word in (f"-{name}", str(value))]
    argv += ["-flags:v", "+bitexact+cgop"]
    if not cuts:
        return [*argv, "-movflags", "+faststart", str(out / "00000.mp4")]
    argv += ["-force_key_frames", f"expr:not(mod(n,{cuts[0]}))*lte(n,{cuts[-1]})", "-f", "segment"]
    argv += ["-reset_timestamps", "1", "-segment_format", "mp4", "-segment_format_options", "movflags=+faststart"]
    return [*argv, "-segment_frames", ",".join(map(str, cuts)), str(out / "%05d.mp4")]


def small_files(src: Path, to: Path, n: int, settings: ShardConfig) -> Path:
    """`n` files of SMALL_S seconds cut from the usable videos below `src`, in turn, at their own size."""
    tool, sandbox = find_ffmpeg(), Sandbox()
    to.mkdir()
    prober = Prober(sandbox, to)
    try:
        found = [
            (Path(url), plan[0])
            for url in list_sources(str(src), settings).table.column("url").to_pylist()
            if (plan := _plan(Path(url), prober, settings, "x264")) and plan[0].duration_s >= SMALL_S
        ]
    finally:
        prober.close()
    if not found:
        raise InputError(f"{src}: holds no video of {SMALL_S:g} s")
    made = 0
    while made < n:
        for path, probe in found[: n - made]:
            room = max(0.0, probe.duration_s - SMALL_S)
            start = (made * 0.37) % room if room else 0.0
            target = to / f"{made:05d}.mp4"
            argv = [tool.path, "-nostdin", "-v", "error", "-ss", f"{start:.3f}", "-i", str(path), "-t", f"{SMALL_S}"]
            argv += ["-map", f"0:{probe.stream}", "-vf", "scale=-2:'min(360,ih)'", "-pix_fmt", "yuv420p"]
            argv += ["-preset", "veryfast", str(target)]
            subprocess.run(argv, check=True, stderr=subprocess.DEVNULL)
            made += 1
    return to
