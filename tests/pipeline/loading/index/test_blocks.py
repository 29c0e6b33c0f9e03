"""The checks of large clips' blocks: read where they may be used, in the order of the clips, and nothing for the others."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reelmae.pipeline import schema
from reelmae.pipeline.errors import DatasetError
from reelmae.pipeline.loading.index.blocks import NO_CHECKS
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.loading.index.mixture import mix
from reelmae.pipeline.loading.index.selection import Selection
from reelmae.pipeline.loading.tasks import clip_task
from reelmae.pipeline.storage.store import Store

LARGE = 3 * schema.BLOCK + 17  # bytes; what counts as large is the column's business


def checks(n: int) -> bytes:
    return random.Random(n).randbytes(4 * schema.BLOCK_CHECK)


def rows(n: int, large: Sequence[int]) -> list[dict[str, Any]]:
    """Those numbered in `large` have checks."""
    return [
        {"frames": 30 + i, "size": LARGE, "blocks": checks(i)} if i in large else {"frames": 30 + i} for i in range(n)
    ]


@pytest.fixture
def remote(index_of_rows: Callable[..., str], tmp_path: Path) -> Callable[..., str]:
    """remote(rows, …) → URL of index_of_rows' dataset on a store that is not local."""

    def make(*args: Any, **values: Any) -> str:
        folder = Path(index_of_rows(*args, **values))
        store = Store(f"memory://{tmp_path.name}/{folder.name}")
        for file in folder.iterdir():
            store.publish(file, file.name)
        return store.url()

    return make


@pytest.mark.parametrize("rows_of_group", [5, 7, 1000])
def test_each_large_clip_has_its_checks(remote: Any, rows_of_group: int) -> None:
    large = {0, 3, 4, 17, 38, 39}
    index = ClipIndex.open(remote(rows(40, sorted(large)), rows_of_group=rows_of_group))
    for clip in range(40):
        assert index.blocks.of(clip) == (checks(clip) if clip in large else None)
        assert clip_task(index, clip, (), planned=clip).blocks == index.blocks.of(clip)


def test_a_selection_takes_the_checks_along(remote: Any) -> None:
    url = remote(rows(40, range(0, 40, 3)), rows_of_group=6)
    index = ClipIndex.open(url, Selection(where="frames > 40 and frames != 50 and frames < 65"))
    for clip in range(len(index)):
        i = int(index.frames[clip]) - 30
        assert index.blocks.of(clip) == (checks(i) if i % 3 == 0 else None)


def test_a_mix_takes_the_checks_along(remote: Any) -> None:
    a, b = ClipIndex.open(remote(rows(6, [1, 5]))), ClipIndex.open(remote(rows(9, [0, 8])))
    none = ClipIndex.open(remote(rows(4, [])))
    both = mix([(a, None), (none, None), (b, None)])
    found = {clip: both.blocks.of(clip) for clip in range(19) if both.blocks.of(clip) is not None}
    assert found == {1: checks(1), 5: checks(5), 10: checks(0), 18: checks(8)}


def test_clips_without_checks_and_local_datasets_cost_nothing(remote: Any, index_of_rows: Any) -> None:
    assert ClipIndex.open(remote(rows(40, []))).blocks is NO_CHECKS
    local = ClipIndex.open(index_of_rows(rows(40, [1, 2])))
    assert local.blocks is NO_CHECKS
    assert local.digest == ClipIndex.open(remote(rows(40, [1, 2]))).digest  # a run may go on from the other


def test_checks_that_are_not_one_for_each_block_are_refused(remote: Any) -> None:
    for wrong in (checks(0)[:-1], checks(0)[:-8], b"", checks(0) * 2):
        with pytest.raises(DatasetError, match=rf"clip of {LARGE} bytes has {len(wrong)} bytes.*run reelmae verify"):
            ClipIndex.open(remote([{}, {"size": LARGE, "blocks": wrong}]))


def test_a_column_of_that_name_in_a_dataset_of_format_1_is_the_manifests_own(tmp_path: Path, remote: Any) -> None:
    store = Store(remote(rows(5, [])))
    store.download(schema.INDEX, tmp_path / "index")
    table = pq.read_table(tmp_path / "index").drop_columns(["blocks"])
    pq.write_table(table.append_column("blocks", pa.array(range(5))), tmp_path / "index")
    store.publish(tmp_path / "index", schema.INDEX)
    store.publish_bytes(json.dumps({"format": 1, "clips": 5}).encode(), schema.DATASET_JSON)
    index = ClipIndex.open(store.url(), Selection(where="blocks > 2"))
    assert len(index) == 2 and index.blocks is NO_CHECKS
