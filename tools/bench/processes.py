"""What this process and its children cost: processor seconds and memory, from Linux's /proc.

Decoding happens in children that live as long as the loader, so `resource`, which sums over ended children, does not
see them. A process that ends between two measurements is not counted.
"""

from __future__ import annotations

import os
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def family(root: int | None = None) -> list[int]:
    """A process and all its living descendants; None: this one's."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (words := _stat(int(folder.name))):
            children.setdefault(int(words[1]), []).append(int(folder.name))
    pids = [os.getpid() if root is None else root]
    for pid in pids:  # grows during the loop
        pids += children.get(pid, [])
    return pids


def cpu_seconds() -> dict[int, float]:
    """Process id → user and system seconds of all threads, ended ones included, of each process of the family."""
    found = {pid: _stat(pid) for pid in family()}
    return {pid: (int(words[11]) + int(words[12])) / _TICKS for pid, words in found.items() if words}


def family_cost(root: int) -> tuple[float, int]:
    """Processor seconds of a process's family, with those of ended children that were waited for; bytes of its memory."""
    found = [words for pid in family(root) if (words := _stat(pid))]
    ticks = sum(int(word) for words in found for word in words[11:15])
    return ticks / _TICKS, sum(int(words[21]) for words in found) * _PAGE


def cpu_between(before: dict[int, float], after: dict[int, float]) -> float:
    """Seconds between two `cpu_seconds()`. A process that started in between counts from its start."""
    return sum(seconds - before.get(pid, 0.0) for pid, seconds in after.items())


def memory_bytes(field: str) -> int:
    """Sum of a field of /proc/PID/status over the family: VmRSS is the memory now, VmHWM each process's own peak.

    Pages that several processes share, such as decoded frames, count once for each of them.
    """
    total = 0
    for pid in family():
        try:
            status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if f"{field}:" in status:  # a zombie has no memory
            total += int(status.split(f"{field}:")[1].split()[0]) * 1024
    return total


def peak_bytes() -> int:
    """The most memory that this process alone has had. Not ru_maxrss: a child starts with its parent's."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name: state, parent, …; empty if the process is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return []
    return text.rpartition(")")[2].split()
