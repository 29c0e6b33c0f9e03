"""Faults of a dataset, and what mends each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from reelmae.pipeline.schema import shard_name

_SHARD = re.compile(r"shards/(?:[0-9]{4,}/)?([0-9]{6,})-([0-9]{2,})\.tar")


class Mend(StrEnum):
    """What mends a fault."""

    TASK = "task"  # run the task again
    JOIN = "join"  # join the commits again
    IDX = "idx"  # make the DALI index again from its tar, which is sound
    LABELS = "labels"  # make labels.json again from the plan
    EXTRA = "extra"  # remove the file
    PLAN = "plan"  # nothing: the plan itself is damaged
    NONE = "none"  # nothing that repair could do: the fault's text says what a person must do


@dataclass(frozen=True)
class Fault:
    """What is wrong with one file."""

    file: str
    text: str
    mend: Mend
    task: int | None = None
    """The task to run again; None where another thing mends it."""


class FaultList(list[Fault]):
    """All faults found so far."""

    def add(self, file: str, words: str, mend: Mend, task: int | None = None) -> None:
        """Add one fault; `words` say what is wrong with the file."""
        self.append(Fault(file, f"{file}: {words}", mend, task))


def task_of(shard: str, format: int) -> int:
    """The task that a shard belongs to, by its path in this format; -1 where the path is not that of a shard."""
    match = _SHARD.fullmatch(shard)
    if match is None:
        return -1
    task, number = int(match.group(1)), int(match.group(2))
    return task if shard_name(task, number, format) == shard else -1


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type where there is no message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
