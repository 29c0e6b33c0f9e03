import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from reelmae.pipeline.errors import DatasetError, InputError
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.loading.index.selection import Selection
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.store import Store


def test_columns_are_what_the_parquet_says(natural_index: ClipIndex) -> None:
    table = pq.read_table(natural_index.store.local_path("index.parquet"))
    assert len(natural_index) == 22
    assert [natural_index.key(i) for i in range(22)] == table["key"].to_pylist()
    assert [natural_index.shard(i) for i in range(22)] == table["shard"].to_pylist()
    for name in ("offset", "size", "frames", "fps", "width", "height", "label_id"):
        assert getattr(natural_index, name).tolist() == table[name].to_pylist()
    assert [natural_index.codec_names[c] for c in natural_index.codec_of_clip] == table["codec"].to_pylist()
    assert [f"{check:016x}" for check in natural_index.check.tolist()] == [h[:16] for h in table["sha256"].to_pylist()]
    assert natural_index.labels == {"a": 0, "b": 1}


def test_shards_are_runs_of_rows(natural_index: ClipIndex) -> None:
    i = natural_index
    assert i.shard_start.tolist() == [0, 6, 12, 18, 22]
    assert i.shard_of_clip.tolist() == [0] * 6 + [1] * 6 + [2] * 6 + [3] * 4
    assert [i.shard_number(clip) for clip in (0, 5, 6, 21)] == [0, 0, 1, 3]
    last = [5, 11, 17, 21]
    assert i.shard_bytes.tolist() == (i.offset[last] + i.size[last]).tolist()
    for shard, needed in zip(i.shard_names, i.shard_bytes, strict=True):
        assert needed <= i.store.local_path(shard).stat().st_size < needed + 20000
    assert i.dataset_of_shard.tolist() == [0] * 4 and i.dataset(13) == 0
    assert [(part.start, part.stop) for part in i.parts] == [(0, 4)]


def test_the_bytes_at_offset_and_size_are_the_clip(natural_index: ClipIndex) -> None:
    i = natural_index
    data = i.store.read_range(i.shard(7), int(i.offset[7]), int(i.size[7]))
    assert data[4:8] == b"ftyp"


def test_digest_names_the_content_and_not_the_layout_of_the_file(make_dataset: Callable, spec: type) -> None:
    index = make_dataset([spec(frames=4, seed=s) for s in range(5)])
    path: Path = index.store.local_path("index.parquet")
    table = pq.read_table(path)
    pq.write_table(table, path, row_group_size=2, compression="none")
    assert ClipIndex.open(index.store.url()).digest == index.digest
    pq.write_table(table.take([1, 0, 2, 3, 4]), path)
    assert ClipIndex.open(index.store.url()).digest != index.digest


def test_digest_names_keys_hashes_and_nothing_else(index_of_rows: Callable[..., str]) -> None:
    def digest(**changed: list) -> str:
        return ClipIndex.open(rewrite(index_of_rows([{}, {}]), **changed)).digest

    key, sha256 = "0123456789abcdef_0000", "0" * 64
    same = digest(key=[key, key], sha256=[sha256, sha256])
    changed = [
        digest(key=[key, "0123456789abcdef_0001"], sha256=[sha256, sha256]),
        digest(key=[key, "0123456789abcdee_0000"], sha256=[sha256, sha256]),
        digest(key=[key, key], sha256=[sha256, "1" + "0" * 63]),
    ]
    assert len({same, *changed}) == 4
    assert digest(key=[key, key], sha256=[sha256, sha256], motion=[1.0, 2.0], offset=[512, 1024]) == same


def test_columns_cannot_be_written(natural_index: ClipIndex) -> None:
    arrays = {name: value for name, value in vars(natural_index).items() if isinstance(value, np.ndarray)}
    assert len(arrays) == 14
    for column in arrays.values():
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 1


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
    with pytest.raises(InputError, match="is not a parquet file"):
        ClipIndex.open(str(tmp_path))


def rewrite(url: str, **changed: list) -> str:
    """Columns of a dataset's index, overwritten."""
    path = Path(url, "index.parquet")
    table = pq.read_table(path)
    for name, values in changed.items():
        place = table.schema.get_field_index(name)
        kind = table.schema.field(name).type
        table = table.set_column(place, pa.field(name, kind), pa.array(values, kind))
    pq.write_table(table, path)
    return url


def test_an_index_that_is_not_in_shard_order_is_refused(index_of_rows: Callable[..., str]) -> None:
    url = index_of_rows([{"shard": f"shards/00000{i}-00.tar"} for i in (0, 1, 0)], rows_of_group=1)
    with pytest.raises(DatasetError, match=r"not in shard order: shards/000000-00\.tar comes twice"):
        ClipIndex.open(url)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"key": ["0" * 16 + "_0000", "0" * 16 + "_00a0"]}, f"'{'0' * 16}_00a0' is not a key"),
        ({"key": ["0" * 16 + "_0000", "g" + "0" * 15 + "_0000"]}, f"'g{'0' * 15}_0000' is not a key"),
        ({"key": ["0" * 16 + "_0000", "0" * 16 + "-0000"]}, f"'{'0' * 16}-0000' is not a key"),
        ({"key": ["0" * 16 + "_0000", "a.b"]}, r"'a\.b' is not a key"),
        ({"sha256": ["0" * 64, "0" * 63]}, f"'{'0' * 63}' is not a sha256"),
        ({"sha256": ["0" * 64, "x" * 64]}, f"'{'x' * 64}' is not a sha256"),
        ({"frames": [1, None]}, "clips without frames"),
        ({"key": ["0" * 16 + "_0000", None]}, "clips without key"),
    ],
)
def test_a_damaged_column_is_named(index_of_rows: Callable[..., str], changed: dict, words: str) -> None:
    with pytest.raises(DatasetError, match=words):
        ClipIndex.open(rewrite(index_of_rows([{}, {}]), **changed))


def test_texts_may_be_stored_in_any_of_parquets_ways(index_of_rows: Callable[..., str]) -> None:
    url = index_of_rows([{"label": "x"}, {}, {}])
    before, path = ClipIndex.open(url), Path(url, "index.parquet")
    table = pq.read_table(path)
    large = [pa.field(f.name, pa.large_string() if f.type == pa.string() else f.type) for f in table.schema]
    pq.write_table(table.cast(pa.schema(large)), path, use_dictionary=False)
    after = ClipIndex.open(url, Selection(where="label is None or label == 'x'"))
    assert (after.digest, after.shard_names, after.codec_names) == (
        before.digest,
        before.shard_names,
        ["h264"],
    )


def test_damage_within_the_file_is_told_in_one_line(index_of_rows: Callable[..., str]) -> None:
    url = index_of_rows([{"source": f"s{i}"} for i in range(2000)], rows_of_group=2000)
    path = Path(url, "index.parquet")
    data = bytearray(path.read_bytes())
    data[4 : len(data) // 2] = b"\xff" * (len(data) // 2 - 4)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"is not a parquet file or damaged \(.*run reelmae shard again") as e:
        ClipIndex.open(url)
    assert "\n" not in str(e.value)


def test_a_dataset_without_clips_is_opened(index_of_rows: Callable[..., str]) -> None:
    index = ClipIndex.open(index_of_rows([]))
    assert (len(index), index.shard_names, index.shard_start.tolist()) == (0, [], [0])


def test_keys_with_every_digit_come_back(index_of_rows: Callable[..., str]) -> None:
    url = rewrite(index_of_rows([{}, {}]), key=["0123456789abcdef_9876", "ffffffffffffffff_0001"])
    index = ClipIndex.open(url)
    assert [index.key(0), index.key(1)] == ["0123456789abcdef_9876", "ffffffffffffffff_0001"]


def test_an_index_of_another_length_than_promised_is_refused(make_dataset: Callable, spec: type) -> None:
    index = make_dataset([spec(frames=4)] * 2)
    index.store.local_path("dataset.json").write_text(json.dumps({"format": 1, "clips": 3}))
    with pytest.raises(DatasetError, match=r"has 2 clips.*says 3"):
        ClipIndex.open(index.store.url())


class WrongOnce(LocalFileSystem):  # type: ignore[misc]
    """Local files; of each, the first read gives a wrong byte."""

    protocol = "wrong-once"
    cachable = False
    read: ClassVar[set[str]] = set()

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return str(path).removeprefix("wrong-once://")

    def cat_file(self, path: str, start: Any = None, end: Any = None, **_: Any) -> bytes:
        """Read, and change the middle byte at the first time."""
        data = bytearray(Path(path).read_bytes()[start:end])
        if path not in WrongOnce.read:
            WrongOnce.read.add(path)
            data[len(data) // 2] ^= 1
        return bytes(data)


def test_what_a_network_changes_is_read_again_where_the_store_has_no_checksum(
    index_of_rows: Callable[..., str], tmp_path: Path
) -> None:
    fsspec.register_implementation("wrong-once", WrongOnce, clobber=True)
    local = index_of_rows([{"key": f"0123456789abcdef_{i:04d}", "label": "a", "label_id": 0} for i in range(50)])
    keys = [f"0123456789abcdef_{i:04d}" for i in range(9)]
    (tmp_path / "keys.txt").write_text("\n".join(keys))
    wanted = ClipIndex.open(local, Selection(keys=str(tmp_path / "keys.txt")))
    access = Access(patience_s=5)
    there = Selection(keys=f"wrong-once://{tmp_path / 'keys.txt'}")
    index = ClipIndex.open(f"wrong-once://{Path(local)}", there, access=access)
    assert (index.digest, len(index), index.labels) == (wanted.digest, 9, wanted.labels)
    for name in ("offset", "size", "frames", "fps", "width", "height", "label_id"):
        assert getattr(index, name).tolist() == getattr(wanted, name).tolist()
    assert access.retries.counts() == {"checksum": len(WrongOnce.read)}


def test_an_index_without_the_column_of_blocks_is_refused_by_name(index_of_rows: Callable[..., str]) -> None:
    folder, there = Path(index_of_rows([{}, {}])), Store("memory://no-blocks")
    table = pq.read_table(folder / "index.parquet")
    pq.write_table(table.drop_columns(["blocks"]), folder / "index.parquet")
    for file in folder.iterdir():
        there.publish(file, file.name)
    with pytest.raises(InputError, match=r"index\.parquet lacks the columns \['blocks'\]"):
        ClipIndex.open(there.url())
