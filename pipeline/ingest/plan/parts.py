"""The frozen plan of a job: its parts, each a list of sources dealt to tasks, and what may never change between runs.

    plan/plan.json             config, encoder, columns of the manifest, and the parts
    plan/sources.parquet       the sources of the first part, row group i = its task i
    plan/sources-0001.parquet  … of the second: sources that came since (append), or rejected ones tried again (retry)

Tasks are numbered on through the parts. plan.json is written last, so a plan is whole or not there. A source that
is tried again leaves its earlier reject behind: the last part it is in counts.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from reelmae.pipeline import schema
from reelmae.pipeline.errors import DatasetError, InputError, JobMismatchError
from reelmae.pipeline.ingest import encoders
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.ffmpeg import Tool
from reelmae.pipeline.ingest.plan.deal import label_ids, plan, sources_per_task, write_plan
from reelmae.pipeline.ingest.plan.sources import list_sources
from reelmae.pipeline.storage.store import Store


class Part(BaseModel):
    """Sources planned in one go. `listed` counts what was there, `limit` what was asked for at most."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    src: str
    file: str
    first_task: int
    tasks: int
    sources: int
    listed: int
    limit: int | None
    retry: str | None  # the reason whose rejects are tried again; None: new sources
    ffmpeg: str


class Plan(BaseModel):
    """plan.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    config: ShardConfig
    config_digest: str
    encoder: str
    columns: dict[str, str]
    parts: tuple[Part, ...]

    @property
    def tasks(self) -> int:
        """Of all parts."""
        return sum(part.tasks for part in self.parts)

    @property
    def sources(self) -> int:
        """Different sources of all parts."""
        return sum(part.sources for part in self.parts if part.retry is None)

    def part_of(self, task: int) -> Part:
        """The part that a task belongs to."""
        return next(p for p in self.parts if p.first_task <= task < p.first_task + p.tasks)

    def data(self) -> bytes:
        """As written."""
        return as_json(self.model_dump(mode="json"))

    def digest(self) -> str:
        """Names this plan in dataset.json: a dataset is finished when it is that of its plan."""
        return hashlib.sha256(self.data()).hexdigest()[:16]


def as_json(value: object) -> bytes:
    """Readable JSON, the same for the same value."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_plan(store: Store) -> Plan | None:
    """The plan at a DST; None where there is none. DatasetError where it cannot be read."""
    if not store.exists(schema.PLAN_JSON):
        return None
    try:
        return Plan.model_validate_json(store.read_bytes(schema.PLAN_JSON))
    except ValueError as e:
        first = str(e).splitlines()
        raise DatasetError(
            f"{store.url(schema.PLAN_JSON)}: is damaged, or of another version of reelmae ({' '.join(first[:3])}); "
            "shard the bucket anew to another DST"
        ) from e


def finished(store: Store, plan_: Plan) -> bool:
    """Whether dataset.json is that of this plan."""
    if not store.exists(schema.DATASET_JSON):
        return False
    try:
        facts = json.loads(store.read_bytes(schema.DATASET_JSON))
    except ValueError:  # damaged: to be made anew
        return False
    return isinstance(facts, dict) and facts.get("plan") == plan_.digest()


def new_plan(src: str, store: Store, config: ShardConfig, tool: Tool, limit: int | None) -> Plan:
    """List `src` and freeze it as the first part of a new job."""
    for name in (schema.DATASET_JSON, schema.INDEX, "commits", "shards"):
        if store.exists(name):
            raise JobMismatchError(f"{store.url(name)}: exists, but no {schema.PLAN_JSON}; give an empty DST")
    listing = list_sources(src, config)
    empty = Plan(
        format=schema.FORMAT,
        config=config,
        config_digest=config.digest(),
        encoder=encoders.choose(config, tool.path),
        columns=dict(sorted(listing.columns.items())),  # as plan.json gives them back
        parts=(),
    )
    return _with_part(store, empty, src, listing.table, tool, limit=limit, retry=None)


def appended(src: str, store: Store, old: Plan, tool: Tool, limit: int | None) -> tuple[Plan, int]:
    """The plan with the sources of `src` that no part holds as one part more (none where there are none new), and
    how many of those it holds have another size or etag now; these are not taken again."""
    listing = list_sources(src, old.config)
    new_columns = {k: v for k, v in listing.columns.items() if old.columns.get(k) != v}
    if new_columns:
        raise JobMismatchError(
            f"{src}: its columns {new_columns} are not those of the job ({old.columns or 'none'}); "
            "give the same columns, or another DST"
        )
    known = pa.concat_tables(list(sources_of(store, old, ["url", "size", "etag"], new=True)))
    there = pc.is_in(listing.table.column("url"), value_set=known.column("url"))
    again = listing.table.filter(there).select(["url", "size", "etag"])
    joined = again.join(known, "url", right_suffix=" then")
    moved = pc.or_(
        pc.not_equal(joined.column("size"), joined.column("size then")),
        pc.not_equal(joined.column("etag"), joined.column("etag then")),
    )
    fresh = listing.table.filter(pc.invert(there))
    changed = int(pc.sum(moved).as_py() or 0)
    if not fresh.num_rows:
        return old, changed
    return _with_part(store, old, src, fresh, tool, limit=limit, retry=None), changed


def retried(store: Store, old: Plan, tool: Tool, reason: str) -> Plan:
    """The plan with the sources that were rejected as a whole for `reason` ("all": any) as one part more."""
    allowed = ["all", *(r.value for r in schema.Reason)]
    if reason not in allowed:
        raise InputError(f"--retry-rejected {reason}: is no reason; take one of {', '.join(allowed)}")
    rejects = pq.read_table(pa.BufferReader(store.read_bytes(schema.REJECTS_FILE)))
    wanted = pc.is_null(rejects.column("span_start_s"))
    if reason != "all":
        wanted = pc.and_(wanted, pc.equal(rejects.column("reason"), reason))
    urls = rejects.filter(wanted).column("source")
    if not len(urls):
        raise InputError(
            f"--retry-rejected {reason}: no source was rejected for it; see {store.url(schema.REJECTS_FILE)}"
        )
    plan_ = old
    for src in dict.fromkeys(part.src for part in old.parts):  # links are judged by the bucket they came from
        found = [
            table.filter(pc.is_in(table.column("url"), value_set=urls))
            for table in sources_of(store, old, None, src=src, new=True)
        ]
        again = pa.concat_tables(found).drop_columns(["task"]).sort_by("url")
        again = again.set_column(1, "size", pa.array([-1] * len(again), pa.int64()))  # it may have changed
        if len(again):
            plan_ = _with_part(store, plan_, src, again, tool, limit=None, retry=reason)
    return plan_


def sources_of(
    store: Store, plan_: Plan, columns: list[str] | None, *, src: str | None = None, new: bool = False
) -> Iterator[pa.Table]:
    """The sources of each part (of one src; of no retry), one table each."""
    for part in plan_.parts:
        if (src is not None and part.src != src) or (new and part.retry is not None):
            continue
        with part_file(store, part) as file:
            yield file.read(columns)


def labels_of(store: Store, plan_: Plan) -> dict[str, int]:
    """label → id as the parts gave them one after the other: labels.json made anew."""
    ids: dict[str, int] = {}
    for table in sources_of(store, plan_, ["label", "rows"]):
        ids = label_ids(_labels(table), ids)
    return ids


def sources_in(store: Store, plan_: Plan, tasks: set[int]) -> int:
    """How many sources these tasks hold."""
    count = 0
    for part in plan_.parts:
        here = [t - part.first_task for t in tasks if part.first_task <= t < part.first_task + part.tasks]
        if len(here) == part.tasks:
            count += part.sources
        elif here:
            with part_file(store, part) as file:
                count += sum(file.metadata.row_group(group).num_rows for group in here)
    return count


@contextmanager
def part_file(store: Store, part: Part) -> Iterator[pq.ParquetFile]:
    """A part's sources, row group i = its task i."""
    with tempfile.TemporaryDirectory(prefix="reelmae-") as folder:
        path = Path(folder, "sources.parquet")
        store.download(part.file, path)
        with pq.ParquetFile(path) as file:
            yield file


def _with_part(
    store: Store, old: Plan, src: str, sources: pa.Table, tool: Tool, *, limit: int | None, retry: str | None
) -> Plan:
    """Publish the sources, the labels, then plan.json."""
    number = len(old.parts)
    per_task = sources_per_task(min(limit or sources.num_rows, sources.num_rows), old.config.sources_per_task)
    planned = plan(sources, seed=old.config.seed + number, per_task=per_task)
    if limit is not None:
        planned = planned.slice(0, limit)
    numbers = pc.add(planned.column("task"), pa.scalar(old.tasks, pa.int32()))
    planned = planned.set_column(planned.schema.get_field_index("task"), schema.SOURCES.field("task"), numbers)
    known = json.loads(store.read_bytes(schema.LABELS)) if store.exists(schema.LABELS) else {}
    labels = label_ids(_labels(planned), known)
    file = schema.PLAN_SOURCES if not number else schema.PLAN_SOURCES.replace(".", f"-{number:04d}.")
    with tempfile.TemporaryDirectory(prefix="reelmae-") as folder:
        path = Path(folder, "sources.parquet")
        write_plan(planned, path, per_task)
        store.publish(path, file)
    if labels != known:
        store.publish_bytes(as_json(labels), schema.LABELS)
    part = Part(
        src=Store(src).url(),
        file=file,
        first_task=old.tasks,
        tasks=-(-planned.num_rows // per_task),
        sources=planned.num_rows,
        listed=sources.num_rows,
        limit=limit,
        retry=retry,
        ffmpeg=tool.version,
    )
    new = old.model_copy(update={"parts": (*old.parts, part)})
    store.publish_bytes(new.data(), schema.PLAN_JSON)
    return new


def _labels(sources: pa.Table) -> set[str]:
    own = pc.unique(sources.column("label")).drop_null().to_pylist()
    rows = pc.list_flatten(sources.column("rows"))
    return {*own, *pc.unique(pc.struct_field(rows, "label")).drop_null().to_pylist()}


def refuse_mismatch(store: Store, there: Plan, src: str, config: ShardConfig, tool: Tool) -> None:
    """JobMismatchError with every difference between the job at DST and the one that is asked for."""
    old, new = there.config.model_dump(mode="json"), config.model_dump(mode="json")
    differences = [f"{key}: {old[key]!r} there, {new[key]!r} here" for key in sorted(new) if old[key] != new[key]]
    sources = list(dict.fromkeys(part.src for part in there.parts))
    if Store(src).url() not in sources:
        differences.insert(0, f"src: {', '.join(map(repr, sources))} there, {Store(src).url()!r} here")
    if not differences and not finished(store, there):
        last = there.parts[-1]
        differences += refused_tools(there, tool, set(range(last.first_task, there.tasks)))
    if differences:
        raise JobMismatchError(
            f"{store.url()}: holds another job; {'; '.join(differences)}. Give the same values or another DST"
        )


def refused_tools(there: Plan, tool: Tool, tasks: set[int]) -> list[str]:
    """Why this machine cannot run these tasks of a plan byte for byte."""
    words = [
        f"ffmpeg: {part.ffmpeg!r} there, {tool.version!r} here (see REELMAE_FFMPEG)"
        for part in there.parts
        if part.ffmpeg != tool.version and any(part.first_task <= task < part.first_task + part.tasks for task in tasks)
    ]
    if there.encoder == "nvenc" and not encoders.has_nvenc(tool.path, there.config.codec):
        words.append("encoder: 'nvenc' there, but it does not run here")
    return words
