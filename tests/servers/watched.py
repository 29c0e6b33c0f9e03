"""Looks at processes while they run: which programs, and whether a secret is in what they show."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from s3_servers import SECRET as KEY

SECRET = KEY.encode()


@dataclass
class Watched:
    """What was seen of the processes below one: name and command → environment."""

    commands: dict[bytes, bytes] = field(default_factory=dict)

    def programs(self) -> set[str]:
        """The names of the programs that were seen."""
        return {Path(os.fsdecode(command.split(b"\0")[0])).name for command in self.commands}

    def with_secret(self) -> list[bytes]:
        """Commands that show the secret or have it in their environment."""
        return [command for command, environ in self.commands.items() if SECRET in command or SECRET in environ]


def _parent(pid: str) -> str:
    with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 - as fast as it can be
        return file.read().rpartition(b")")[2].split()[1].decode()


@contextmanager
def watch(*pids: int) -> Iterator[Watched]:
    """Look at all processes below these, again and again, until the block ends.

    A process that has not begun its own program yet still shows its parent's command: it is not counted.
    """
    watched, stop, below = Watched(), threading.Event(), set(map(str, pids))
    roots = frozenset(below)
    known: dict[str, str] = {}

    def look() -> None:
        while not stop.is_set():
            for name in os.listdir("/proc"):  # noqa: PTH208 - as fast as it can be
                if not name.isdigit() or name in roots:
                    continue
                with suppress(OSError):
                    if name not in known:
                        known[name] = _parent(name)
                    if known[name] not in below:
                        continue
                    below.add(name)
                    command = Path(f"/proc/{name}/cmdline").read_bytes()
                    if command and command != Path(f"/proc/{known[name]}/cmdline").read_bytes():
                        watched.commands[command] = Path(f"/proc/{name}/environ").read_bytes()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield watched
    finally:
        stop.set()
        thread.join()
