"""`reelmae verify`: is a finished dataset what its index says?

Always: counts in dataset.json against index, rejects and plan; the ledger, task by task; every clip's bytes in
its tar against the sha256 in the index; every tar's members against its DALI index; no shard missing or extra.
Deep: every clip decoded whole in the sandbox, and compared with its row.
Reads with no trust in the files; every fault is named, none stops the search.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from tarfile import TarError
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from reelmae.pipeline import schema
from reelmae.pipeline.errors import ChildError, DatasetError, InputError, ReelmaeError
from reelmae.pipeline.ingest.ledger import check_ledger
from reelmae.pipeline.ingest.pack import dali_index, member_offsets
from reelmae.pipeline.ingest.probe import Prober
from reelmae.pipeline.ingest.sandbox import Sandbox
from reelmae.pipeline.storage import Store


@dataclass(frozen=True)
class VerifyReport:
    """What was looked at and what was wrong: each fault names its file. `ok` is True where there is none."""

    dst: str
    ok: bool
    deep: bool
    shards: int
    clips: int
    bytes: int
    faults: tuple[str, ...]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "faults": list(self.faults)}


def verify(dst: str, deep: bool = False) -> VerifyReport:
    """Check the dataset at `dst`; with `deep`, decode every clip. InputError where there is no finished dataset."""
    begin = time.monotonic()
    store = Store(dst)
    if not store.exists(schema.DATASET_JSON):
        there = (
            "an unfinished job; run `reelmae shard` again to finish it"
            if store.exists(schema.PLAN_JSON)
            else "no dataset"
        )
        raise InputError(f"{dst}: no {schema.DATASET_JSON} there: {there}")
    with tempfile.TemporaryDirectory(prefix="reelmae-") as folder:
        check = _Check(store, Path(folder), deep)
        check.run()
    return VerifyReport(
        dst=store.url(),
        ok=not check.faults,
        deep=deep,
        shards=check.shards,
        clips=check.clips,
        bytes=check.bytes,
        faults=tuple(check.faults),
        seconds=time.monotonic() - begin,
    )


class _Check:
    def __init__(self, store: Store, folder: Path, deep: bool) -> None:
        self._store = store
        self._folder = folder
        self._deep = deep
        self._sandbox = Sandbox()
        self._prober = Prober(self._sandbox, folder)
        self.faults: list[str] = []
        self.shards = self.clips = self.bytes = 0

    def run(self) -> None:
        try:
            facts = json.loads(self._store.read_bytes(schema.DATASET_JSON))
            index = self._table(schema.INDEX, schema.CLIPS)
            rejects = self._table(schema.REJECTS_FILE, schema.REJECTS)
            self._ledger(facts, index, rejects)
            names = [] if index is None else list(dict.fromkeys(index.column("shard").to_pylist()))
            listed = {e.path for e in self._store.list("shards") if e.path.endswith(".tar")}
            self.faults += [f"{name}: is not in the index" for name in sorted(listed - set(names))]
            for name, rows in self._by_shard(index):
                self._shard(name, rows)
            self._counts(facts, index, rejects, len(names))
        finally:
            self._prober.close()

    def _table(self, name: str, wanted: pa.Schema) -> pa.Table | None:
        try:
            table = pq.read_table(pa.BufferReader(self._store.read_bytes(name)))
            return table.select(wanted.names).cast(wanted)
        except (FileNotFoundError, pa.ArrowInvalid, KeyError, ReelmaeError) as e:
            self.faults.append(f"{name}: cannot be read: {_line(e)}")
            return None

    def _ledger(self, facts: dict[str, Any], index: pa.Table | None, rejects: pa.Table | None) -> None:
        """Every commit is there, agrees with the plan, and all together are the index and the rejects."""
        keys: list[str] = []
        bad: list[tuple[str, str]] = []
        try:
            planned = pq.ParquetFile(pa.BufferReader(self._store.read_bytes(schema.PLAN_SOURCES)))
        except (FileNotFoundError, pa.ArrowInvalid, ReelmaeError) as e:
            self.faults.append(f"{schema.PLAN_SOURCES}: cannot be read: {_line(e)}")
            return
        for task in range(planned.num_row_groups):
            commit = self._table(schema.commit_name(task), schema.COMMITS)
            if commit is None:
                continue
            rows = commit.to_pylist()
            good = [r for r in rows if r["kind"] == schema.CLIP]
            whole = [r["source"] for r in rows if r["kind"] == schema.REJECT and r["span_start_s"] is None]
            keys += [r["key"] for r in good]
            bad += [(r["source"], r["reason"]) for r in rows if r["kind"] == schema.REJECT]
            try:
                sources = planned.read_row_group(task).column("url").to_pylist()
                check_ledger(sources, {r["source"] for r in good}, whole)
            except DatasetError as e:
                self.faults.append(f"{schema.commit_name(task)}: {e}")
        if index is not None and keys != index.column("key").to_pylist():
            self.faults.append(
                f"{schema.INDEX}: its {index.num_rows} clips are not the {len(keys)} of the commits"
            )
        if rejects is not None and bad != list(
            zip(rejects.column("source").to_pylist(), rejects.column("reason").to_pylist(), strict=True)
        ):
            self.faults.append(
                f"{schema.REJECTS_FILE}: its {rejects.num_rows} rows are not the {len(bad)} of the commits"
            )
        if planned.metadata.num_rows != facts["sources"]:
            self.faults.append(
                f"{schema.PLAN_SOURCES}: {planned.metadata.num_rows} sources, {schema.DATASET_JSON} says {facts['sources']}"
            )

    def _by_shard(self, index: pa.Table | None) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        if index is None:
            return
        name: str | None = None
        rows: list[dict[str, Any]] = []
        for batch in index.to_batches(max_chunksize=10_000):
            for row in batch.to_pylist():
                if name is not None and row["shard"] != name:
                    yield name, rows
                    rows = []
                name = row["shard"]
                rows.append(row)
        if name is not None:
            yield name, rows

    def _shard(self, name: str, rows: list[dict[str, Any]]) -> None:
        tar, idx = self._folder / "shard.tar", name.removesuffix(".tar") + ".idx"
        try:
            self._store.download(name, tar)
            members = member_offsets(tar)
            if self._store.read_bytes(idx).decode("ascii") != dali_index(tar):
                self.faults.append(f"{idx}: is not the index of its tar")
        except (FileNotFoundError, UnicodeDecodeError) as e:
            self.faults.append(f"{name} or its idx: {_line(e)}")
            return
        except (TarError, EOFError) as e:
            self.faults.append(f"{name}: is no whole tar: {_line(e)}")
            return
        self.shards += 1
        self.bytes += tar.stat().st_size
        wanted = [f"{row['key']}.{extension}" for row in rows for extension in ("json", "mp4")]
        if list(members) != wanted:
            self.faults.append(
                f"{name}: holds {len(members)} files, the index names {len(wanted)}, or in another order"
            )
        with tar.open("rb") as f:
            for row in rows:
                f.seek(row["offset"])
                self._clip(name, row, f.read(row["size"]))

    def _clip(self, shard: str, row: dict[str, Any], data: bytes) -> None:
        self.clips += 1
        if len(data) != row["size"] or hashlib.sha256(data).hexdigest() != row["sha256"]:
            self.faults.append(f"{shard}: clip {row['key']}: its bytes are not those of the index")
            return
        if not self._deep:
            return
        path = self._folder / "clip.mp4"
        path.write_bytes(data)
        try:
            found = self._prober.verify([path], wall_s=120 + row["frames"])[0]
        except ChildError as e:
            self.faults.append(f"{shard}: clip {row['key']}: decoding: {e}")
            return
        fps = Fraction(row["fps"]).limit_denominator(1001)
        fault = found.fault(
            frames=row["frames"], fps=fps, width=row["width"], height=row["height"], codec=row["codec"]
        )
        if fault:
            self.faults.append(f"{shard}: clip {row['key']}: {fault}")

    def _counts(
        self, facts: dict[str, Any], index: pa.Table | None, rejects: pa.Table | None, shards: int
    ) -> None:
        if index is None or rejects is None:
            return
        whole = rejects.filter(pc.is_null(rejects.column("span_start_s"))).column("reason").to_pylist()
        kept = len(set(index.column("source").to_pylist()))
        found = {
            "sources_kept": kept,
            "clips": index.num_rows,
            "shards": shards,
            "sources": kept + len(whole),
        }
        found |= {"bytes": self.bytes, "rejected": dict(sorted(Counter(whole).items()))}
        self.faults += [
            f"{schema.DATASET_JSON}: {key} is {facts.get(key)!r}, found {value!r}"
            for key, value in found.items()
            if facts.get(key) != value
        ]


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
