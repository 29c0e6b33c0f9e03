"""Runs one contender of `bench storage` in a process of its own: `python -m reelmae.tools.bench.run_contender`.

It gets a pickled Job on stdin (keys are in it: they are in no argument and no variable of the environment) and prints a
Timed as JSON. What the contender moved is held against sha256 after the clock has stopped.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from reelmae.tools.bench.contenders import READ, WRITE, Contender, Job
from reelmae.tools.bench.processes import memory_bytes

_CLEAR_REFS = Path("/proc/self/clear_refs")  # writing 5 sets VmHWM to what is resident now


@dataclass(frozen=True)
class Timed:
    """What a run took."""

    bytes: int
    seconds: float
    cpu_seconds: float
    extra_bytes: int
    """The highest memory of the process during the run, above what it held before; files that the system caches are
    not in it."""
    retries: int
    """What reelmae tried again; 0 for others, who do not say."""


def _fetching(job: Job, cache: Literal["empty", "full"] | None) -> Contender:
    from reelmae.tools.bench.fetching import Fetching  # with the loader, which other contenders do not need

    return Fetching(job, cache)


MAKERS: dict[str, Callable[[Job], Contender]] = {
    **READ,
    **WRITE,
    "loader": partial(_fetching, cache=None),
    "loader, empty cache": partial(_fetching, cache="empty"),
    "loader, full cache": partial(_fetching, cache="full"),
}
LOAD = tuple(name for name in MAKERS if name.startswith("loader"))


def measure(job: Job) -> Timed:
    """Run the job's contender in this process, which has done nothing else; ReelmaeError where bytes differ."""
    contender = MAKERS[job.name](job)
    with contextlib.suppress(OSError):  # where it cannot be set back, the peak is that since the start
        _CLEAR_REFS.write_text("5")
    idle, spent, began = memory_bytes("VmRSS"), _cpu_s(), time.perf_counter()
    moved = contender.run()
    seconds, spent, peak = time.perf_counter() - began, _cpu_s() - spent, memory_bytes("VmHWM")
    contender.check()
    return Timed(moved, seconds, spent, max(0, peak - idle), sum(job.access.retries.counts().values()))


def _cpu_s() -> float:
    """Processor seconds of all threads of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    print(json.dumps(asdict(measure(pickle.load(sys.stdin.buffer)))))
