"""`reelmae demo`: the whole path with one command, from a raw bucket to report.html and summary.json.

    OUT/demo.json        what this demo is (src, quick), then its commands, machine and versions
    OUT/bucket/          the generated raw bucket, unless `src` names one
    OUT/shards/          the shard dataset
    OUT/verify.json      every clip decoded, every sum checked
    OUT/train/           the training run
    OUT/reconstruction/  pictures
    OUT/bench_step.json  dense against sparse
    OUT/report.html      OUT/summary.json (last)

The resume contract: a stage that is finished has its record in OUT/stages, written last, and is not done again;
a stage that was stopped goes on where it can (bucket, shards, training) or starts anew. Another `src` or `quick`
in the same OUT replaces what the earlier demo made there; an OUT that holds anything else is refused.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reelmae.pipeline.dataset.verification import verify
from reelmae.pipeline.errors import DatasetError, InputError
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.job import shard
from reelmae.pipeline.storage.store import whole_file
from reelmae.tools import show
from reelmae.tools.bench.step import BenchStepConfig, bench_step
from reelmae.tools.machine import machine, versions
from reelmae.tools.reconstruct import reconstruct
from reelmae.tools.report.write import BENCH, DEMO, RECONSTRUCTION, SHARDS, TRAIN, VERIFY, write_report
from reelmae.tools.synth.bucket import make_bucket
from reelmae.train.config import load
from reelmae.train.pretraining import pretrain

BUCKET, STAGES, SUMMARY, REPORT = "bucket", "stages", "summary.json", "report.html"
OURS = (BUCKET, SHARDS, TRAIN, RECONSTRUCTION, STAGES, VERIFY, BENCH, REPORT, SUMMARY, DEMO)
Result = dict[str, Any]


@dataclass(frozen=True)
class DemoConfig:
    """`src` a bucket (folder or fsspec URL), None = a generated one; `quick` the short form."""

    src: str | None = None
    out: str = "runs/demo"
    quick: bool = False

    @property
    def seconds(self) -> float:
        """Mean length of a generated video."""
        return 2.5 if self.quick else 5.0

    @property
    def steps(self) -> int:
        """Training steps."""
        return 120 if self.quick else 600

    @property
    def timed_model(self) -> str:
        """The preset whose step is timed."""
        return "vit_s" if self.quick else "vit_b"

    def shard_config(self) -> ShardConfig:
        """The generated bucket has labels by folder; nothing is known of another."""
        if self.src is None:
            return ShardConfig(labels="folder")
        return ShardConfig()


def demo(config: DemoConfig) -> Result:
    """Do what is not done yet and return what summary.json holds. Errors are those of the stages."""
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
        """Take OUT: new, ours to go on with, ours to replace, or refused."""
        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"{self.out}: is a file; give --out a folder")
        if self.out.is_dir() and any(self.out.iterdir()):
            if not (self.out / DEMO).is_file():
                raise InputError(f"{self.out}: holds something that is no demo; give --out an empty or new folder")
            before = json.loads((self.out / DEMO).read_text(encoding="utf-8"))
            if {k: before.get(k) for k in self.identity} == self.identity:
                return
            _say(f"{self.out} holds a demo of src={before.get('src')}, quick={before.get('quick')}: replaced")
            for name in OURS:
                path = self.out / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self.out.mkdir(parents=True, exist_ok=True)
        _write_json(self.out / DEMO, self.identity)

    def stage(self, name: str, work: Callable[[], Result]) -> Result:
        """Do one stage, unless its record is there; say so on stderr."""
        self.done += 1
        head = f"[{self.done}/{self.total}] {name}"
        record = self.out / STAGES / f"{name.replace(' ', '_')}.json"
        if record.is_file():
            kept = json.loads(record.read_text(encoding="utf-8"))
            _say(f"{head}: done before, {kept['told']}")
            return kept["result"]
        _say(f"{head} …")
        started = time.perf_counter()
        result = work()
        told = str(result.pop("told"))
        _write_json(record, {"result": result, "told": told})
        _say(f"{head}: {told} ({time.perf_counter() - started:.1f} s)")
        return result

    def bucket(self) -> Result:
        made = make_bucket(self.src, seconds=self.config.seconds)
        return {
            "videos": made.videos, "broken": made.broken, "bytes": made.bytes,
            "told": f"{made.videos} videos and {made.broken} broken or hostile files, {made.bytes / 1e6:.1f} MB",
        }  # fmt: skip

    def shard(self) -> Result:
        with show.ShardProgress() as progress:
            made = shard(self.src, self.shards, self.config.shard_config(), on_progress=progress)
        told = f"{made.sources} sources gave {made.clips} clips in {made.shards} shards, {sum(made.rejected.values())} rejected"
        return asdict(made) | {"told": told}

    def verify(self) -> Result:
        found = verify(self.shards, deep=True).as_dict()
        if not found["ok"]:
            raise DatasetError(
                f"{self.shards}: {len(found['faults'])} faults, the first: {found['faults'][0]}; remove {self.out} and run again"
            )
        _write_json(self.out / VERIFY, found)
        return found | {"told": "every clip decoded, every sum right"}

    def pretrain(self, clips: int) -> Result:
        recipe = load("demo", [f"data.url={self.shards}", f"run.out={self.train}", f"run.steps={self.config.steps}"])
        if clips < recipe.loader.batch_videos:
            # a small bucket: all its clips are one batch; the learning rate follows by the recipe's own rule
            _say(f"{clips} clips are fewer than a batch of {recipe.loader.batch_videos}: batches of {clips}")
            loader = recipe.loader.model_copy(update={"batch_videos": clips})
            recipe = recipe.model_copy(update={"loader": loader})
        made = pretrain(recipe)
        mae = asdict(recipe.model.mae())
        told = f"{made.steps} steps, loss {made.loss_first:.3f} → {made.loss_last:.3f}, {made.clips_per_s:.1f} clips/s"
        return asdict(made) | {"model": mae, "told": told}

    def reconstruct(self) -> Result:
        made = reconstruct(self.train, self.shards, self.out / RECONSTRUCTION)
        return made | {"told": f"{made['clips']} clips, loss {made['loss']:.3f}"}

    def bench(self) -> Result:
        timed = bench_step(self.bench_config())
        _write_json(self.out / BENCH, timed)
        ms = timed["step_ms"]
        return timed | {"told": f"dense {ms['dense']:.0f} ms, sparse {ms['sparse']:.0f} ms"}

    def bench_config(self) -> BenchStepConfig:
        return BenchStepConfig(model=self.config.timed_model, data=self.shards, decoder_mask=0.0)

    def report(self) -> Result:
        path = write_report(self.out)
        return {"report": str(path), "told": f"{path.stat().st_size / 1e6:.1f} MB in one file"}

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
