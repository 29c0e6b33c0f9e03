"""How many processor cores this process may use: the default number of workers everywhere."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Cores of this process' affinity; all of the machine where the system knows no affinity."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
