"""The benchmark of a job's end at a small size, and the commits that it makes up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from reelmae.pipeline.errors import ReelmaeError
from reelmae.pipeline.schema import BLOCKS_FROM, CLIP, COMMITS, DATASET_JSON, INDEX, clip_key
from reelmae.pipeline.storage.store import Store
from reelmae.tools.bench.commits import expected_counts, make_commit
from reelmae.tools.bench.config import BenchJoinConfig
from reelmae.tools.bench.join import bench_join, check_counts, measure, write_job


def test_a_run_joins_all_and_counts_it() -> None:
    found = json.loads(json.dumps(bench_join(BenchJoinConfig(clips=5000))))
    assert {name: found[name] for name in expected_counts(5263)} == expected_counts(5263)
    assert (found["clips"], found["rejected"], found["duplicates"]) == (5000, 263, 200)
    assert found["tasks"] == 21
    assert found["index_bytes"] > 5000 * 64
    assert found["seconds"] > 0 and found["cpu_seconds"] > 0
    assert 30 << 20 < found["peak_rss_bytes"] < 1 << 30
    assert {"cpu", "cores"} <= set(found["machine"]) and "pyarrow" in found["versions"]


def test_a_wrong_count_is_an_error(tmp_path: Path) -> None:
    write_job(Store(str(tmp_path)), 600)
    measure(str(tmp_path))
    assert check_counts(tmp_path, 600) == expected_counts(600)
    path = tmp_path / DATASET_JSON
    facts = json.loads(path.read_text())
    for wrong in ({"duplicates": facts["duplicates"] - 1}, {"rejected": {"truncated": 31}}):
        path.write_text(json.dumps(facts | wrong))
        with pytest.raises(ReelmaeError, match="generated were"):
            check_counts(tmp_path, 600)


def test_made_up_commits_are_of_the_format() -> None:
    urls = [f"s3://bucket/{i}.mp4" for i in range(1000)]
    table = pa.concat_tables([make_commit(0, 0, urls[:256]), make_commit(1, 256, urls[256:])])
    assert table.schema.equals(COMMITS)
    rows = table.to_pylist()
    assert sorted(row["source"] for row in rows) == sorted(urls)
    clips = sorted((row for row in rows if row["kind"] == CLIP), key=lambda row: urls.index(row["source"]))
    assert [row["key"] for row in clips] == [clip_key(row["source"], 0) for row in clips]
    for row in clips:
        assert (row["blocks"] is None) == (row["size"] < BLOCKS_FROM)
    hashes = np.unpackbits(np.frombuffer(b"".join(row["phash"] for row in clips), np.uint8).reshape(-1, 32), axis=1)
    assert hashes[:, ::64].all()
    for i in range(24, len(clips), 25):
        differ = (hashes[:i] != hashes[i]).sum(axis=1)
        assert (differ <= 8).sum() == 1
        assert (clips[i]["sha256"] == clips[int(differ.argmin())]["sha256"]) == (i % 100 == 99)
    kept = hashes[np.arange(len(clips)) % 25 != 24]
    assert min((kept[i + 1 :] != kept[i]).sum(axis=1).min() for i in range(len(kept) - 1)) > 60


def test_the_join_of_a_made_up_job_is_a_dataset(tmp_path: Path) -> None:
    write_job(Store(str(tmp_path)), 300)
    found = measure(str(tmp_path))
    assert set(found) == {"seconds", "cpu_seconds", "peak_rss_bytes"}
    assert (tmp_path / INDEX).is_file()
