"""Bad clips: where they are written, and what a run that goes on knows of them."""

import json
from pathlib import Path

import pytest

from reelmae.pipeline.errors import BadClipError, TooManyBadClipsError
from reelmae.pipeline.loading.quarantine import Quarantine, replacement


def found(file: Path, *clips: int, index: str = "a", n: int = 5000, share: float = 0.01) -> Quarantine:
    quarantine = Quarantine(n, share, file=file, index=index)
    for clip in clips:
        quarantine.add(clip, BadClipError(f"key{clip}", "ends within a box"))
    return quarantine


def test_a_bad_clip_is_a_line_with_its_key_and_reason(tmp_path: Path) -> None:
    found(tmp_path / "run/bad.jsonl", 7)
    [line] = (tmp_path / "run/bad.jsonl").read_text().splitlines()
    assert json.loads(line) == {"index": "a", "clip": 7, "key": "key7", "reason": "ends within a box"}


def test_a_run_that_goes_on_knows_the_bad_clips_of_before(tmp_path: Path) -> None:
    found(tmp_path / "bad.jsonl", 7, 9)
    again = found(tmp_path / "bad.jsonl")
    assert again.clips == {7, 9}
    assert again.reasons == {"key7": "ends within a box", "key9": "ends within a box"}


def test_a_clip_that_is_known_is_not_written_again(tmp_path: Path) -> None:
    found(tmp_path / "bad.jsonl", 7, 7)
    found(tmp_path / "bad.jsonl", 7)
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 1


def test_bad_clips_of_another_index_are_not_taken_over(tmp_path: Path) -> None:
    found(tmp_path / "bad.jsonl", 7, index="another")
    assert found(tmp_path / "bad.jsonl").clips == set()


def test_a_line_that_a_killed_process_left_is_passed_over_and_spoils_no_other(tmp_path: Path) -> None:
    found(tmp_path / "bad.jsonl", 7, 8)
    whole = (tmp_path / "bad.jsonl").read_text()
    (tmp_path / "bad.jsonl").write_text(whole[:-20])
    assert found(tmp_path / "bad.jsonl", 9).clips == {7, 9}
    assert found(tmp_path / "bad.jsonl").clips == {7, 9}


def test_clips_known_from_before_do_not_stop_a_run_that_finds_few(tmp_path: Path) -> None:
    with pytest.raises(TooManyBadClipsError, match="11 bad clips"):
        found(tmp_path / "bad.jsonl", *range(11))
    again = found(tmp_path / "bad.jsonl", *range(20, 30))  # ten more: 1 % of the first thousand
    assert len(again.clips) == 21
    with pytest.raises(TooManyBadClipsError, match="11 bad clips"):
        again.add(31, BadClipError("key31", "x"))


def test_replacements_are_spread_over_the_dataset_and_depend_on_nothing_else() -> None:
    drawn = [replacement(5, attempt, rows=range(50, 150), seed=1, epoch=2) for attempt in range(1, 60)]
    assert drawn == [replacement(5, attempt, rows=range(50, 150), seed=1, epoch=2) for attempt in range(1, 60)]
    assert len(set(drawn)) > 30
    assert all(50 <= clip < 150 for clip in drawn)
