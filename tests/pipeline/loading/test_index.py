import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from reelmae.pipeline.errors import DatasetError, InputError
from reelmae.pipeline.loading.fetch import fetch
from reelmae.pipeline.loading.index import ClipIndex


def test_columns_are_what_the_parquet_says(natural_index: ClipIndex) -> None:
    table = pq.read_table(natural_index.store.local_path("index.parquet"))
    assert len(natural_index) == 22
    assert [natural_index.key(i) for i in range(22)] == table["key"].to_pylist()
    assert [natural_index.shard(i) for i in range(22)] == table["shard"].to_pylist()
    for name in ("offset", "size", "frames", "fps", "width", "height", "label_id"):
        assert getattr(natural_index, name).tolist() == table[name].to_pylist()
    assert natural_index.labels == {"a": 0, "b": 1}


def test_the_bytes_at_offset_and_size_are_the_clip(natural_index: ClipIndex) -> None:
    i = natural_index
    data = fetch(i.store, key=i.key(7), shard=i.shard(7), offset=int(i.offset[7]), size=int(i.size[7]))
    assert data[4:8] == b"ftyp"


def test_digest_names_the_content_and_not_the_layout_of_the_file(make_dataset: Callable, spec: type) -> None:
    index = make_dataset([spec(frames=4, seed=s) for s in range(5)])
    path: Path = index.store.local_path("index.parquet")
    table = pq.read_table(path)
    pq.write_table(table, path, row_group_size=2, compression="none")
    assert ClipIndex.open(index.store.url()).digest == index.digest
    pq.write_table(table.take([1, 0, 2, 3, 4]), path)
    assert ClipIndex.open(index.store.url()).digest != index.digest


def test_columns_cannot_be_written(natural_index: ClipIndex) -> None:
    with pytest.raises(ValueError, match="read-only"):
        natural_index.offset[0] = np.int64(1)


def test_a_folder_without_dataset_json_is_called_unfinished(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no dataset\.json.*run reelmae shard again"):
        ClipIndex.open(str(tmp_path))


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no such folder"):
        ClipIndex.open(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("about", "message"),
    [("[", "is not JSON"), ("[]", "format None"), ('{"format": 9, "clips": 1}', "format 9")],
)
def test_a_dataset_json_that_is_not_ours_is_refused(tmp_path: Path, about: str, message: str) -> None:
    (tmp_path / "dataset.json").write_text(about)
    with pytest.raises(InputError, match=message):
        ClipIndex.open(str(tmp_path))


def test_a_missing_or_broken_index_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps({"format": 1, "clips": 1}))
    with pytest.raises(InputError, match=r"has no index\.parquet"):
        ClipIndex.open(str(tmp_path))
    (tmp_path / "index.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(InputError, match="is no parquet file"):
        ClipIndex.open(str(tmp_path))


def test_an_index_of_another_length_than_promised_is_refused(make_dataset: Callable, spec: type) -> None:
    index = make_dataset([spec(frames=4)] * 2)
    index.store.local_path("dataset.json").write_text(json.dumps({"format": 1, "clips": 3}))
    with pytest.raises(DatasetError, match=r"has 2 clips.*says 3"):
        ClipIndex.open(index.store.url())
