"""`reelmae bench shard SRC`: sharding against bare ffmpeg doing the same encodes, as many at a time, in one run.

Bare is what a shell would do: `xargs -P WORKERS` over one ffmpeg command line a source, with the same decoder,
filters, encoder and windows (cut by the segment muxer), files left where they fall: no listing, no probing, no
sandbox, no scores, no check of what came out, no shards, no index. Only sources that sharding keeps are given to
it. Both are run in turn, `rounds` times, each from its own start-up to its end; `ratio` is bare's time over
sharding's, of the sums: 1 is as fast, less is slower.

With `small_files` N the sources are N two-second files cut from those at SRC first.
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

import pyarrow.parquet as pq

from reelmae.pipeline import schema
from reelmae.pipeline.cores import usable_cores
from reelmae.pipeline.errors import ConfigError, InputError
from reelmae.pipeline.ingest import encoders
from reelmae.pipeline.ingest.clips.colour import Colour, colour
from reelmae.pipeline.ingest.clips.cut import cut
from reelmae.pipeline.ingest.clips.probe import Probe, Prober
from reelmae.pipeline.ingest.clips.screen import Kept, screen
from reelmae.pipeline.ingest.clips.transcode import Plan, main_filters
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.ffmpeg import Tool, find_ffmpeg
from reelmae.pipeline.ingest.plan.sources import list_sources
from reelmae.pipeline.ingest.sandbox import Sandbox
from reelmae.pipeline.storage.store import Store
from reelmae.tools.bench.config import BenchShardConfig
from reelmae.tools.machine import machine, versions

SMALL_S = 2.0


def bench_shard(config: BenchShardConfig) -> dict[str, Any]:
    """Measure; InputError where SRC is no local folder, or nothing in it can be used."""
    store = Store(config.src)
    if not store.is_local or not Path(store.root).is_dir():
        raise InputError(f"{config.src}: give a local folder of videos: storage is not what is compared here")
    workers = config.workers or usable_cores()
    settings = ShardConfig(profile=config.profile, short_side=config.short_side, clip_seconds=config.clip_seconds)
    if settings.profile == "copy":
        raise ConfigError("profile copy: nothing is encoded that ffmpeg could be compared in")
    with tempfile.TemporaryDirectory(prefix="reelmae-bench-") as folder:
        src = Path(store.root)
        if config.small_files:
            src = small_files(src, Path(folder, "small"), config.small_files, settings)
        scripts, hours = bare_scripts(src, Path(folder), settings)
        rounds = [_round(src, Path(folder), scripts, settings, workers) for _ in range(config.rounds)]
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
        "config": config.model_dump(),
        "workers": workers,
        "ffmpeg": find_ffmpeg().version,
        "machine": machine(),
        "versions": versions(),
    }


def _round(src: Path, folder: Path, scripts: list[Path], settings: ShardConfig, workers: int) -> dict[str, Any]:
    dst, out = folder / "dst", folder / "bare"
    argv = [
        sys.executable, "-m", "reelmae.tools.cli", "shard", str(src), str(dst), "--json", f"--workers={workers}",
        f"--profile={settings.profile}", f"--short-side={settings.short_side}",
        f"--clip-seconds={settings.clip_seconds}",
    ]  # fmt: skip
    begin = time.perf_counter()
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ours = time.perf_counter() - begin
    listing = "\0".join(str(s) for s in scripts)
    begin = time.perf_counter()
    subprocess.run(
        ["xargs", "-0", f"-P{workers}", "-n1", "sh"],
        input=listing.encode(),
        check=True,
        stderr=subprocess.DEVNULL,
    )
    bare = time.perf_counter() - begin
    facts = _facts(dst)
    files = list(out.rglob("*.mp4"))
    result = {
        "shard_s": ours, "ffmpeg_s": bare, "shard_clips": facts["clips"], "ffmpeg_clips": len(files),
        "dataset": facts,
    }  # fmt: skip
    shutil.rmtree(dst)
    for file in files:
        file.unlink()
    return result


def _facts(dst: Path) -> dict[str, Any]:
    index = pq.read_table(dst / schema.INDEX, columns=["source"])
    rejects = pq.read_table(dst / schema.REJECTS_FILE, columns=["source"])
    sources = set(index.column("source").to_pylist()) | set(rejects.column("source").to_pylist())
    return {"clips": index.num_rows, "sources": len(sources)}


def bare_scripts(src: Path, folder: Path, settings: ShardConfig) -> tuple[list[Path], float]:
    """One shell script a usable source below `src`, in the order of names; and their hours in all."""
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


def _plan(path: Path, prober: Prober, settings: ShardConfig, encoder: str) -> tuple[Probe, Plan] | None:
    probe = prober.probe(path, max_pixels=settings.max_pixels, wall_s=120)
    if not isinstance(probe, Probe):
        return None
    kept, rule = screen(probe, settings), colour(probe, tonemaps=find_ffmpeg().tonemaps)
    if not isinstance(kept, Kept) or not isinstance(rule, Colour):
        return None
    spans, _ = cut(kept.frames, kept.fps, settings.clip_seconds, settings.remainder)
    return probe, Plan(kept, rule, tuple(spans), encoder)


def bare_command(tool: Tool, source: Path, out: Path, probe: Probe, plan: Plan, settings: ShardConfig) -> list[str]:
    """ffmpeg's plain command line for one source: the same picture, encoder and windows."""
    cuts = [span.start for span in plan.spans[1:]]
    options = encoders.options(settings, plan.encoder, scenes=False)
    common = [
        tool.path, "-nostdin", "-v", "error", "-threads", "1", "-i", str(source), "-map", f"0:{probe.stream}",
        "-vf", main_filters(probe, plan), "-filter_threads", "1", "-frames:v", str(plan.frames),
        *(word for name, value in options.items() for word in (f"-{name}", str(value))),
        "-flags:v", "+bitexact+cgop",
    ]  # fmt: skip
    if not cuts:
        return [*common, "-movflags", "+faststart", str(out / "00000.mp4")]
    return [
        *common, "-force_key_frames", f"expr:not(mod(n,{cuts[0]}))*lte(n,{cuts[-1]})", "-f", "segment", "-reset_timestamps", "1", "-segment_format", "mp4", "-segment_format_options",
        "movflags=+faststart", "-segment_frames", ",".join(map(str, cuts)),
        str(out / "%05d.mp4"),
    ]  # fmt: skip


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
            argv = [
                tool.path,
                "-nostdin",
                "-v",
                "error",
                "-ss",
                f"{start:.3f}",
                "-i",
                str(path),
                "-t",
                f"{SMALL_S}",
            ]
            argv += ["-map", f"0:{probe.stream}", "-vf", "scale=-2:'min(360,ih)'", "-pix_fmt", "yuv420p"]
            argv += ["-preset", "veryfast", str(target)]
            subprocess.run(argv, check=True, stderr=subprocess.DEVNULL)
            made += 1
    return to
