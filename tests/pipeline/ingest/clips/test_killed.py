"""Children that somebody else kills: the source is tried again; a crash that comes every time is the source's."""

from __future__ import annotations

import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from reelmae.pipeline.ingest.clips.make import KILLED_TRIES, ClipMaker, SourceClips
from reelmae.pipeline.ingest.clips.outcome import Rejected
from reelmae.pipeline.ingest.clips.probe import Prober
from reelmae.pipeline.ingest.clips.source import Source
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.ffmpeg import Tool, find_ffmpeg
from reelmae.pipeline.ingest.sandbox import Sandbox
from reelmae.pipeline.schema import Reason

Make = Callable[..., Path]


class _Prober(Prober):
    """Kills its own child, a moment after it was asked, for the first `kills` questions."""

    kills = 0

    def _ask(self, question: dict[str, object], wall_s: float) -> dict[str, object]:
        if self.kills and self._child is not None and self._child.alive:
            self.kills -= 1
            os.kill(self._child.pid, signal.SIGSTOP)  # it has not answered yet when it is killed
            threading.Timer(0.05, os.kill, (self._child.pid, signal.SIGKILL)).start()
        return super()._ask(question, wall_s)


@pytest.fixture
def prober(tmp_path: Path) -> Iterator[_Prober]:
    (tmp_path / "prober").mkdir()
    prober = _Prober(Sandbox(), tmp_path / "prober")
    yield prober
    prober.close()


@pytest.fixture
def source(make_video: Make, tmp_path: Path) -> Source:
    path = make_video(tmp_path / "in.mp4", frames=12)
    return Source(str(path), None, (), path, path.stat().st_size)


def _make(source: Source, prober: Prober, folder: Path, tool: Tool | None = None) -> SourceClips | Rejected:
    folder.mkdir()
    config = ShardConfig(short_side=64)
    return ClipMaker(config, tool or find_ffmpeg(), "x264", {}, Sandbox(), prober).make(source, folder)


def _tool(folder: Path, line: str, times: int) -> Tool:
    """An ffmpeg that runs this line of shell instead, for the first `times` runs."""
    folder.mkdir()
    real = find_ffmpeg()
    script = folder / "ffmpeg"
    script.write_text(f"#!/bin/sh\necho run >> {folder}/runs\n[ $(wc -l < {folder}/runs) -le {times} ] && {line}\n")
    with script.open("a") as file:
        file.write(f'exec {real.path} "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return replace(real, path=str(script))


def _runs(folder: Path) -> int:
    return len((folder / "runs").read_text().splitlines())


@pytest.mark.parametrize("kill", ["KILL", "TERM"])
def test_a_killed_encoder_is_run_again(kill: str, source: Source, prober: Prober, tmp_path: Path) -> None:
    undisturbed = _make(source, prober, tmp_path / "undisturbed")
    assert isinstance(undisturbed, SourceClips)
    made = _make(source, prober, tmp_path / "work", _tool(tmp_path / "tool", f"kill -{kill} $$", KILLED_TRIES - 1))
    assert isinstance(made, SourceClips)
    assert [c.read_bytes() for c in made.clips] == [c.read_bytes() for c in undisturbed.clips]
    assert len(list((tmp_path / "work").iterdir())) == 1  # what the others left is removed


@pytest.mark.parametrize("words", ["", "moov atom not found"])
def test_ffmpeg_that_ends_by_itself_for_sigterm_was_killed(
    words: str, source: Source, prober: Prober, tmp_path: Path
) -> None:
    """It catches the signal and leaves with this exit status. Where it was reading, it calls the file damaged."""
    line = f"{{ echo {words} >&2; exit 255; }}" if words else "exit 255"
    tool = _tool(tmp_path / "tool", line, 1)
    assert isinstance(_make(source, prober, tmp_path / "work", tool), SourceClips)
    assert _runs(tmp_path / "tool") == 2


def test_one_that_is_killed_every_time_is_crashed(source: Source, prober: Prober, tmp_path: Path) -> None:
    made = _make(source, prober, tmp_path / "work", _tool(tmp_path / "tool", "kill -KILL $$", 10**6))
    assert isinstance(made, Rejected)
    assert (made.reason, made.detail) == (Reason.CRASHED, f"decoding died of SIGKILL: , {KILLED_TRIES} times")
    assert _runs(tmp_path / "tool") == KILLED_TRIES
    assert list((tmp_path / "work").iterdir()) == []


def test_a_crash_of_its_own_gets_two_tries(source: Source, prober: Prober, tmp_path: Path) -> None:
    made = _make(source, prober, tmp_path / "work", _tool(tmp_path / "tool", "kill -SEGV $$", 10**6))
    assert isinstance(made, Rejected)
    assert (made.reason, made.detail) == (Reason.CRASHED, "ffmpeg died of SIGSEGV: ")
    assert _runs(tmp_path / "tool") == 2


def test_a_killed_probing_child_is_replaced(source: Source, prober: _Prober, tmp_path: Path) -> None:
    undisturbed = _make(source, prober, tmp_path / "undisturbed")
    prober.kills = KILLED_TRIES - 1
    made = _make(source, prober, tmp_path / "work")
    assert prober.kills == 0
    assert isinstance(made, SourceClips)
    assert isinstance(undisturbed, SourceClips)
    assert [c.read_bytes() for c in made.clips] == [c.read_bytes() for c in undisturbed.clips]
