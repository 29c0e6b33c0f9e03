"""The frozen plan of a job: its parts, each a list of sources dealt to tasks, and what may never change between runs.

    plan/plan.json            config, encoder, columns of the manifest, and the parts
    plan/sources-HEX.parquet  the sources of a part, row group i = its task i; HEX: the first 16 hex of its sha256

Task numbers run through all parts. A later part holds sources that are new (append) or tried again (retry). Where a
source is in several parts, its outcome in the last of them counts.

plan.json is written last, so a plan is whole or not there. It names the files of its sources by what they hold, so it
never goes with those of another plan. A file that it does not name is of a job that was killed before it wrote its
plan: it counts nowhere, and is removed when a job ends. Format 1 numbers the files: `sources.parquet`,
`sources-0001.parquet`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

from reelmae.pipeline import schema
from reelmae.pipeline.errors import DatasetError, InputError, JobMismatchError
from reelmae.pipeline.ingest import encoders
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.ffmpeg import Tool
from reelmae.pipeline.ingest.plan.deal import deal_sources, has_tars, label_ids, sources_per_task, write_plan
from reelmae.pipeline.ingest.plan.source_files import download_sources, is_named_by_digest, name_file
from reelmae.pipeline.ingest.plan.sources import access_of, list_sources, source_url
from reelmae.pipeline.ingest.plan.tar_sources import scan_again
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.checked import read_agreed
from reelmae.pipeline.storage.scratch import scratch_folder
from reelmae.pipeline.storage.store import Store


class PlanPart(BaseModel):
    """Sources that were planned together."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    src: str
    file: str
    """Path of its sources at the dataset."""
    first_task: int
    tasks: int
    sources: int
    listed: int
    """Sources that could have been planned; fewer are where there is a limit."""
    limit: int | None
    """The most sources that were to be planned; None is all."""
    retry: str | None
    """The reason whose rejects are tried again; None: its sources are new."""
    ffmpeg: str
    """Version line of the ffmpeg that runs its tasks."""
    tars: int = 0
    """Tars of which its sources are members. A part without any does not say so: plan.json is as older versions know
    it, which refuse one with tars."""

    @model_serializer(mode="wrap")
    def _leave_out_none(self, values: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = values(self)
        if not self.tars:
            del found["tars"]
        return found

    def holds(self, task: int) -> bool:
        """Whether the task is one of this part."""
        return self.first_task <= task < self.first_task + self.tasks


class Plan(BaseModel):
    """plan.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    config: ShardConfig
    config_digest: str
    encoder: str
    columns: dict[str, str]
    parts: tuple[PlanPart, ...]

    @property
    def tasks(self) -> int:
        """The number of tasks in all parts."""
        return sum(part.tasks for part in self.parts)

    @property
    def sources(self) -> int:
        """The number of different sources in all parts."""
        return sum(part.sources for part in self.parts if part.retry is None)

    def part_of(self, task: int) -> PlanPart:
        """The part that a task belongs to."""
        return next(part for part in self.parts if part.holds(task))

    def data(self) -> bytes:
        """The bytes of plan.json."""
        return as_json(self.model_dump(mode="json"))

    def digest(self) -> str:
        """Names this plan in dataset.json: a dataset is finished when dataset.json has the digest of its plan."""
        return hashlib.sha256(self.data()).hexdigest()[:16]


def as_json(value: object) -> bytes:
    """Readable JSON, the same for the same value."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_plan(store: Store) -> Plan | None:
    """The plan at a DST; None where there is none.

    DatasetError where it cannot be read, InputError where it is of a format that this version does not know.
    """
    if not store.exists(schema.PLAN_JSON):
        return None
    data = read_agreed(store, schema.PLAN_JSON)
    try:
        plan = json.loads(data)
        words = schema.format_fault(plan.get("format")) if isinstance(plan, dict) else ""
        if not words:
            return Plan.model_validate_json(data)
    except ValueError as e:
        first = str(e).splitlines()
        raise DatasetError(
            f"{store.url(schema.PLAN_JSON)}: is damaged, or of another version of reelmae ({' '.join(first[:3])}); "
            "shard the bucket anew to another DST"
        ) from e
    raise InputError(f"{store.url(schema.PLAN_JSON)}: {words}")


def is_finished(store: Store, plan: Plan) -> bool:
    """Whether dataset.json is that of this plan."""
    if not store.exists(schema.DATASET_JSON):
        return False
    try:
        facts = json.loads(read_agreed(store, schema.DATASET_JSON))
    except ValueError:  # damaged: the join writes it again
        return False
    return isinstance(facts, dict) and facts.get("plan") == plan.digest()


def new_plan(
    src: str,
    store: Store,
    config: ShardConfig,
    tool: Tool,
    limit: int | None,
    access: Access | None = None,
    confirm: Callable[[], None] | None = None,
) -> Plan:
    """List `src` and freeze it as the first part of a new job.

    access: how `src` is reached.
    confirm: raises where the job must not write the plan any more; called before each file of it is written.
    """
    for name in (schema.DATASET_JSON, schema.INDEX, "commits", "shards"):
        if store.exists(name):
            raise JobMismatchError(f"{store.url(name)}: exists, but no {schema.PLAN_JSON}; give an empty DST")
    listing = list_sources(src, config, access, schema.FORMAT)
    empty = Plan(
        format=schema.FORMAT,
        config=config,
        config_digest=config.digest(),
        encoder=encoders.choose(config, tool.path),
        columns=dict(sorted(listing.columns.items())),  # as plan.json gives them back
        parts=(),
    )
    url = source_url(src, access)
    return _add_part(store, empty, url, listing.table, tool, limit=limit, retry=None, confirm=confirm)


def append_sources(
    src: str,
    store: Store,
    old: Plan,
    tool: Tool,
    limit: int | None,
    access: Access | None = None,
    confirm: Callable[[], None] | None = None,
) -> tuple[Plan, int]:
    """The plan with one part more: the sources of `src` that no part holds. Where there is none, the old plan.

    And the number of sources that a part holds, but that have another size or etag now; these are not taken again.
    `access` and `confirm` as in `new_plan`.
    """
    listing = list_sources(src, old.config, access, old.format)
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
    url = source_url(src, access)
    return _add_part(store, old, url, fresh, tool, limit=limit, retry=None, confirm=confirm), changed


def retry_rejects(
    store: Store,
    old: Plan,
    tool: Tool,
    reason: str,
    access: Access | None = None,
    confirm: Callable[[], None] | None = None,
) -> Plan:
    """The plan with a part more for each src: the sources that were rejected as a whole for `reason` ("all": any).

    Where they are members of tars, the headers of these are read again. `access` and `confirm` as in `new_plan`.
    """
    allowed = ["all", *(r.value for r in schema.Reason)]
    if reason not in allowed:
        raise InputError(f"--retry-rejected {reason}: is not a reason; take one of {', '.join(allowed)}")
    rejects = pq.read_table(pa.BufferReader(read_agreed(store, schema.REJECTS_FILE)))
    wanted = pc.is_null(rejects.column("span_start_s"))
    if reason != "all":
        wanted = pc.and_(wanted, pc.equal(rejects.column("reason"), reason))
    urls = rejects.filter(wanted).column("source")
    if not len(urls):
        raise InputError(
            f"--retry-rejected {reason}: no source was rejected for it; see {store.url(schema.REJECTS_FILE)}"
        )
    plan = old
    # one part for each src: symlinks are checked against their own source's bucket
    for src in dict.fromkeys(part.src for part in old.parts):
        found = [
            table.filter(pc.is_in(table.column("url"), value_set=urls))
            for table in sources_of(store, old, None, src=src, new=True)
        ]
        again = pa.concat_tables(found, promote_options="default").drop_columns(["task"]).sort_by("url")
        if has_tars(again):
            again = scan_again(again, partial(access_of, src=src, access=access or Access()), old.config)
        else:
            again = again.set_column(1, "size", pa.array([-1] * len(again), pa.int64()))  # it may have changed
        if len(again):
            plan = _add_part(store, plan, src, again, tool, limit=None, retry=reason, confirm=confirm)
    return plan


def sources_of(
    store: Store, plan: Plan, columns: list[str] | None, *, src: str | None = None, new: bool = False
) -> Iterator[pa.Table]:
    """The sources of each part, one table a part. `src`: only parts of it; `new`: only parts that are no retry."""
    for part in plan.parts:
        if (src is not None and part.src != src) or (new and part.retry is not None):
            continue
        with part_file(store, part) as file:
            yield file.read(columns)


def labels_of(store: Store, plan: Plan) -> dict[str, int]:
    """label → id as the parts numbered them, one after the other: what labels.json must hold."""
    ids: dict[str, int] = {}
    for table in sources_of(store, plan, ["label", "rows"]):
        ids = label_ids(_label_names(table), ids)
    return ids


def sources_in(store: Store, plan: Plan, tasks: set[int]) -> int:
    """How many sources these tasks hold."""
    count = 0
    for part in plan.parts:
        here = [task - part.first_task for task in tasks if part.holds(task)]
        if len(here) == part.tasks:
            count += part.sources
        elif here:
            with part_file(store, part) as file:
                count += sum(file.metadata.row_group(group).num_rows for group in here)
    return count


@contextmanager
def part_file(store: Store, part: PlanPart) -> Iterator[pq.ParquetFile]:
    """The file of a part's sources; row group i holds its task i."""
    with scratch_folder() as folder:
        path = Path(folder, "sources.parquet")
        download_sources(store, part.file, path)
        with pq.ParquetFile(path) as file:
            yield file


def stray_sources(store: Store, plan: Plan) -> list[str]:
    """Files of sources that the plan does not name. Format 1 has none: there, the next part takes the file's name."""
    named = {part.file for part in plan.parts}
    there = [entry.path for entry in store.list("plan")] if plan.format > 1 else []
    return [path for path in there if is_named_by_digest(path) and path not in named]


def _add_part(
    store: Store,
    old: Plan,
    src: str,
    sources: pa.Table,
    tool: Tool,
    *,
    limit: int | None,
    retry: str | None,
    confirm: Callable[[], None] | None,
) -> Plan:
    """Publish the sources, the labels, then plan.json."""
    number = len(old.parts)
    per_task = sources_per_task(min(limit or sources.num_rows, sources.num_rows), old.config.sources_per_task)
    planned = deal_sources(sources, seed=old.config.seed + number, per_task=per_task, limit=limit)
    numbers = pc.add(planned.column("task"), pa.scalar(old.tasks, pa.int32()))
    planned = planned.set_column(planned.schema.get_field_index("task"), schema.SOURCES.field("task"), numbers)
    known = json.loads(read_agreed(store, schema.LABELS)) if store.exists(schema.LABELS) else {}
    labels = label_ids(_label_names(planned), known)
    with scratch_folder() as folder:
        path = Path(folder, "sources.parquet")
        write_plan(planned, path, per_task)
        file = name_file(path, number, old.format)
        if confirm is not None:
            confirm()
        store.publish(path, file)
    if labels != known:
        store.publish_bytes(as_json(labels), schema.LABELS)
    part = PlanPart(
        src=src,
        file=file,
        first_task=old.tasks,
        tasks=-(-planned.num_rows // per_task),
        sources=planned.num_rows,
        listed=sources.num_rows,
        limit=limit,
        retry=retry,
        ffmpeg=tool.version,
        tars=pc.count_distinct(planned.column("tar")).as_py() if has_tars(planned) else 0,
    )
    new = old.model_copy(update={"parts": (*old.parts, part)})
    if confirm is not None:
        confirm()
    store.publish_bytes(new.data(), schema.PLAN_JSON)
    return new


def _label_names(sources: pa.Table) -> set[str]:
    own = pc.unique(sources.column("label")).drop_null().to_pylist()
    rows = pc.list_flatten(sources.column("rows"))
    return {*own, *pc.unique(pc.struct_field(rows, "label")).drop_null().to_pylist()}


def refuse_mismatch(store: Store, there: Plan, src: str, config: ShardConfig, tool: Tool) -> None:
    """JobMismatchError with every difference between the job at DST and the one that the user wants.

    src: as Store.url() gives it.
    """
    old, new = there.config.model_dump(mode="json"), config.model_dump(mode="json")
    differences = [f"{key}: {old[key]!r} there, {new[key]!r} here" for key in sorted(new) if old[key] != new[key]]
    sources = list(dict.fromkeys(part.src for part in there.parts))
    if src not in sources:
        differences.insert(0, f"src: {', '.join(map(repr, sources))} there, {src!r} here")
    if not differences and not is_finished(store, there):
        last = there.parts[-1]
        differences += tool_differences(there, tool, set(range(last.first_task, there.tasks)))
    if differences:
        raise JobMismatchError(
            f"{store.url()}: holds another job; {'; '.join(differences)}. Give the same values or another DST"
        )


def tool_differences(plan: Plan, tool: Tool, tasks: set[int]) -> list[str]:
    """Why this machine cannot run these tasks of a plan byte for byte; empty where it can."""
    words = [
        f"ffmpeg: {part.ffmpeg!r} there, {tool.version!r} here (set REELMAE_FFMPEG to the one of the plan)"
        for part in plan.parts
        if part.ffmpeg != tool.version and any(map(part.holds, tasks))
    ]
    if plan.encoder == "nvenc" and not encoders.has_nvenc(tool.path, plan.config.codec):
        words.append("encoder: 'nvenc' there, but it does not run here (take a machine with NVENC)")
    return words
