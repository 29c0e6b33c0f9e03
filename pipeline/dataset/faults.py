"""Faults of a dataset, and what mends each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

Row = dict[str, Any]
SHARD_FILE = re.compile(r"shards/(\d{6,})-\d{2,}\.(tar|idx)")


class Mend(StrEnum):
    """What mends a fault."""

    TASK = "task"  # its task is run again
    JOIN = "join"  # the commits are joined again
    IDX = "idx"  # the DALI index is made again from its tar, which is sound
    LABELS = "labels"  # labels.json is made again from the plan
    EXTRA = "extra"  # the file is removed
    PLAN = "plan"  # nothing: the plan itself is damaged
    NONE = "none"  # nothing here: the text says what to do


@dataclass(frozen=True)
class Fault:
    """What is wrong with one file; `task`: the task that must be run again for it, where it is one."""

    file: str
    text: str
    mend: Mend
    task: int | None = None


class Faults(list[Fault]):
    """All that was found so far."""

    def add(self, file: str, words: str, mend: Mend, task: int | None = None) -> None:
        """One more; `words` say what is wrong with the file."""
        self.append(Fault(file, f"{file}: {words}", mend, task))


def task_of(shard: str) -> int:
    """The task that a shard is of, by its name; -1 where it is no name of a shard."""
    match = SHARD_FILE.fullmatch(shard)
    return int(match.group(1)) if match else -1


def line_of(error: BaseException) -> str:
    """An error in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]
