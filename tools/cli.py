"""`reelmae COMMAND …`: the only place that reads argv, prints results and turns errors into exit statuses.

Exit status: 0 done; 1 failed while running; 2 wrong usage, configuration or input; 130 interrupted (and resumable:
run the same command again). A user's mistake is one line that names the value and the remedy, never a traceback.
With `--json` stdout is one JSON object and all else goes to stderr.

Heavy imports (torch, DALI) happen inside the commands that need them, so `--help` and `shard` start at once.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import tyro
from tyro.conf import Positional, arg, subcommand

from reelmae.pipeline.errors import ConfigError, ReelmaeError
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.tools import show
from reelmae.tools.bench.config import (
    BenchIndexConfig,
    BenchLoadConfig,
    BenchLoadersConfig,
    BenchPlanConfig,
    BenchPresetsConfig,
    BenchShardConfig,
    BenchStepConfig,
)

Result = dict[str, Any]
UNUSABLE_PATH = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP
)  # fmt: skip


@dataclass
class Shard:
    """Turn a bucket of raw video into WebDataset shards. Run it again to resume."""

    src: Annotated[Positional[str], arg(metavar="SRC")]
    """Folder or fsspec URL (s3://…) of raw video, or a manifest (.csv .tsv .parquet .jsonl)."""
    dst: Annotated[Positional[str], arg(metavar="DST")]
    """Folder or fsspec URL for the shards."""
    config: Annotated[ShardConfig, arg(name="")] = field(default_factory=ShardConfig)
    workers: int | None = None
    """Sources worked on at once; the number of cores unless given."""
    append: bool = False
    """Add the sources of SRC that DST does not know yet."""
    retry_rejected: str | None = None
    """Try those sources again that were rejected for this reason; all: for any."""
    limit: int | None = None
    """Plan at most so many sources, a fair draw of all; --append adds the others later."""
    dry_run: bool = False
    """Write nothing: list and plan, try a few sources in a temporary folder, and estimate the whole."""
    json: bool = False
    """One JSON object on stdout."""

    def run(self) -> Result:
        """Shard, with a progress bar on stderr."""
        from reelmae.pipeline.ingest.estimate import estimate
        from reelmae.pipeline.ingest.job import shard

        if self.dry_run and self.retry_rejected is not None:
            raise ConfigError("--dry-run: plans new sources; it has nothing to say about --retry-rejected")
        if self.dry_run:
            return estimate(self.src, self.dst, self.config, workers=self.workers, append=self.append, limit=self.limit)
        with show.ShardProgress() as progress:
            summary = shard(
                self.src, self.dst, self.config, workers=self.workers, append=self.append,
                retry_rejected=self.retry_rejected, limit=self.limit, on_progress=progress,
            )  # fmt: skip
        return asdict(summary) | {"dst": self.dst}


@dataclass
class Verify:
    """Check a shard dataset: the ledger, the index, every byte of the tars, the DALI index; --deep decodes every clip."""

    dst: Annotated[Positional[str], arg(metavar="DST")]
    """Folder or fsspec URL of the shards."""
    deep: bool = False
    """Decode every clip in full, on all cores."""
    repair: bool = False
    """Mend what is damaged: shards are made again from their sources, the same byte for byte; the rest from them."""
    json: bool = False
    """One JSON object on stdout."""

    def run(self) -> Result:
        """Verify, and mend; the exit status is 0 only where there is no fault in the end."""
        from reelmae.pipeline.dataset.repairs import repair
        from reelmae.pipeline.dataset.verification import verify

        report = repair(self.dst, deep=self.deep) if self.repair else verify(self.dst, deep=self.deep)
        return report.as_dict() | {"exit_status": 0 if report.ok else 1}


@dataclass
class Pretrain:
    """Pretrain a masked autoencoder on shards. Run it again to resume."""

    recipe: Annotated[Positional[str], arg(metavar="RECIPE")]
    """A recipe by name (demo, mae_st_vit_b, mae_st_vit_l, motion_mae_vit_b, videomae_vit_b) or a TOML file."""
    overrides: Annotated[Positional[tuple[str, ...]], arg(metavar="KEY=VALUE")] = ()
    """Settings over the recipe's, such as data.url=shards run.out=runs/a optim.blr=1e-3."""
    json: bool = False
    """One JSON object on stdout."""

    def run(self) -> Result:
        """Pretrain to the recipe's last step."""
        from reelmae.train.config import load
        from reelmae.train.pretraining import pretrain

        return asdict(pretrain(load(self.recipe, self.overrides)))


@dataclass
class Reconstruct:
    """Draw original | masked | reconstructed, as PNG and as an animated picture."""

    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")]
    """A checkpoint file, or the run's folder (its newest is taken)."""
    data: Annotated[Positional[str], arg(metavar="DATA")]
    """Folder or fsspec URL of shards."""
    out: Path = Path("reconstructions")
    """Folder for the pictures."""
    clips: int = 6
    """How many clips."""
    seed: int = 0
    """Another seed draws other clips, windows and masks."""
    json: bool = False
    """One JSON object on stdout."""

    def run(self) -> Result:
        """Reconstruct."""
        from reelmae.tools.reconstruct import reconstruct

        return reconstruct(self.checkpoint, self.data, self.out, clips=self.clips, seed=self.seed)


@dataclass
class ImportWeights:
    """Read a checkpoint of mae_st, PySlowFast, VideoMAE, timm or ours; write it as safetensors with its config."""

    src: Annotated[Positional[Path], arg(metavar="SRC")]
    """A checkpoint file; its layout is told by its content."""
    out: Annotated[Positional[Path], arg(metavar="OUT.safetensors")]
    """The file to write."""
    frames: int | None = None
    """Frames of a clip; other than the file's: positions are resized."""
    size: int | None = None
    """Side of a clip in pixels; other than the file's: positions are resized."""
    heads: int | None = None
    """Attention heads of the encoder, where its width is no published one."""
    decoder_heads: int | None = None
    """The same of the decoder."""
    patch: int | None = None
    """Side of a patch in pixels, where the file is of our layout and has no config."""
    grid: tuple[int, int, int] | None = None
    """Tokens along time, height and width of a file with one joint table of positions; an error where the file says another."""
    allow: tuple[str, ...] = ()
    """Patterns of keys of the file that may be left, such as 'head.*'."""
    encoder_only: bool = False
    """Read and write the encoder alone; the rest of the file is left unread."""
    json: bool = False
    """One JSON object on stdout."""

    def run(self) -> Result:
        """Import."""
        from reelmae.tools.convert import import_weights

        return import_weights(
            self.src, self.out, allow=self.allow, grid=self.grid, encoder_only=self.encoder_only,
            frames=self.frames, size=self.size, heads=self.heads, decoder_heads=self.decoder_heads, patch=self.patch,
        )  # fmt: skip


@dataclass
class Export:
    """Write a model for others: safetensors with its config, or the layout that another code reads."""

    checkpoint: Annotated[Positional[Path], arg(metavar="CHECKPOINT")]
    """A checkpoint, the run's folder (its newest is taken), or a safetensors file of ours."""
    out: Annotated[Positional[Path], arg(metavar="OUT")]
    """The file to write; a foreign layout is written as safetensors where this ends in .safetensors."""
    format: Literal["safetensors", "timm", "mae_st", "slowfast", "videomae"] = "safetensors"
    """safetensors: ours, with the config; timm: the encoder, or the classifier."""
    encoder_only: bool = False
    """Write the encoder alone."""
    json: bool = False
    """One JSON object on stdout."""

    def run(self) -> Result:
        """Export."""
        from reelmae.tools.convert import export

        return export(self.checkpoint, self.out, format=self.format, encoder_only=self.encoder_only)


@dataclass
class Features:
    """Write frozen features: one vector for each view of every clip, as one parquet file with a summary beside it."""

    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")]
    """A run's folder (its newest checkpoint is taken), a checkpoint, or exported weights (.safetensors)."""
    data: Annotated[Positional[str], arg(metavar="DATA")]
    """Folder or fsspec URL of shards."""
    out: Path = Path("features.parquet")
    """The file: key, label, label_id, view, feature. The summary goes beside it, as .json."""
    views: int = 1
    """Windows of each clip, spread evenly over it."""
    pool: Literal["mean", "cls"] = "mean"
    """The mean of the encoder's tokens, or its class token."""
    fps: float | None = None
    """Frames a second within a window; as the checkpoint was trained unless given."""
    where: str | None = None
    """Only clips for which this holds, such as "duration > 4 and label != 'x'"."""
    batch: int = 8
    """Views that go through the encoder at a time."""
    workers: int | None = None
    """Processes that decode; one per core unless given, 0: none, in this process."""
    device: str = "auto"
    """auto: cuda where there is one."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """auto: bf16 on CUDA, float32 on CPU."""
    json: bool = False
    """One JSON object on stdout."""

    def run(self) -> Result:
        """Encode every clip, with a progress bar on stderr."""
        from reelmae.train.features import ClipProgress, features

        with ClipProgress() as progress:
            return features(
                self.checkpoint, self.data, self.out, views=self.views, pool=self.pool, fps=self.fps, where=self.where,
                batch=self.batch, workers=self.workers, device=self.device, precision=self.precision, on_progress=progress,
            )  # fmt: skip


@dataclass
class Report:
    """Write one self-contained HTML page about a shard dataset, a run, or both."""

    run_dir: Annotated[Positional[Path], arg(metavar="RUN")]
    """The demo's folder, a training run, or a shard dataset."""
    out: Path | None = None
    """The page; RUN/report.html unless given."""
    json: bool = False
    """One JSON object on stdout."""

    def run(self) -> Result:
        """Write the page."""
        from reelmae.tools.report.write import write_report

        return {"report": str(write_report(self.run_dir, out=self.out))}


@dataclass
class Inspect:
    """Tell on the terminal what a shard dataset holds: what came in and out, rejects, scores, labels, repeats."""

    dst: Annotated[Positional[str], arg(metavar="DST")]
    """Folder or fsspec URL of the shards."""
    rejects: Annotated[tuple[str, ...] | None, arg(metavar="[REASON ...]")] = None
    """List every rejected source and span, or those of these reasons: reason, source, start, end, detail, by tabs."""
    source: str | None = None
    """List what became of the sources whose URL holds this text."""
    json: bool = False
    """One JSON object on stdout."""

    def run(self) -> Result:
        """Print the tables or lines; with --json nothing is printed here."""
        from reelmae.tools.summary import inspect

        return inspect(self.dst, rejects=self.rejects, source=self.source, as_json=self.json)


@dataclass
class Demo:
    """The whole path with one command: raw bucket, shards, pretraining, reconstructions, timings, report.html."""

    src: str | None = None
    """Your own bucket (folder or fsspec URL); a generated one unless given."""
    out: Path = Path("runs/demo")
    """Where everything goes; run again to resume."""
    quick: bool = False
    """The short form: shorter videos, fewer steps."""
    json: bool = False
    """One JSON object on stdout."""

    def run(self) -> Result:
        """Run the demo."""
        from reelmae.tools.demo import DemoConfig, demo

        return demo(DemoConfig(src=self.src, out=str(self.out), quick=self.quick))


@dataclass
class Doctor:
    """Say what this machine can do: ffmpeg and its encoders, sandbox, DALI, GPU, storage."""

    json: bool = False
    """One JSON object on stdout."""

    def run(self) -> Result:
        """Look at the machine."""
        from reelmae.tools.doctor import doctor

        return doctor()


@dataclass
class BenchStep:
    """Time a training step, dense encoder against sparse; with --data also behind the real loader."""

    config: Annotated[BenchStepConfig, arg(name="")] = field(default_factory=BenchStepConfig)
    json: bool = False
    """One JSON object on stdout."""

    def run(self) -> Result:
        """Measure."""
        from reelmae.tools.bench.step import bench_step

        return bench_step(self.config)


@dataclass
class BenchLoad:
    """Time the loader alone: clips per second and per processor second, time of each stage, memory."""

    config: Annotated[BenchLoadConfig, arg(name="")]
    json: bool = False
    """One JSON object on stdout."""

    def run(self) -> Result:
        """Measure."""
        from reelmae.tools.bench.load import bench_load

        return bench_load(self.config)


@dataclass
class BenchLoaders:
    """Time the loader against those a user would write, on one core each: clips for each processor second."""

    config: Annotated[BenchLoadersConfig, arg(name="")]
    json: bool = False
    """One JSON object on stdout."""

    def run(self) -> Result:
        """Measure."""
        from reelmae.tools.bench.loaders import bench_loaders

        return bench_loaders(self.config)


@dataclass
class BenchShard:
    """Time sharding against bare ffmpeg doing the same encodes, as many at a time."""

    config: Annotated[BenchShardConfig, arg(name="")]
    json: bool = False
    """One JSON object on stdout."""

    def run(self) -> Result:
        """Measure."""
        from reelmae.tools.bench.shard import bench_shard

        return bench_shard(self.config)


@dataclass
class BenchPlan:
    """Time and memory of planning and resuming a job of a generated million sources."""

    config: Annotated[BenchPlanConfig, arg(name="")] = field(default_factory=BenchPlanConfig)
    json: bool = False
    """One JSON object on stdout."""

    def run(self) -> Result:
        """Measure."""
        from reelmae.tools.bench.plan import bench_plan

        return bench_plan(self.config)


@dataclass
class BenchIndex:
    """Time and memory of opening a generated index of ten million clips, to the first batch's order and draws."""

    config: Annotated[BenchIndexConfig, arg(name="")] = field(default_factory=BenchIndexConfig)
    json: bool = False
    """One JSON object on stdout."""

    def run(self) -> Result:
        """Measure."""
        from reelmae.tools.bench.index import bench_index

        return bench_index(self.config)


@dataclass
class BenchPresets:
    """Measure what x264's presets cost and give at the settings of a training clip."""

    config: Annotated[BenchPresetsConfig, arg(name="")]
    json: bool = False
    """One JSON object on stdout."""

    def run(self) -> Result:
        """Measure."""
        from reelmae.tools.bench.presets import bench_presets

        return bench_presets(self.config)


@dataclass
class Bench:
    """Measure where the time goes."""

    what: (
        Annotated[BenchStep, subcommand("step")]
        | Annotated[BenchLoad, subcommand("load")]
        | Annotated[BenchLoaders, subcommand("loaders")]
        | Annotated[BenchShard, subcommand("shard")]
        | Annotated[BenchPlan, subcommand("plan")]
        | Annotated[BenchIndex, subcommand("index")]
        | Annotated[BenchPresets, subcommand("presets")]
    )

    @property
    def json(self) -> bool:
        """Whether stdout is one JSON object."""
        return self.what.json

    def run(self) -> Result:
        """Run the chosen benchmark."""
        return self.what.run()


Command = (
    Annotated[Demo, subcommand("demo")]
    | Annotated[Shard, subcommand("shard")]
    | Annotated[Verify, subcommand("verify")]
    | Annotated[Pretrain, subcommand("pretrain")]
    | Annotated[Reconstruct, subcommand("reconstruct")]
    | Annotated[ImportWeights, subcommand("import-weights")]
    | Annotated[Export, subcommand("export")]
    | Annotated[Features, subcommand("features")]
    | Annotated[Bench, subcommand("bench")]
    | Annotated[Report, subcommand("report")]
    | Annotated[Inspect, subcommand("inspect")]
    | Annotated[Doctor, subcommand("doctor")]
)


def parse(argv: list[str]) -> Command:
    """argv → one command. Exits with 2 on an unknown flag; ConfigError on a value out of range."""
    try:
        return tyro.cli(
            Command,
            prog="reelmae",
            description="Raw video buckets to shards to pretrained encoders, at the accelerator's pace.",
            args=argv,
            config=(
                tyro.conf.OmitArgPrefixes,
                tyro.conf.OmitSubcommandPrefixes,
                tyro.conf.FlagCreatePairsOff,
            ),
        )
    except pydantic.ValidationError as e:
        raise ConfigError("; ".join(_wrong_value(error) for error in e.errors())) from e


def _wrong_value(error: Any) -> str:
    """One of pydantic's errors: of a flag, or, where it has no place, of several together."""
    message = error["msg"].removeprefix("Value error, ")
    flag = ".".join(map(str, error["loc"])).replace("_", "-")
    return f"--{flag} {error['input']}: {message}" if flag else message


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in args
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a preempted job ends as Ctrl-C does: resumable
    try:
        command = parse(args)
        result = command.run()
    except KeyboardInterrupt:
        return _fail("interrupted; nothing half-done counts: run the same command again to resume", 130, as_json)
    except ReelmaeError as e:
        return _fail(str(e), e.exit_status, as_json)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            return _fail(f"{e.filename or 'disk'}: no space left; free some and run again (it resumes)", 1, as_json)
        if e.errno in UNUSABLE_PATH and e.filename is not None:
            return _fail(f"{e.filename}: {e.strerror}; check the path and its rights", 2, as_json)
        raise
    try:
        if as_json:
            print(json.dumps(result, indent=2, default=str), flush=True)
        else:
            show.result(result)
    except BrokenPipeError:  # `| head` has seen enough; what Python would still flush goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return int(result.get("exit_status", 0))


def _fail(message: str, status: int, as_json: bool) -> int:
    print(f"reelmae: {message}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": message, "exit_status": status}))
    return status


if __name__ == "__main__":
    sys.exit(main())
