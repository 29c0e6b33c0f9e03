"""The shared corpus packed into tars: each member has the clips, byte for byte, or the reject that its loose file has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from reelmae.pipeline import schema
from reelmae.pipeline.dataset.verification import verify
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.job import shard

pytestmark = pytest.mark.slow
CONFIG = ShardConfig(short_side=64, clip_seconds=30)


def _fates(dst: Path, number_of: Callable[[str], str]) -> dict[str, Any]:
    """Number of the file → facts of its clips, or the reject's reason and detail."""
    names = ("sha256", "span_start_s", "span_end_s", "frames", "colour", "source_bytes", "source_container")
    found: dict[str, Any] = {}
    for row in pq.read_table(dst / schema.INDEX).to_pylist():
        found.setdefault(number_of(row["source"]), []).append([row[name] for name in names])
    for row in pq.read_table(dst / schema.REJECTS_FILE).to_pylist():
        found.setdefault(number_of(row["source"]), []).append([row["reason"], row["detail"], row["span_start_s"]])
    return found


@pytest.mark.parametrize("half", ["kinetics_style", "uncurated"])
def test_tars_of_the_corpus_give_what_its_files_give(
    half: str, corpus: Path, write_tar: Callable[..., Path], tmp_path: Path
) -> None:
    paths = [p for p in sorted((corpus / half).rglob("*")) if p.is_file()]
    numbers = {str(path): f"{i:04d}" for i, path in enumerate(paths)}
    src = tmp_path / "src"
    for t in range(3):
        members = []
        for path in paths[t::3]:
            number = numbers[str(path)]
            members.append((f"{number}.cls", number[-1:].encode()))
            members.append((f"{number}.json", json.dumps({"number": int(number), "name": path.name}).encode()))
            members.append((f"{number}.bin", path.read_bytes()))  # what it is, its content says
            members.append((f"{number}.txt", f"file {number}\n".encode()))
        write_tar(src / f"{t:03d}.tar", members)
    loose, packed = tmp_path / "loose", tmp_path / "packed"
    shard(str(corpus / half), str(loose), CONFIG)
    summary = shard(str(src), str(packed), CONFIG)
    assert summary.sources == len(paths) >= 20
    assert _fates(packed, lambda url: url[-8:-4]) == _fates(loose, lambda url: numbers[url])
    for row in pq.read_table(packed / schema.INDEX).to_pylist():
        number = row["source"][-8:-4]
        told = row["label"], row["number"], row["name"], row["txt"]
        assert told == (number[-1], int(number), paths[int(number)].name, f"file {number}")
    assert verify(str(packed), deep=True).faults == ()
