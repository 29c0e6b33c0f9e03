"""Commits are read and held against the plan; on a cluster, each task's shards are checked by a worker of a runner.

A worker is made from a CheckSpec alone, on any machine. It reads a task's commit, checks the task's shards byte by byte
(shards.py), deep ones by decoding, and reports counts and faults: a TaskCheck. Both can be pickled. It judges no
commit: where it finds none that is good, it says so, and verify looks itself.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from types import TracebackType

import pyarrow as pa
import pyarrow.compute as pc

from reelmae.pipeline import schema
from reelmae.pipeline.dataset.faults import Fault, FaultList, Mend, task_of
from reelmae.pipeline.dataset.shards import Decoders, ShardCheck, by_shard
from reelmae.pipeline.dataset.tables import BROKEN
from reelmae.pipeline.errors import ClusterError, DatasetError, InputError, StorageError, StorageFullError
from reelmae.pipeline.ingest.run.nodes import PATIENCE_S
from reelmae.pipeline.ingest.run.task import BEGINS, StoppedError
from reelmae.pipeline.ingest.shards.commits import read_commit
from reelmae.pipeline.runners.runner import Runner, Watch
from reelmae.pipeline.storage import scratch
from reelmae.pipeline.storage.access import Access, interruptible
from reelmae.pipeline.storage.scratch import Scratch
from reelmae.pipeline.storage.store import Store


@dataclass(frozen=True)
class Commit:
    """A commit without faults."""

    table: pa.Table
    """All its rows."""
    clips: pa.Table
    """The rows of its clips."""
    shards: dict[str, int]
    """Shard → bytes."""


def commit_of_task(task: int, table: pa.Table, format: int, columns: Mapping[str, str]) -> Commit:
    """The commit with its clips and shards; DatasetError or ValueError where it is not the commit of this task.

    `columns`: the manifest's own, as the plan has them.
    """
    if not table.schema.equals(schema.commit_columns(format, columns)):
        raise DatasetError("its columns are not those of the format and the plan")
    clips = table.filter(pc.equal(table.column("kind"), schema.CLIP))
    wanted = schema.clip_columns(format, columns)
    clips = clips.select(wanted.names).replace_schema_metadata(None).cast(wanted)
    shards = json.loads((table.schema.metadata or {})[b"shards"])
    foreign = [name for name in shards if task_of(name, format) != task]
    if foreign:
        raise DatasetError(f"names {foreign[0]}: it is another task's")
    if set(pc.unique(clips.column("shard")).to_pylist()) != set(shards):
        raise DatasetError("its clips are not in the shards that it names")
    return Commit(table, clips, shards)


def read_each(
    store: Store, tasks: Iterable[int], format: int, *, ahead: int
) -> Generator[Callable[[], pa.Table], None, None]:
    """For each task, in order, a call that gives its commit or raises why it cannot; `ahead` are read before, if any."""
    if not ahead:
        yield from (functools.partial(read_commit, store, task, format) for task in tasks)
        return
    pool = ThreadPoolExecutor(ahead, thread_name_prefix="commits")
    try:
        waiting: deque[Future[pa.Table]] = deque()
        for task in tasks:
            if len(waiting) == ahead:
                yield functools.partial(_result, waiting.popleft(), pool)
            waiting.append(pool.submit(read_commit, store, task, format))
        for commit in waiting:
            yield functools.partial(_result, commit, pool)
    finally:
        pool.shutdown(cancel_futures=True)


def _result(commit: Future[pa.Table], pool: ThreadPoolExecutor) -> pa.Table:
    with interruptible(pool):
        return commit.result()


@dataclass(frozen=True)
class CheckSpec:
    """All that a CheckWorker is made from. It names nothing of the machine it was made on."""

    dst: str
    """URL of the dataset."""
    format: int
    columns: Mapping[str, str]
    """The manifest's own columns, as the plan has them."""
    deep: bool
    access: Access = field(default_factory=Access)
    """How the dataset is reached."""
    about: str = ""
    """sha256 of dataset.json, in hex: by it a node knows that it sees the same dataset."""


@dataclass(frozen=True)
class TaskCheck:
    """What checking the shards of one task found."""

    task: int
    is_checked: bool
    """False where no good commit was found, so that nothing was checked."""
    shards: int = 0
    """Shards that were read, with their clips and bytes."""
    clips: int = 0
    bytes: int = 0
    faults: tuple[Fault, ...] = ()
    undecodable: tuple[Fault, ...] = ()
    """Faults that only decoding found."""
    retries: Mapping[str, int] = field(default_factory=dict)
    """cause → requests to the store that were tried again."""


class CheckWorker:
    """Checks the shards of tasks, one task after the other. Use as a context, in one thread.

    Clips are decoded by one child process while the next ones are read. Only `stop` may be called from other threads.
    """

    def __init__(self, spec: CheckSpec) -> None:
        self._spec = spec
        self._stopping = threading.Event()
        self._access = copy.copy(spec.access)  # this worker's own count of retries, and its own waiting
        self._store = Store(spec.dst, self._access)
        self._scratch = Scratch("check-")
        self._decoders = Decoders(self._scratch.path, cores=1) if spec.deep else None

    def __enter__(self) -> CheckWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._decoders is not None:
            self._decoders.__exit__(kind, error, trace)
        self._scratch.close()

    def stop(self) -> None:
        """Kill the children and end the waiting for the store; `run` ends soon, with an error."""
        self._stopping.set()
        self._access.stop()
        if self._decoders is not None:
            self._decoders.stop()

    def run(self, task: int, watch: Watch[TaskCheck] | None = None) -> TaskCheck:
        """Check the shards of one task.

        StorageError where the store does not answer at all, StorageFullError where there is no room for a shard.
        """
        before, faults = Counter(self._access.retries.counts()), FaultList()
        shards = ShardCheck(self._store, self._scratch.path, self._spec.format, self._decoders, faults)

        def report(is_checked: bool) -> TaskCheck:
            retries = dict(Counter(self._access.retries.counts()) - before)
            counts = (shards.count, shards.clips, shards.bytes)
            return TaskCheck(task, is_checked, *counts, tuple(faults), tuple(shards.undecodable), retries)

        commit = self._read_commit(task)
        if commit is None:
            return report(False)
        for name, clips in by_shard(commit.clips):
            begun = 1 if watch is None else watch.begin(name)
            if begun > BEGINS:
                faults.add(name, f"cannot be checked: {begun - 1} workers died over it", Mend.NONE)
            else:
                shards.check(task, name, clips, commit.shards[name])
            if self._stopping.is_set():  # children that were killed by it look like damaged clips
                raise StoppedError("stopped")
            if watch is not None:
                watch.report(report(True))
        shards.drain()
        if self._stopping.is_set():
            raise StoppedError("stopped")
        return report(True)

    def _read_commit(self, task: int) -> Commit | None:
        try:
            table = read_commit(self._store, task, self._spec.format)
            return commit_of_task(task, table, self._spec.format, self._spec.columns)
        except StorageFullError:
            raise
        except StorageError:
            self._store.exists(schema.DATASET_JSON)  # StorageError where the store does not answer at all
            return None
        except (FileNotFoundError, DatasetError, *BROKEN):
            return None


def check_tasks(runner: Runner, spec: CheckSpec, tasks: Iterable[int]) -> dict[int, TaskCheck]:
    """What the runner's workers found of these tasks. Requests they tried again are counted in `spec.access`.

    ClusterError where a node has another reelmae, or does not see the dataset.
    """
    for node, problem in runner.ask_nodes(functools.partial(_find_problem, spec, version("reelmae"))).items():
        if problem:
            raise ClusterError(f"node {node}: {problem}")
    found: dict[int, TaskCheck] = {}
    with closing(runner.run(tasks, functools.partial(CheckWorker, spec))) as reports:
        for report in reports:
            for cause, n in report.retries.items():
                spec.access.retries.add(cause, n)
            found[report.task] = report
    return found


def _find_problem(spec: CheckSpec, ours: str) -> str:
    """What keeps this machine from checking the dataset, in words; "" where nothing does."""
    scratch.sweep()
    if (found := version("reelmae")) != ours:
        return f"has reelmae {found}, this machine {ours}; install the same on all nodes"
    try:
        store = Store(spec.dst, replace(spec.access, patience_s=min(spec.access.patience_s, PATIENCE_S)))
        if hashlib.sha256(store.read_bytes(schema.DATASET_JSON)).hexdigest() == spec.about:
            return ""
    except FileNotFoundError:
        pass
    except (StorageError, InputError) as e:
        return f"cannot reach the dataset: {e}"
    return (
        f"does not see the same dataset at {spec.dst}; give a DST that all nodes share, such as a bucket or a network "
        "folder that is mounted at the same path"
    )
