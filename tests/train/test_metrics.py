"""metrics.jsonl: each step once, in order, also after a crash."""

from __future__ import annotations

from pathlib import Path

import pytest

from reelmae.train.metrics import Display, MetricsLog, read_rows


def write(out: Path, start: int, steps: list[int]) -> None:
    log = MetricsLog(out, start)
    for step in steps:
        log.write({"step": step, "loss": step / 10})
    log.close()


def test_rows_beyond_the_checkpoint_and_a_half_written_one_are_dropped_on_resume(tmp_path: Path) -> None:
    write(tmp_path, 0, [1, 2, 3, 4])
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 5, "lo')  # the crash
    write(tmp_path, 2, [3, 4, 5])
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_a_fresh_run_drops_the_rows_of_one_that_never_reached_a_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 0, [1, 2, 3])
    write(tmp_path, 0, [1])
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1]


def test_tensorboard_gets_every_row(tmp_path: Path) -> None:
    write(tmp_path, 0, [1, 2, 3])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("loss")] == [(1, 0.1), (2, 0.2), (3, 0.3)]


def test_off_a_terminal_the_last_step_is_told_in_a_plain_line_on_stderr(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Display(3, 0) as display:
        for step in (1, 2, 3):
            display.show({"step": step, "loss": 0.5, "clips_per_s": 12.34, "wait_share": 0.25})
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == "step 3/3  loss 0.5000  12.3 clips/s  waiting 25%"


def test_retries_are_told_where_there_are_any(capsys: pytest.CaptureFixture[str]) -> None:
    with Display(1, 0) as display:
        display.show({"step": 1, "loss": 0.5, "clips_per_s": 1.0, "wait_share": 0.25, "retries": 7})
    assert capsys.readouterr().err.endswith("waiting 25%  7 retries\n")
