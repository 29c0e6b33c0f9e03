"""What every command has: the flag `--json`, and a `run` that returns its result.

A command is a dataclass of its flags: the docstring of the class and the string under each field are its `--help`.
`run` imports what it needs, so that `--help` and `shard` start without torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from reelmae.tools.show import Result


@dataclass(kw_only=True)
class Command(ABC):
    """One command of `reelmae`."""

    json: bool = False
    """Print one JSON object on stdout, and nothing else there."""

    @abstractmethod
    def run(self) -> Result:
        """Do it; `exit_status` in the result, where it is there, is the process's."""
