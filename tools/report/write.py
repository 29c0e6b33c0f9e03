"""`reelmae report`: gathers what a run, a demo or a shard dataset left behind and writes one self-contained page.

    demo folder:  shards/  train/  reconstruction/  bench_step.json  verify.json  → all sections
    training run: config.json  metrics.jsonl  (and reconstruction/ within)     → its dataset, where it still opens
    shard dataset: dataset.json  index.parquet  rejects.parquet

Properties that hold: the page asks for no other file and no address, and runs no script; what is missing is named on
the page together with the command that makes it; the page appears whole or not at all.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reelmae.pipeline import schema
from reelmae.pipeline.dataset import contents
from reelmae.pipeline.dataset.contents import DatasetFacts
from reelmae.pipeline.errors import DatasetError, InputError, StorageError
from reelmae.pipeline.storage.store import Store, whole_file

SHARDS, TRAIN, RECONSTRUCTION, BENCH, VERIFY, DEMO = (
    "shards", "train", "reconstruction", "bench_step.json", "verify.json", "demo.json",
)  # fmt: skip


@dataclass
class Facts:
    """What was found; None is a part that is missing, `missing` says which and how to make it."""

    title: str
    dataset: DatasetFacts | None = None
    data: str | None = None  # URL of the shard dataset
    store: Store | None = None
    verify: dict[str, Any] | None = None
    run: Path | None = None
    config: dict[str, Any] | None = None
    summary: dict[str, Any] | None = None
    rows: list[dict[str, float]] = field(default_factory=list)
    reconstruction: dict[str, Any] | None = None
    pictures: Path | None = None
    bench: dict[str, Any] | None = None
    demo: dict[str, Any] | None = None
    missing: list[tuple[str, str]] = field(default_factory=list)


def write_report(run_dir: str | Path, out: Path | None = None) -> Path:
    """Write the page about the demo, training run or shard dataset at `run_dir`; RUN/report.html unless `out`.

    Raises InputError where `run_dir` is none of the three, DatasetError where a file of it is damaged.
    """
    from reelmae.tools.report.page import page

    facts = gather(Path(run_dir))
    final = Path(out) if out is not None else Path(run_dir) / "report.html"
    with whole_file(final) as part:
        part.write_text(page(facts), encoding="utf-8")
    return final


def gather(folder: Path) -> Facts:
    """Everything there is to tell about this folder."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the folder of a demo, a training run or a shard dataset")
    facts = Facts(title=folder.resolve().name)
    if (folder / schema.DATASET_JSON).is_file():
        _add_dataset(facts, str(folder))
        _add_run(facts, None, None)
    elif (folder / "metrics.jsonl").is_file():
        _add_run(facts, folder, folder / RECONSTRUCTION)
        _add_dataset(facts, (facts.config or {}).get("data", {}).get("url"))
    elif (folder / SHARDS).is_dir() or (folder / TRAIN).is_dir():
        facts.demo = _json(folder / DEMO)
        facts.verify = _json(folder / VERIFY)
        facts.bench = _json(folder / BENCH)
        _add_run(facts, folder / TRAIN, folder / RECONSTRUCTION)
        _add_dataset(facts, str(folder / SHARDS))
    else:
        raise InputError(
            f"{folder}: holds neither {schema.DATASET_JSON} (a shard dataset), metrics.jsonl (a training run) "
            f"nor {SHARDS}/ (a demo); give one of these"
        )
    if facts.bench is None:
        facts.missing.append(("Timings of the dense and the sparse step", "reelmae bench step --json"))
    return facts


def _add_dataset(facts: Facts, url: str | None) -> None:
    try:
        store = Store(url or "")
        if url is None or not store.exists(schema.DATASET_JSON):
            raise InputError(f"{url}: no finished shard dataset")
        facts.dataset = contents.gather(store)
        facts.store, facts.data = store, url
    except (InputError, StorageError, FileNotFoundError):  # gone; a damaged one is an error
        facts.missing.append(("The shards, their clips and rejects", f"reelmae shard SRC {url or 'DST'}"))


def _add_run(facts: Facts, run: Path | None, pictures: Path | None) -> None:
    from reelmae.train.metrics import read_rows  # brings torch along: not before it is needed

    if run is None or not (run / "metrics.jsonl").is_file():
        facts.missing.append(("A training run", f"reelmae pretrain demo data.url={facts.data or 'DST'} run.out=OUT"))
    else:
        facts.run = run
        facts.config = _json(run / "config.json")
        facts.summary = _json(run / "summary.json")
        facts.rows = read_rows(run / "metrics.jsonl")
    if pictures is not None and (found := _json(pictures / "reconstruction.json")) is not None:
        facts.reconstruction, facts.pictures = found, pictures
    else:
        facts.missing.append(
            (
                "Reconstructions",
                f"reelmae reconstruct {run or 'RUN'} {facts.data or 'DST'} --out {pictures or 'OUT'}",
            )
        )


def _json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is no file."""
    return _parsed(path.read_bytes(), str(path)) if path.is_file() else None


def _parsed(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except ValueError as e:
        raise DatasetError(f"{where}: is damaged, no JSON ({e}); remove it and make it again") from e
