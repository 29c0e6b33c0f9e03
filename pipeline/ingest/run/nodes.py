"""Before a job's tasks run on a cluster: has each node the same tools, and does it reach the sources and the dataset?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version

from reelmae.pipeline.errors import ClaimedError, ClusterError, InputError, JobMismatchError, ReelmaeError, StorageError
from reelmae.pipeline.ingest.ffmpeg import Tool, find_ffmpeg
from reelmae.pipeline.ingest.plan import parts
from reelmae.pipeline.ingest.plan.source_files import read_places
from reelmae.pipeline.ingest.plan.sources import access_of, local_path
from reelmae.pipeline.ingest.run.task import JobSpec
from reelmae.pipeline.runners.runner import Runner
from reelmae.pipeline.storage import scratch
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.claim import refuse_others
from reelmae.pipeline.storage.store import Store

LOOK_AT = 3  # sources of the plan that a node looks for
PATIENCE_S = 20.0  # of a node with a store that does not answer


@dataclass(frozen=True)
class NodeTools:
    """What a node would make clips with."""

    reelmae: str
    ffmpeg: str
    """Its version line, or why there is none."""


def find_tools() -> NodeTools:
    """The tools of this machine. What killed jobs have left in its temporary folder is removed."""
    scratch.sweep()
    try:
        ffmpeg = find_ffmpeg().version
    except ReelmaeError as e:
        ffmpeg = f"none ({e})"
    return NodeTools(version("reelmae"), ffmpeg)


def refuse_other_tools(runner: Runner, tool: Tool) -> None:
    """JobMismatchError where a node has another reelmae or ffmpeg than this machine: its clips would differ."""
    here = NodeTools(version("reelmae"), tool.version)
    for name, there in runner.ask_nodes(find_tools).items():
        if there.reelmae != here.reelmae:
            raise JobMismatchError(
                f"node {name}: has reelmae {there.reelmae}, this machine {here.reelmae}; install the same on all nodes"
            )
        if there.ffmpeg != here.ffmpeg:
            raise JobMismatchError(
                f"node {name}: ffmpeg is {there.ffmpeg!r} there, {here.ffmpeg!r} here, and its clips would not be the "
                "same; install the same on all nodes (or set REELMAE_FFMPEG on them), or remove the node"
            )


def refuse_unreachable(runner: Runner, spec: JobSpec, tasks: set[int]) -> None:
    """ClusterError where a node does not see the dataset with the claim of this job, or none of some planned sources."""
    if not tasks:
        return
    question = partial(find_problem, spec, min(tasks))
    for name, problem in runner.ask_nodes(question).items():
        if problem and not question():  # what this machine does not see either is gone, which is no fault of the node
            raise ClusterError(f"node {name}: {problem}")


def find_problem(spec: JobSpec, task: int) -> str:
    """What keeps this machine from running the task, in words; "" where nothing does."""
    try:
        store = Store(spec.dst, _impatient(spec.dst_access))
        refuse_others(store, spec.holders)
    except ClaimedError:
        return (
            f"does not see this job's files at {spec.dst}; give a DST that all nodes share, such as a bucket or a "
            "network folder that is mounted at the same path"
        )
    except (StorageError, InputError) as e:
        return f"cannot reach the destination: {e}"
    part = spec.plan.part_of(task)
    try:
        with parts.part_file(store, part) as file:
            places = [place for _, place in read_places(file, [task - part.first_task]) if place is not None]
        urls = list(dict.fromkeys(places))[:LOOK_AT]
        if not urls or any(_exists(url, part.src, spec.src_access) for url in urls):
            return ""
    except (StorageError, InputError) as e:
        return f"cannot reach the sources: {e}"
    return (
        f"sees none of {', '.join(urls)}; give a SRC that all nodes share, such as a bucket or a network folder that is "
        "mounted at the same path"
    )


def _exists(url: str, src: str, access: Access) -> bool:
    local = local_path(url)
    return local.exists() if local is not None else Store(url, _impatient(access_of(url, src, access))).exists()


def _impatient(access: Access) -> Access:
    return replace(access, patience_s=min(access.patience_s, PATIENCE_S))
