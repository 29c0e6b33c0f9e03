"""The benchmark of the index at a small size: what is opened is what a job would have written."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq

from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.schema import CLIPS, clip_key
from reelmae.tools.bench.config import BenchIndexConfig
from reelmae.tools.bench.index import bench_index, write_index


def test_a_run_opens_all_but_the_repeats() -> None:
    found = json.loads(json.dumps(bench_index(BenchIndexConfig(clips=60_000, rounds=1))))
    assert (found["clips"], len(found["seconds_of_rounds"])) == (60_000, 1)
    measured = found["measured"]
    assert (measured["clips_played"], measured["shards"]) == (59_400, 120)
    assert set(measured["seconds"]) == {"import", "open", "first_batch", "total"}
    assert all(seconds > 0 for seconds in measured["seconds"].values())
    assert 100 << 20 < measured["peak_rss_bytes"]["open"] <= measured["peak_rss_bytes"]["first_batch"] < 2 << 30
    assert found["index_bytes"] > 60_000 * 64
    assert {"cpu", "cores"} <= set(found["machine"]) and "pyarrow" in found["versions"]


def test_the_made_up_index_is_of_the_format(tmp_path: Path) -> None:
    write_index(tmp_path, 51_000)
    file = pq.ParquetFile(tmp_path / "index.parquet")
    assert file.schema_arrow.equals(CLIPS)
    assert [file.metadata.row_group(i).num_rows for i in range(2)] == [50_000, 1_000]
    index = ClipIndex.open(str(tmp_path))
    assert len({index.key(i) for i in range(0, 50_000, 7)}) == len(range(0, 50_000, 7))
    assert len(index.key(0)) == len(clip_key("x", 0))
    ends = index.offset + index.size
    later = index.shard_of_clip[1:] == index.shard_of_clip[:-1]
    assert (index.offset[1:][later] >= ends[:-1][later]).all() and index.offset.min() >= 512
