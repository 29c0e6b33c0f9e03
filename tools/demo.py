"""`reelmae demo`: the whole path with one command, from a raw bucket to report.html and summary.json.

    OUT/demo.json        what this demo is (src, quick), then its commands, machine and versions
    OUT/bucket/          the generated raw bucket, unless `src` names one
    OUT/shards/          the shard dataset
    OUT/verify.json      every clip decoded, every sum checked
    OUT/train/           the training run
    OUT/reconstruction/  pictures
    OUT/bench_step.json  dense against sparse
    OUT/report.html      OUT/summary.json (last)

The resume contract: a finished stage has a record in OUT/stages, written last, and is not done again. A stage that was
stopped continues where it can (bucket, shards, training), or starts again. Another `src` or `quick` in the same OUT
replaces what the earlier demo made there. An OUT that holds anything else is refused.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from reelmae.pipeline.dataset.verification import verify
from reelmae.pipeline.errors import DatasetError, InputError
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.job import shard
from reelmae.pipeline.storage.store import whole_file
from reelmae.tools import show
from reelmae.tools.bench.step import BenchStepConfig, bench_step
from reelmae.tools.machine import machine, versions
from reelmae.tools.reconstruct import reconstruct
from reelmae.tools.report.facts import BENCH, DEMO, RECONSTRUCTION, SHARDS, TRAIN, VERIFY
from reelmae.tools.report.write import write_report
from reelmae.tools.show import Result
from reelmae.tools.synth.bucket import make_bucket
from reelmae.train.config import load_recipe
from reelmae.train.pretraining import pretrain

BUCKET, STAGES, SUMMARY, REPORT = "bucket", "stages", "summary.json", "report.html"
OURS = (BUCKET, SHARDS, TRAIN, RECONSTRUCTION, STAGES, VERIFY, BENCH, REPORT, SUMMARY, DEMO)
Stage = tuple[Result, str]  # what a stage found, and a line about it for stderr


@dataclass(frozen=True)
class DemoConfig:
    """What the demo is made of."""

    src: str | None = None
    """A bucket (folder or fsspec URL). None: a generated one."""
    out: str = "runs/demo"
    """Folder for everything."""
    quick: bool = False
    """Shorter videos, fewer training steps, a smaller model to time."""

    @property
    def seconds(self) -> float:
        """Mean length of a generated video."""
        return 2.5 if self.quick else 5.0

    @property
    def steps(self) -> int:
        """Training steps."""
        return 120 if self.quick else 600

    @property
    def model_to_time(self) -> str:
        """The preset whose step is timed."""
        return "vit_s" if self.quick else "vit_b"

    def shard_config(self) -> ShardConfig:
        """The generated bucket has a folder for each label; of another bucket nothing is known."""
        if self.src is None:
            return ShardConfig(labels="folder")
        return ShardConfig()


def demo(config: DemoConfig) -> Result:
    """Do what is not done yet; returns what summary.json holds. Raises the errors of the stages."""
    started = time.perf_counter()
    run = _Demo(config)
    run.open()
    if config.src is None:
        run.stage("bucket", run.bucket)
    sharded = run.stage("shard", run.shard)
    run.stage("verify", run.verify)
    trained = run.stage("pretrain", lambda: run.pretrain(sharded["clips"]))
    run.stage("reconstruct", run.reconstruct)
    timed = run.stage("bench step", run.bench)
    _write_json(run.out / DEMO, run.identity | run.provenance(sharded))
    report = run.stage("report", run.report)
    summary = run.summary(sharded, trained, timed) | report
    _write_json(run.out / SUMMARY, summary)
    _say(f"demo done in {time.perf_counter() - started:.0f} s: {report['report']}")
    return json.loads((run.out / SUMMARY).read_text(encoding="utf-8"))


class _Demo:
    def __init__(self, config: DemoConfig) -> None:
        self.config = config
        self.out = Path(config.out)
        self.src = config.src if config.src is not None else str(self.out / BUCKET)
        self.shards, self.train = str(self.out / SHARDS), self.out / TRAIN
        self.identity: Result = {"src": config.src, "quick": config.quick}
        self.done = 0
        self.total = 6 + (config.src is None)

    def open(self) -> None:
        """Make OUT, or resume or replace the demo in it. InputError if it holds something else."""
        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"{self.out}: is a file; give --out a folder")
        if self.out.is_dir() and any(self.out.iterdir()):
            if not (self.out / DEMO).is_file():
                raise InputError(f"{self.out}: holds something that is not a demo; give --out an empty or new folder")
            before = json.loads((self.out / DEMO).read_text(encoding="utf-8"))
            if {k: before.get(k) for k in self.identity} == self.identity:
                return
            _say(f"{self.out} holds a demo of src={before.get('src')}, quick={before.get('quick')}: replaced")
            for name in OURS:
                path = self.out / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self.out.mkdir(parents=True, exist_ok=True)
        _write_json(self.out / DEMO, self.identity)

    def stage(self, name: str, work: Callable[[], Stage]) -> Result:
        """Do one stage, or take its result from its record if there is one; say so on stderr."""
        self.done += 1
        head = f"[{self.done}/{self.total}] {name}"
        record = self.out / STAGES / f"{name.replace(' ', '_')}.json"
        if record.is_file():
            kept = json.loads(record.read_text(encoding="utf-8"))
            _say(f"{head}: done before, {kept['told']}")
            return kept["result"]
        _say(f"{head} …")
        started = time.perf_counter()
        result, line = work()
        _write_json(record, {"result": result, "told": line})
        _say(f"{head}: {line} ({time.perf_counter() - started:.1f} s)")
        return result

    def bucket(self) -> Stage:
        made = make_bucket(self.src, seconds=self.config.seconds)
        line = f"{made.n_videos} videos and {made.n_broken} broken or hostile files, {made.bytes / 1e6:.1f} MB"
        return {"videos": made.n_videos, "broken": made.n_broken, "bytes": made.bytes}, line

    def shard(self) -> Stage:
        with show.ShardProgress() as progress:
            made = shard(self.src, self.shards, self.config.shard_config(), on_progress=progress)
        rejected = sum(made.rejected.values())
        line = f"{made.sources} sources gave {made.clips} clips in {made.shards} shards, {rejected} rejected"
        return asdict(made), line

    def verify(self) -> Stage:
        found = verify(self.shards, deep=True).as_dict()
        if not found["ok"]:
            raise DatasetError(
                f"{self.shards}: {len(found['faults'])} faults, the first: {found['faults'][0]}; remove {self.out} and run again"
            )
        _write_json(self.out / VERIFY, found)
        return found, "every clip decodes, every checksum is right"

    def pretrain(self, clips: int) -> Stage:
        recipe = load_recipe(
            "demo", [f"data.url={self.shards}", f"run.out={self.train}", f"run.steps={self.config.steps}"]
        )
        if clips < recipe.loader.batch_videos:
            # all clips of a small bucket are one batch; the recipe's rule adapts the learning rate
            _say(f"{clips} clips are fewer than a batch of {recipe.loader.batch_videos}: batches of {clips}")
            loader = recipe.loader.model_copy(update={"batch_videos": clips})
            recipe = recipe.model_copy(update={"loader": loader})
        made = pretrain(recipe)
        mae = asdict(recipe.model.mae())
        line = f"{made.steps} steps, loss {made.loss_first:.3f} → {made.loss_last:.3f}, {made.clips_per_s:.1f} clips/s"
        return asdict(made) | {"model": mae}, line

    def reconstruct(self) -> Stage:
        made = reconstruct(self.train, self.shards, self.out / RECONSTRUCTION)
        return made, f"{made['clips']} clips, loss {made['loss']:.3f}"

    def bench(self) -> Stage:
        timed = bench_step(self.bench_config())
        _write_json(self.out / BENCH, timed)
        ms = timed["step_ms"]
        return timed, f"dense {ms['dense']:.0f} ms, sparse {ms['sparse']:.0f} ms"

    def bench_config(self) -> BenchStepConfig:
        return BenchStepConfig(model=self.config.model_to_time, data=self.shards, decoder_mask=0.0)

    def report(self) -> Stage:
        path = write_report(self.out)
        return {"report": str(path)}, f"{path.stat().st_size / 1e6:.1f} MB in one file"

    def provenance(self, sharded: Result) -> Result:
        labels = self.config.shard_config()
        timed = self.bench_config()
        return {
            "shard_seconds": sharded["seconds"],
            "machine": machine(),
            "versions": versions(),
            "commands": [
                f"reelmae demo{f' --src {self.config.src}' if self.config.src else ''} --out {self.out}"
                + (" --quick" if self.config.quick else ""),
                "",
                "# the same, step by step",
                f"reelmae shard {self.src} {self.shards} --labels {labels.labels}",
                f"reelmae verify {self.shards} --deep",
                f"reelmae pretrain demo data.url={self.shards} run.out={self.train} run.steps={self.config.steps}",
                f"reelmae reconstruct {self.train} {self.shards} --out {self.out / RECONSTRUCTION}",
                f"reelmae bench step --model {timed.model} --data {self.shards} --decoder-mask 0",
                f"reelmae report {self.out}",
            ],
        }

    def summary(self, sharded: Result, trained: Result, timed: Result) -> Result:
        about = json.loads((Path(self.shards) / "dataset.json").read_text(encoding="utf-8"))
        return {
            "src": self.src,
            "quick": self.config.quick,
            **{k: about[k] for k in ("sources", "sources_kept", "clips", "shards", "bytes", "rejected")},
            "shard_seconds": sharded["seconds"],
            **{k: trained[k] for k in ("steps", "loss_first", "loss_last", "clips_per_s", "wait_share")},
            "train_seconds": trained["seconds"],
            "step_ms": timed["step_ms"],
            "speedup": timed["speedup"],
            "model": {"pretrained": trained["model"], "timed": timed["model"]},
            "machine": machine(),
            "versions": versions(),
        }


def _write_json(path: Path, value: Result) -> None:
    with whole_file(path) as part:
        part.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
