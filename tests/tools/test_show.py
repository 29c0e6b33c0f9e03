"""What a running command tells where there is no terminal."""

from __future__ import annotations

import pytest

from reelmae.pipeline.ingest.job import Progress
from reelmae.tools import show


def test_time_left_counts_this_runs_sources_only_and_the_end_is_told_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(show, "LINE_EVERY_S", 0.0)
    with show.ShardProgress() as progress:
        for done, seconds in (
            (80, 1.0),
            (85, 10.0),
            (100, 40.0),
            (100, 41.0),
        ):  # 80 were done by an earlier run
            progress(Progress(done, 100, clips=done - 80, bytes=0, rejected=0, seconds=seconds))
    lines = capsys.readouterr().err.splitlines()
    assert [line.rsplit("  ", 1)[1] for line in lines] == ["20 s left", "30 s left", "0 s left"]
