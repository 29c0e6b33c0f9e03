"""`facts` opens a dataset as `verify` does. What it counts: see tests/tools/test_summary.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from reelmae.pipeline import schema
from reelmae.pipeline.dataset import facts
from reelmae.pipeline.errors import DatasetError, InputError
from reelmae.pipeline.storage.store import Store


def test_a_folder_and_a_store_give_the_same_facts(tiny_run: Path) -> None:
    shards = tiny_run / "shards"
    found = facts(str(shards))
    about = json.loads((shards / schema.DATASET_JSON).read_text())
    assert found == facts(Store(str(shards)))
    assert (found.clips, found.sources, found.shards) == (about["clips"], about["sources"], about["shards"])
    assert found.job is not None
    assert (found.job.finished, found.job.sources_done) == (True, about["sources"])


def test_a_dataset_that_is_not_finished_has_no_facts(run_copy: Path, tmp_path: Path) -> None:
    shards = run_copy / "shards"
    (shards / schema.DATASET_JSON).write_text("[]")
    with pytest.raises(DatasetError, match=r"dataset\.json: is damaged, no JSON \(not a JSON object\)"):
        facts(str(shards))
    (shards / schema.DATASET_JSON).unlink()
    for folder in (shards, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="no finished shard dataset"):
            facts(str(folder))


def test_a_dataset_without_its_plan_still_has_facts(run_copy: Path) -> None:
    shutil.rmtree(run_copy / "shards" / "plan")
    found = facts(str(run_copy / "shards"))
    assert found.job is None
    assert found.clips > 0
