"""Finds what a demo, a training run or a shard dataset left in its folder: the facts that the report shows.

demo folder:   shards/  train/  reconstruction/  bench_step.json  verify.json: gives all sections
training run:  config.json  metrics.jsonl  and reconstruction/ inside; also its dataset, where that can be opened
shard dataset: dataset.json  index.parquet  rejects.parquet
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reelmae.pipeline import schema
from reelmae.pipeline.dataset.contents import DatasetFacts
from reelmae.pipeline.dataset.contents import facts as dataset_facts
from reelmae.pipeline.errors import DatasetError, InputError, StorageError, UsageError
from reelmae.pipeline.storage.access import Access, parse_options
from reelmae.pipeline.storage.store import Store
from reelmae.tools.summary import claim_text

SHARDS, TRAIN, RECONSTRUCTION = "shards", "train", "reconstruction"
BENCH, VERIFY, DEMO = "bench_step.json", "verify.json", "demo.json"


@dataclass
class Facts:
    """What was found in the folder. None: there is no such part."""

    title: str
    dataset: DatasetFacts | None = None
    data: str | None = None
    """URL of the shard dataset."""
    store: Store | None = None
    claim: str | None = None
    """Who writes to the shard dataset now."""
    verify: dict[str, Any] | None = None
    run: Path | None = None
    """Folder of the training run."""
    config: dict[str, Any] | None = None
    summary: dict[str, Any] | None = None
    rows: list[dict[str, float]] = field(default_factory=list)
    """The run's metrics, one row for each logged step."""
    reconstruction: dict[str, Any] | None = None
    pictures: Path | None = None
    """Folder of the reconstructions."""
    bench: dict[str, Any] | None = None
    demo: dict[str, Any] | None = None
    missing: list[tuple[str, str]] = field(default_factory=list)
    """Parts that were not found, each with the command that makes it."""


def is_url(place: str | Path) -> bool:
    """Whether it is a URL, and no local path."""
    return isinstance(place, str) and "://" in place


def gather(place: str | Path, access: Access | None = None) -> Facts:
    """Everything found in this folder (or at the URL of a shard dataset), and what is missing there.

    `access`: how the shard dataset is reached. Without options, those count that the config of a training run names.
    """
    if is_url(place):
        facts = Facts(title=str(place))
        _add_dataset(facts, str(place), access)
        _add_run(facts, None, None)
        return _with_bench(facts)
    folder = Path(place)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the folder of a demo, a training run or a shard dataset")
    facts = Facts(title=folder.resolve().name)
    if (folder / schema.DATASET_JSON).is_file():
        _add_dataset(facts, str(folder), access)
        _add_run(facts, None, None)
    elif (folder / "metrics.jsonl").is_file():
        _add_run(facts, folder, folder / RECONSTRUCTION)
        data = (facts.config or {}).get("data", {})
        _add_dataset(facts, data.get("url"), access, options=data.get("storage_options"))
    elif (folder / SHARDS).is_dir() or (folder / TRAIN).is_dir():
        facts.demo = _read_json(folder / DEMO)
        facts.verify = _read_json(folder / VERIFY)
        facts.bench = _read_json(folder / BENCH)
        _add_run(facts, folder / TRAIN, folder / RECONSTRUCTION)
        _add_dataset(facts, str(folder / SHARDS), access)
    else:
        raise InputError(
            f"{folder}: holds neither {schema.DATASET_JSON} (a shard dataset), metrics.jsonl (a training run) "
            f"nor {SHARDS}/ (a demo); give one of these"
        )
    return _with_bench(facts)


def _with_bench(facts: Facts) -> Facts:
    if facts.bench is None:
        facts.missing.append(("Timings of the dense and the sparse step", "reelmae bench step --json"))
    return facts


def _add_dataset(facts: Facts, url: str | None, access: Access | None, *, options: str | None = None) -> None:
    """`options`: `@FILE` of storage options, where `access` has none."""
    access = access or Access()
    try:
        if not access.options:
            access = Access(parse_options(options), access.patience_s)
        store = Store(url or "", access)
        if url is None or not store.exists(schema.DATASET_JSON):
            raise InputError(f"{url}: no finished shard dataset; give the place that reelmae shard wrote to")
        facts.dataset = dataset_facts(store)
        facts.store, facts.data, facts.claim = store, url, claim_text(store)
    except (UsageError, StorageError, FileNotFoundError):  # it is gone; a damaged dataset raises DatasetError
        if is_url(facts.title):  # the dataset was asked for, and this is why there is none
            raise
        facts.missing.append(("The shards, their clips and rejects", f"reelmae shard SRC {url or 'DST'}"))


def _add_run(facts: Facts, run: Path | None, pictures: Path | None) -> None:
    from reelmae.train.metrics import read_rows  # imports torch, so only when it is needed

    if run is None or not (run / "metrics.jsonl").is_file():
        facts.missing.append(("A training run", f"reelmae pretrain demo data.url={facts.data or 'DST'} run.out=OUT"))
    else:
        facts.run = run
        facts.config = _read_json(run / "config.json")
        facts.summary = _read_json(run / "summary.json")
        facts.rows = read_rows(run / "metrics.jsonl")
    if pictures is not None and (found := _read_json(pictures / "reconstruction.json")) is not None:
        facts.reconstruction, facts.pictures = found, pictures
    else:
        command = f"reelmae reconstruct {run or 'RUN'} {facts.data or 'DST'} --out {pictures or 'OUT'}"
        facts.missing.append(("Reconstructions", command))


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no file."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_bytes())
    except ValueError as e:
        raise DatasetError(f"{path}: is damaged, no JSON ({e}); remove it and make it again") from e
