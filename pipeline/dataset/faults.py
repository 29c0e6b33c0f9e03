"""Faults of a dataset, and what mends each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

SHARD_FILE = re.compile(r"shards/(\d{6,})-\d{2,}\.(tar|idx)")


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


def task_of(shard: str) -> int:
    """The task that a shard belongs to, by the shard's name; -1 where the name is not that of a shard."""
    match = SHARD_FILE.fullmatch(shard)
    return int(match.group(1)) if match else -1


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type where there is no message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
