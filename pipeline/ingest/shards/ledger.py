"""The end of a job: join the commits into index.parquet and rejects.parquet, mark repeats, check the sums.

    planned sources (of all parts) = sources with clips + sources rejected as a whole

No table of all clips is held: rows pass through in pieces. What grows is the footer of the plan's file, some 9 KB for
each task. Where repeats are marked, the hashes of all clips are mapped from files (64 bytes each), beside what
duplicates.find_repeats keeps. dataset.json is written last and names its plan.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import reelmae.pipeline.schema as schema
from reelmae.pipeline.errors import DatasetError
from reelmae.pipeline.ingest.plan.parts import Plan, as_json, part_file, stray_sources
from reelmae.pipeline.ingest.shards.commits import read_commits
from reelmae.pipeline.ingest.shards.duplicates import find_repeats
from reelmae.pipeline.storage.scratch import scratch_folder
from reelmae.pipeline.storage.store import Store

_ROWS = 50_000  # of index.parquet written at once
_BLOCKS_BYTES = 64 << 20  # fewer rows, where their `blocks` have more bytes
HASH_BYTES = 32
KEY_BYTES = 21


@dataclass
class Sums:
    """The counts of dataset.json, added up task by task."""

    shards: dict[str, int] = field(default_factory=dict)
    rejected: Counter[str] = field(default_factory=Counter)
    rejected_spans: Counter[str] = field(default_factory=Counter)
    clips: int = 0
    kept: int = 0
    seconds: float = 0.0
    duplicates: int = 0

    def add(self, commit: pa.Table) -> tuple[pa.Table, pa.Table]:
        """Count one task's commit; its clip rows, and its reject rows (REJECTS)."""
        is_clip = pc.equal(commit.column("kind"), schema.CLIP)
        clips, rejects = commit.filter(is_clip), commit.select(schema.REJECTS.names).filter(pc.invert(is_clip))
        of_source = pc.is_null(rejects.column("span_start_s"))
        self.rejected.update(rejects.filter(of_source).column("reason").to_pylist())
        self.rejected_spans.update(rejects.filter(pc.invert(of_source)).column("reason").to_pylist())
        self.shards |= json.loads((commit.schema.metadata or {})[b"shards"])
        self.clips += clips.num_rows
        self.kept += pc.count_distinct(clips.column("source")).as_py()
        self.seconds += float(pc.sum(pc.divide(clips.column("frames"), clips.column("fps"))).as_py() or 0)
        return clips, rejects


def finish(store: Store, plan: Plan, confirm: Callable[[], None] | None = None) -> None:
    """Join the commits of all tasks, check the ledger, write the dataset's files; DatasetError where a sum is wrong.

    confirm: raises where the job must not write any more; called before the files are written.
    """
    sums = Sums()
    with scratch_folder() as folder:
        index, rejects = Path(folder, "index.parquet"), Path(folder, "rejects.parquet")
        columns = schema.clip_columns(plan.format, plan.columns)
        with (
            _Rows(index, columns) as index_rows,
            _Rows(rejects, schema.REJECTS) as reject_rows,
            _Hashes(Path(folder)) as hashes,
        ):
            for commit in commits(store, plan):
                clip_rows, rejected_rows = sums.add(commit)
                index_rows.add(clip_rows)
                reject_rows.add(rejected_rows)
                hashes.add(clip_rows)
        if plan.config.screens.duplicates != "off" and sums.clips:
            index, sums.duplicates = _mark_repeats(index, columns, hashes, Path(folder), plan)
        if sums.kept + sums.rejected.total() != plan.sources:
            raise DatasetError(
                f"{store.url()}: {sums.kept} kept + {sums.rejected.total()} rejected != {plan.sources} planned sources"
            )
        if confirm is not None:
            confirm()
        store.publish(index, schema.INDEX)
        store.publish(rejects, schema.REJECTS_FILE)
    _sweep(store, plan)
    if confirm is not None:
        confirm()
    store.publish_bytes(as_json(dataset_facts(plan, sums)), schema.DATASET_JSON)


def _sweep(store: Store, plan: Plan) -> None:
    """Remove what killed jobs left: temporary files or dangling uploads, and sources that no plan names."""
    if store.is_local:
        store.sweep("", *schema.task_folders(plan.tasks, plan.format), "plan")
    else:  # whatever lies below, so not "": another dataset may be made there
        store.sweep("shards", "commits", "plan", schema.INDEX, schema.REJECTS_FILE, schema.LABELS, schema.DATASET_JSON)
    for path in stray_sources(store, plan):
        store.remove(path)


def commits(store: Store, plan: Plan) -> Iterator[pa.Table]:
    """The commit of each task, held against its sources; without those sources that a later part tries again."""
    retry = retry_urls(store, plan)
    for number, part in enumerate(plan.parts):
        later = retry[number]
        numbers = range(part.first_task, part.first_task + part.tasks)
        with part_file(store, part) as file, closing(read_commits(store, numbers, plan.format)) as found:
            for task, commit in enumerate(found):
                check_commit(file.read_row_group(task, ["url"], use_threads=False), commit)
                if later is not None:
                    commit = commit.filter(pc.invert(pc.is_in(commit.column("source"), value_set=later)))
                yield commit


def retry_urls(store: Store, plan: Plan) -> list[pa.Array | None]:
    """For each part, the urls that a later part tries again; None where there are none."""
    found: list[pa.Array | None] = []
    later: pa.Array | None = None
    for part in reversed(plan.parts):
        found.append(later)
        if part.retry is not None:
            with part_file(store, part) as file:
                urls = file.read(["url"]).column("url").combine_chunks()
            later = urls if later is None else pa.concat_arrays([later, urls])
    return found[::-1]


def check_commit(sources: pa.Table, commit: pa.Table) -> None:
    """DatasetError where a task's commit does not account for each of its sources."""
    is_clip, source = pc.equal(commit.column("kind"), schema.CLIP), commit.column("source")
    is_whole_reject = pc.and_(pc.invert(is_clip), pc.is_null(commit.column("span_start_s")))
    check_ledger(
        sources.column("url").to_pylist(),
        set(source.filter(is_clip).to_pylist()),
        source.filter(is_whole_reject).to_pylist(),
    )


def check_ledger(planned: list[str], with_clips: set[str], rejected: list[str]) -> None:
    """Every planned source has clips or one reject row, never both, and there are no others; else DatasetError."""
    both = with_clips & set(rejected)
    lost = set(planned) - with_clips - set(rejected)
    extra = (with_clips | set(rejected)) - set(planned)
    doubled = [url for url, n in Counter(rejected).items() if n > 1]
    for words, urls in (
        ("has clips and a reject", both),
        ("is lost", lost),
        ("was never planned", extra),
        ("is rejected twice", doubled),
    ):
        if urls:
            raise DatasetError(
                f"ledger: {sorted(urls)[0]!r} {words} ({len(urls)} such sources); the commits are damaged"
            )


def _mark_repeats(index: Path, columns: pa.Schema, hashes: _Hashes, folder: Path, plan: Plan) -> tuple[Path, int]:
    """The index with `duplicate_of` filled in, and how many clips repeat another."""
    near = plan.config.near_bits if plan.config.screens.duplicates == "near" else None
    first = find_repeats(hashes.sha256, hashes.phash, hashes.has_phash, near_bits=near)
    keys, where = hashes.keys, columns.get_field_index("duplicate_of")
    marked, at = folder / "marked.parquet", 0
    # pre_buffer holds all that was read until the file is closed
    with pq.ParquetFile(index, pre_buffer=False) as file, _Rows(marked, columns) as rows:
        for batch in file.iter_batches(_ROWS):
            here = first[at : at + len(batch)]
            at += len(batch)
            names = keys[here].view(f"S{KEY_BYTES}")[:, 0].astype(str)
            table = pa.Table.from_batches([batch])
            rows.add(table.set_column(where, "duplicate_of", pa.array(names, pa.string(), mask=here < 0)))
    return marked, int((first >= 0).sum())


class _Hashes:
    """sha256, phash and keys of all clips, in files that are mapped, not held."""

    def __init__(self, folder: Path) -> None:
        self._paths = {name: folder / name for name in ("sha256", "phash", "has_phash", "keys")}
        self._files = {name: path.open("wb") for name, path in self._paths.items()}

    def add(self, clips: pa.Table) -> None:
        """Append the clips' hashes."""
        phash = clips.column("phash")
        self._files["sha256"].write(bytes.fromhex("".join(clips.column("sha256").to_pylist())))
        self._files["phash"].write(b"".join(pc.fill_null(phash, bytes(HASH_BYTES)).to_pylist()))
        self._files["has_phash"].write(phash.is_valid().to_numpy().tobytes())
        self._files["keys"].write("".join(clips.column("key").to_pylist()).encode("ascii"))

    def __enter__(self) -> _Hashes:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def _map(self, name: str, width: int) -> np.ndarray:
        return np.memmap(self._paths[name], np.uint8, "r").reshape(-1, width)

    @property
    def sha256(self) -> np.ndarray:
        """uint8 [N, 32]."""
        return self._map("sha256", HASH_BYTES)

    @property
    def phash(self) -> np.ndarray:
        """uint8 [N, 32]; zeros where there is none."""
        return self._map("phash", HASH_BYTES)

    @property
    def has_phash(self) -> np.ndarray:
        """bool [N]."""
        return self._map("has_phash", 1)[:, 0].astype(bool)

    @property
    def keys(self) -> np.ndarray:
        """uint8 [N, 21]: ASCII."""
        return self._map("keys", KEY_BYTES)


def dataset_facts(plan: Plan, sums: Sums) -> dict[str, Any]:
    """dataset.json."""
    last = plan.parts[-1]
    return {
        "format": plan.format,
        "reelmae": version("reelmae"),
        "src": plan.parts[0].src,
        "sources": plan.sources,
        "sources_kept": sums.kept,
        "clips": sums.clips,
        "seconds": round(sums.seconds, 3),
        "duplicates": sums.duplicates,
        "shards": len(sums.shards),
        "bytes": sum(sums.shards.values()),
        "rejected": dict(sorted(sums.rejected.items())),
        "rejected_spans": dict(sorted(sums.rejected_spans.items())),
        "columns": plan.columns,
        "config": plan.config.model_dump(mode="json"),
        "config_digest": plan.config_digest,
        "encoder": plan.encoder,
        "plan": plan.digest(),
        "tools": {"ffmpeg": last.ffmpeg, **{p: version(p) for p in ("av", "pyarrow")}},
    }


class _Rows:
    """A parquet file written in pieces of at least _ROWS rows or _BLOCKS_BYTES of blocks, so that memory stays flat."""

    def __init__(self, path: Path, columns: pa.Schema) -> None:
        self._columns = columns
        self._has_blocks = schema.CLIPS.field("blocks") in list(columns)
        self._writer = pq.ParquetWriter(path, columns)
        self._tables: list[pa.Table] = []
        self._rows = self._blocks = 0

    def add(self, table: pa.Table) -> None:
        """Append the rows' columns of this file's schema."""
        self._tables.append(table.select(self._columns.names))
        self._rows += table.num_rows
        if self._has_blocks:
            self._blocks += pc.sum(pc.binary_length(table.column("blocks"))).as_py() or 0
        if self._rows >= _ROWS or self._blocks >= _BLOCKS_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._tables:
            rows = pa.concat_tables(self._tables).replace_schema_metadata(None)
            self._writer.write_table(rows.cast(self._columns))
        self._tables, self._rows, self._blocks = [], 0, 0

    def __enter__(self) -> _Rows:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._writer.close()
