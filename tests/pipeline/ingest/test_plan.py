"""The plan: a permutation in tasks, the same for the same seed."""

import pyarrow as pa
import pytest

from reelmae.pipeline.ingest.plan import label_ids, plan, sources_per_task
from reelmae.pipeline.ingest.sources import LISTED
from reelmae.pipeline.schema import SOURCES


def _listed(n: int) -> pa.Table:
    rows = [{"url": f"/b/{i:05d}", "size": i, "etag": "", "label": None} for i in range(n)]
    return pa.Table.from_pylist(rows, LISTED)


@pytest.mark.parametrize(
    ("n", "wanted", "size"), [(1, None, 8), (600, None, 10), (10**6, None, 256), (50, 3, 3)]
)
def test_task_size_depends_on_the_number_of_sources_only(n: int, wanted: int | None, size: int) -> None:
    assert sources_per_task(n, wanted) == size


def test_plan_is_a_permutation_in_tasks() -> None:
    planned = plan(_listed(100), seed=5, per_task=8)
    assert planned.schema.equals(SOURCES)
    assert sorted(planned.column("url").to_pylist()) == _listed(100).column("url").to_pylist()
    assert planned.column("task").to_pylist() == [i // 8 for i in range(100)]


def test_same_seed_same_plan_other_seed_another() -> None:
    assert plan(_listed(50), seed=1, per_task=8).equals(plan(_listed(50), seed=1, per_task=8))
    assert not plan(_listed(50), seed=1, per_task=8).equals(plan(_listed(50), seed=2, per_task=8))


def test_label_ids_follow_the_sorted_names() -> None:
    assert label_ids({"wave", "a", "yoga"}) == {"a": 0, "wave": 1, "yoga": 2}
