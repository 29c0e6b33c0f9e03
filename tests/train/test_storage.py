"""Training from an object store: what it waits for, what it counts, and that it writes no secret anywhere."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from reelmae.pipeline.errors import StorageError
from reelmae.pipeline.storage.store import Store
from reelmae.tools.report.write import write_report
from reelmae.train.config import PretrainConfig
from reelmae.train.features import features
from reelmae.train.metrics import Row, read_rows
from reelmae.train.pretraining import pretrain

MakeConfig = Callable[..., PretrainConfig]


@pytest.fixture(scope="module")
def local(tiny_run: Path) -> str:
    """A dataset that a job made."""
    return str(tiny_run / "shards")


@pytest.fixture(scope="module")
def remote(local: str, s3_server: Any) -> str:
    """URL of the same on the S3 server."""
    store = Store(s3_server.url("train/shards"), s3_server.access())
    for path in sorted(p for p in Path(local).rglob("*") if p.is_file()):
        store.publish(path, path.relative_to(local).as_posix())
    return store.url()


def options_file(folder: Path, server: Any) -> Path:
    file = folder / "credentials.json"
    file.write_text(json.dumps(server.options()))
    return file


def children() -> set[str]:
    """Process ids of the children of this process."""
    return {pid for task in Path("/proc/self/task").glob("*/children") for pid in task.read_text().split()}


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_rows(out / "metrics.jsonl")]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_outlives_an_outage_counts_it_and_learns_the_same(
    local: str, remote: str, faulty: Any, tiny: MakeConfig, tmp_path: Path, workers: int
) -> None:
    whole = tmp_path / "whole"
    pretrain(tiny(f"data.url={local}", f"run.out={whole}", "run.steps=24"))
    proxy = faulty()
    how = [
        f"data.url={remote}",
        f"data.storage_options=@{options_file(tmp_path, proxy.s3)}",
        f"loader.workers={workers}",
    ]  # more steps than batches that are fetched ahead
    back: list[threading.Timer] = []

    def stop_the_store(row: Row) -> None:
        if row["step"] == 2:
            proxy.down()
            back.append(threading.Timer(2.0, proxy.up))
            back[0].start()

    out = tmp_path / "run"
    summary = pretrain(tiny(*how, "run.steps=24"), on_step=stop_the_store)
    back[0].join()
    assert losses(out) == losses(whole), "bit for bit"
    assert sum(summary.retries.values()) > 0
    rows = read_rows(out / "metrics.jsonl")
    assert rows[0]["retries"] == 0 and rows[-1]["retries"] == sum(summary.retries.values())
    assert json.loads((out / "summary.json").read_text())["retries"] == summary.retries
    resumed = pretrain(tiny(*how, "run.steps=26"))
    assert resumed.retries == summary.retries, "those of the first session are kept"
    assert "Reading the clips was tried again" in write_report(out).read_text()


def test_a_run_ends_in_one_line_once_its_patience_is_over(
    remote: str, faulty: Any, tiny: MakeConfig, tmp_path: Path
) -> None:
    proxy = faulty()
    how = [f"data.url={remote}", f"data.storage_options=@{options_file(tmp_path, proxy.s3)}", "data.patience=0.01"]

    def stop_the_store(row: Row) -> None:
        if row["step"] == 2:
            proxy.down()

    with pytest.raises(StorageError, match=r"train/shards.*refused") as e:
        pretrain(tiny(*how, "run.checkpoint_every=1"), on_step=stop_the_store)
    assert "\n" not in str(e.value)
    proxy.up()
    assert pretrain(tiny(*how)).steps == 6, "and goes on"


def test_what_a_run_writes_and_its_children_hold_no_secret(
    remote: str, s3_server: Any, tiny: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in s3_server.environment():  # the file alone has the keys
        monkeypatch.delenv(name)
    out, told, before = tmp_path / "run", [], children()  # the server is one

    def read_children(_row: Row) -> None:
        for pid in children() - before:
            told.extend(Path(f"/proc/{pid}/{name}").read_bytes() for name in ("environ", "cmdline"))

    file = options_file(tmp_path, s3_server)
    how = [f"data.url={remote}", f"data.storage_options=@{file}", "loader.workers=1"]
    pretrain(tiny(*how), on_step=read_children)
    access = s3_server.access()
    features(out, remote, tmp_path / "features.parquet", workers=1, access=access)
    write_report(out)
    secret = s3_server.secret.encode()
    assert told and secret in file.read_bytes()
    assert not any(secret in text for text in told)
    written = [p for p in tmp_path.rglob("*") if p.is_file() and p != file]
    assert {"config.json", "report.html", "step_000006.pt", "features.json"} <= {p.name for p in written}
    assert any(p.name.startswith("events.out") for p in written)
    for path in written:
        assert secret not in path.read_bytes(), path
    assert json.loads((out / "config.json").read_text())["data"]["storage_options"] == f"@{file}"


def test_features_wait_for_a_store_and_are_the_same(
    local: str, remote: str, faulty: Any, tiny: MakeConfig, tmp_path: Path
) -> None:
    pretrain(tiny("run.steps=1"))
    run, proxy = tmp_path / "run", faulty("reset", "503", share=0.5)
    here = features(run, local, tmp_path / "a.parquet", workers=0, batch=2)
    there = features(run, remote, tmp_path / "b.parquet", workers=0, batch=2, access=proxy.s3.access())
    assert sum(there["retries"].values()) > 0
    assert there["bad"] == {} and there["clips"] == here["clips"]
    a, b = (pq.read_table(tmp_path / f"{name}.parquet") for name in "ab")
    assert a.equals(b)
