"""Before a job's tasks run on a cluster: has each node the same tools, and does it reach the sources and the dataset?"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import islice

from reelmae.pipeline.errors import ClaimedError, ClusterError, InputError, JobMismatchError, ReelmaeError, StorageError
from reelmae.pipeline.ingest.ffmpeg import Tool, find_ffmpeg
from reelmae.pipeline.ingest.plan import parts
from reelmae.pipeline.ingest.plan.source_files import read_places
from reelmae.pipeline.ingest.plan.sources import access_of, local_path
from reelmae.pipeline.ingest.run.task import JobSpec, TaskWorker
from reelmae.pipeline.runners.runner import Runner
from reelmae.pipeline.storage import scratch
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.claim import refuse_others
from reelmae.pipeline.storage.store import Store

LOOK_AT = 8  # sources of each part of the plan that a node looks for
SHOWN = 3  # missing ones that a message names
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


def worker_of(runner: Runner, spec: JobSpec, tasks: set[int]) -> Callable[[], TaskWorker]:
    """The maker of a job's workers.

    ClusterError where a node does not see the dataset with the claim of this job, or sources that this machine sees.
    """
    if not tasks or not _ask(runner, partial(find_problem, spec, ())):
        return partial(TaskWorker, spec)
    seen = tuple(place for place in _places(spec, sorted(tasks)) if _exists(*place, spec.src_access))
    _ask(runner, partial(find_problem, spec, seen))
    return partial(NodeWorker, spec, seen)


def _ask(runner: Runner, question: Callable[[], str]) -> int:
    """How many nodes were asked; ClusterError where one has a problem."""
    answers = runner.ask_nodes(question)
    for name, problem in answers.items():
        if problem:
            raise ClusterError(f"node {name}: {problem}")
    return len(answers)


def _places(spec: JobSpec, tasks: list[int]) -> list[tuple[str, str]]:
    """The first source of some tasks from all over the plan: the file that must be there, and its part's src."""
    found: dict[tuple[str, str], None] = {}
    for part in spec.plan.parts:
        here = [task - part.first_task for task in tasks if part.holds(task)]
        some = here[:: max(1, len(here) // LOOK_AT)][:LOOK_AT]
        if some:
            with parts.part_file(Store(spec.dst, spec.dst_access), part) as file:
                for group in some:
                    places = (place for _, place in read_places(file, [group]) if place is not None)
                    found |= {(place, part.src): None for place in islice(places, 1)}
    return list(found)


def find_problem(spec: JobSpec, seen: tuple[tuple[str, str], ...]) -> str:
    """What keeps this machine from running tasks, in words; "" where nothing does. `seen`: places that the driver sees."""
    try:
        refuse_others(Store(spec.dst, _impatient(spec.dst_access)), spec.holders)
    except ClaimedError:
        return (
            f"does not see this job's files at {spec.dst}; give a DST that all nodes share, such as a bucket or a "
            "network folder that is mounted at the same path"
        )
    except (StorageError, InputError, OSError) as e:
        return f"cannot reach the destination: {e}"
    try:
        missing = [url for url, src in seen if not _exists(url, src, spec.src_access)]
    except (StorageError, InputError, OSError) as e:
        return f"cannot reach the sources: {e}"
    if not missing:
        return ""
    return (
        f"does not see {', '.join(missing[:SHOWN])}; give a SRC that all nodes share, such as a bucket or a network folder "
        "that is mounted at the same path"
    )


class NodeWorker(TaskWorker):
    """A TaskWorker of a cluster's node, which may have joined after the others were asked.

    ClusterError where this machine does not see the dataset, or none of the places that the driver sees.
    """

    def __init__(self, spec: JobSpec, seen: tuple[tuple[str, str], ...]) -> None:
        here = socket.gethostname()
        if problem := find_problem(spec, ()):
            raise ClusterError(f"node {here}: {problem}")
        if seen and not any(_exists(url, src, spec.src_access) for url, src in seen):
            raise ClusterError(f"node {here}: {find_problem(spec, seen)}")
        super().__init__(spec)


def _exists(url: str, src: str, access: Access) -> bool:
    local = local_path(url)
    return local.exists() if local is not None else Store(url, _impatient(access_of(url, src, access))).exists()


def _impatient(access: Access) -> Access:
    return replace(access, patience_s=min(access.patience_s, PATIENCE_S))
