"""What a running command shows, on a terminal and where there is none."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from typing import Any

import pytest
from rich.console import Console

from reelmae.pipeline.ingest.job import Progress
from reelmae.tools import show

TimedState = tuple[float, Progress]


def state(done: int, *, before: int = 0, sources: int = 100, clips: int = 0, read: int = 0) -> Progress:
    return Progress(
        sources_done=done,
        sources_before=before,
        sources=sources,
        source_bytes=read,
        clips=clips,
        bytes=0,
        rejected=0,
        seconds=0.0,
    )


def lines(states: Sequence[TimedState], error: Exception | None = None) -> list[dict[str, Any]]:
    """What is written where there is no terminal when these states come at these times, and then this error."""
    out, times = io.StringIO(), iter([when for when, _ in states])
    progress = show.ShardProgress(now=lambda: next(times), console=Console(file=out, width=80))
    with contextlib.suppress(RuntimeError), progress:
        for _, what in states:
            progress(what)
        if error is not None:
            raise error
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_a_line_comes_at_once_then_every_five_seconds_and_one_when_done() -> None:
    states = [(t / 2, state(t)) for t in range(25)]  # twelve seconds, two states a second
    found = lines([*states, (12.1, state(100)), (12.2, state(100))])
    assert [(line["event"], line["sources_done"]) for line in found] == [
        ("progress", 0),
        ("progress", 10),
        ("progress", 20),
        ("done", 100),
    ]
    assert set(found[0]) == {
        "event",
        "sources_done",
        "sources",
        "sources_per_s",
        "clips",
        "clips_per_s",
        "read_mb_per_s",
        "written_mb",
        "rejected",
        "retries",
        "seconds",
        "left_s",
    }


def test_rates_are_those_of_the_last_half_minute() -> None:
    fast = [(float(t), state(10 * t, sources=2000, clips=20 * t, read=t * 10**7)) for t in range(101)]
    slow = [(100.0 + t, state(1000 + t, sources=2000, clips=2000, read=10**9)) for t in range(1, 61)]
    found = lines([*fast, *slow])
    assert found[19]["sources_per_s"] == pytest.approx(10)
    assert found[19]["clips_per_s"] == pytest.approx(20)
    assert found[19]["read_mb_per_s"] == pytest.approx(10)
    assert (found[-1]["sources_per_s"], found[-1]["clips_per_s"]) == (1, 0)


def test_what_is_held_does_not_grow_with_the_time() -> None:
    times = iter(i / 100 for i in range(100_000))
    progress = show.ShardProgress(now=times.__next__, console=Console(file=io.StringIO()))
    for i in range(20_000):
        progress(state(i, sources=20_000))
    assert len(progress.window) <= show.WINDOW_S / show.SAMPLE_S + 3


def test_time_left_counts_this_runs_sources_only() -> None:
    states = [(0.0, state(80, before=80)), (10.0, state(85, before=80)), (40.0, state(100, before=80))]
    assert [line["left_s"] for line in lines(states)] == [None, 30.0, 0.0, 0.0]


def test_a_run_that_fails_is_not_told_to_be_done() -> None:
    assert [line["event"] for line in lines([(0.0, state(1))], RuntimeError("the disk is full"))] == ["progress"]


def test_a_job_with_nothing_left_to_do_says_nothing() -> None:
    assert lines([]) == []


@pytest.mark.parametrize("width", [80, 100])
def test_a_terminal_shows_rates_and_the_time_left(width: int) -> None:
    out = io.StringIO()
    times = iter([0.0, 10.0])
    console = Console(file=out, force_terminal=True, width=width, legacy_windows=False)
    with show.ShardProgress(now=lambda: next(times), console=console) as progress:
        progress(state(0))
        progress(state(20, clips=30, read=45_000_000))
    text = out.getvalue().split("\r")[-1]
    for words in ("20/100", "2.0/s", "3.0 clips/s", "4.5 MB/s", "0 rejected", "40 s left"):
        assert words in text, text


def test_clips_are_shown_in_lines_as_sources_are() -> None:
    out, times = io.StringIO(), iter([0.0, 1.0, 4.9, 5.0, 9.9, 10.0])
    with show.ClipProgress(now=times.__next__, console=Console(file=out, width=80)) as progress:
        for clips in range(1, 7):
            progress(clips, 6)
    assert [json.loads(line) for line in out.getvalue().splitlines()] == [
        {"event": "progress", "clips": 1, "of": 6},
        {"event": "progress", "clips": 4, "of": 6},
        {"event": "progress", "clips": 6, "of": 6},
        {"event": "done", "clips": 6, "of": 6},
    ]


def test_clips_are_counted_on_a_terminal() -> None:
    out = io.StringIO()
    with show.ClipProgress(console=Console(file=out, force_terminal=True, width=80)) as progress:
        progress(3, 12)
    assert "3/12" in out.getvalue()
    assert "event" not in out.getvalue()


def test_names_cannot_steer_a_terminal() -> None:
    assert show.printable("a\x1b[31m\nb\u202ec\t.mp4") == r"a\x1b[31m\nb\u202ec\t.mp4"
    assert show.printable("žluťoučký 映画.mp4") == "žluťoučký 映画.mp4"


def test_lengths_and_sizes_take_the_unit_that_fits() -> None:
    assert [show.seconds_text(s) for s in (8.5, 89, 600, 36_000)] == ["8.5 s", "89 s", "10.0 min", "10.0 h"]
    assert [show.length_text(s) for s in (8.52, 89.96, 600)] == ["8.52 s", "89.96 s", "10.0 min"]
    sizes = ["999 B", "12.3 kB", "2.5 TB", "4,000 TB"]
    assert [show.bytes_text(n) for n in (999, 12_345, 2.5e12, 4e15)] == sizes
