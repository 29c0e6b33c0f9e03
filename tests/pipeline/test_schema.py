"""The closed list of reasons: each has a meaning, and the README says which step gives it."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

from reelmae.pipeline.schema import Reason, reason_meaning

README = Path(__file__).resolve().parents[2] / "pipeline" / "ingest" / "README.md"


def test_each_reason_has_a_meaning_of_its_own() -> None:
    meanings = [reason.meaning for reason in Reason]
    assert all(meanings)
    assert len(set(meanings)) == len(meanings) == 27


def test_the_readme_names_every_reason_and_no_other_with_the_step_that_gives_it() -> None:
    section = README.read_text(encoding="utf-8").split("## The steps of one source")[1].split("\n## ")[0]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("| ")]
    of_steps = {word for row in rows for word in re.findall(r"`(\w+)`", row[3])}
    of_any_step = set(re.findall(r"`(\w+)`", section.split("Any step that runs a child")[1].split(".")[0]))
    assert of_steps | of_any_step == set(Reason)


def test_a_reason_is_its_value_in_the_tables() -> None:
    assert Reason("too_short") is Reason.TOO_SHORT
    assert Reason.TOO_SHORT == Reason.TOO_SHORT.value == str(Reason.TOO_SHORT) == "too_short"
    assert pickle.loads(pickle.dumps(Reason.TOO_SHORT)) is Reason.TOO_SHORT


def test_the_meaning_of_a_reason_of_another_version_is_empty() -> None:
    assert reason_meaning("static") == Reason.STATIC.meaning
    assert reason_meaning("eaten_by_the_dog") == ""
