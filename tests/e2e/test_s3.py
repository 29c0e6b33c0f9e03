"""A bucket on a real S3 server: the same clips come from it as from a local copy, and a run trains on it."""

from __future__ import annotations

from contextlib import closing
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import s3_jobs
import torch
from s3_servers import S3Server

from reelmae.pipeline import schema
from reelmae.pipeline.errors import TooManyBadClipsError
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.job import shard
from reelmae.pipeline.loading.config import LoaderConfig
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.loading.loader import ClipLoader
from reelmae.pipeline.loading.order.draws import SamplePolicy
from reelmae.pipeline.storage.store import Store
from reelmae.train.config import load_recipe
from reelmae.train.pretraining import pretrain


def _copy(here: Path, there: str) -> None:
    store = Store(there)
    for path in sorted(p for p in here.rglob("*") if p.is_file()):
        store.publish(path, path.relative_to(here).as_posix())


def test_clips_from_s3_are_those_of_a_local_copy_and_a_run_trains_on_them(
    tiny_bucket: Path, s3_server: Any, tmp_path: Path
) -> None:
    local, remote = tmp_path / "shards", s3_server.url("trained/shards")
    shard(str(tiny_bucket), str(local), ShardConfig(short_side=64, clip_seconds=1))
    _copy(local, remote)

    config = LoaderConfig(
        batch_videos=4, workers=1, sample=SamplePolicy(frames=4, size=32), patch=(2, 8, 8), device="cpu"
    )
    batches = []
    for url in (str(local), remote):
        with ClipLoader(ClipIndex.open(url), config) as loader:
            batches.append(list(islice(loader, 3)))
            assert not loader.stats.bad
    for a, b in zip(*batches, strict=True):
        assert torch.equal(a.clips_BCTHW, b.clips_BCTHW)
        assert torch.equal(a.ids_keep_BK, b.ids_keep_BK)

    truncated = Store(remote)
    shard_name = ClipIndex.open(remote).shard(0)
    truncated.publish_bytes(truncated.read_bytes(shard_name)[:2000], shard_name)
    # most of this dataset is in one shard: all its clips are bad ones, and the storage is not to blame
    with (
        pytest.raises(TooManyBadClipsError, match="the file is damaged"),
        ClipLoader(ClipIndex.open(remote), config.model_copy(update={"max_bad_fraction": 0.0})) as loader,
    ):
        list(islice(loader, 3))
    _copy(local, remote)

    small = ["loader.batch_videos=2", "model.depth=1", "model.decoder_depth=1"]
    summary = pretrain(
        load_recipe("demo", [f"data.url={remote}", f"run.out={tmp_path / 'run'}", "run.steps=2", *small])
    )
    assert summary.steps == 2
    assert not summary.bad_clips


def _videos(files: dict[str, bytes], src: str) -> set[tuple[str, float, str]]:
    """(path below SRC, begin, sha256) of every clip of a dataset."""
    rows = pq.read_table(BytesIO(files[schema.INDEX])).to_pylist()
    return {(row["source"].removeprefix(src), row["span_start_s"], row["sha256"]) for row in rows}


def test_from_bucket_to_bucket_all_is_as_from_folder_to_folder(
    any_s3: S3Server, nine_videos: Path, undisturbed: Any, tmp_path: Path
) -> None:
    """Sharded, verified, damaged, repaired, loaded with and without a cache; each server gives the same files."""
    local = tmp_path / "local"
    assert s3_jobs.shard(str(nine_videos), str(local), None).status == 0
    s3_jobs.upload(nine_videos, any_s3, "nine/raw")
    src, dst = any_s3.url("nine/raw"), any_s3.url("both/shards")
    done = s3_jobs.shard(src, dst, any_s3)
    assert done.status == 0, done
    files = s3_jobs.files_at(any_s3, "both/shards")
    assert files == undisturbed.files
    assert _videos(files, src) == _videos(s3_jobs.files_in(local), str(nine_videos))
    assert s3_jobs.run(["verify", dst, "--deep"], any_s3).status == 0

    name = next(name for name in files if name.endswith(".tar"))
    damaged = bytearray(files[name])
    damaged[len(damaged) // 2] ^= 0xFF
    with closing(any_s3.client()) as client:
        client.put_object(Bucket=any_s3.bucket, Key=f"both/shards/{name}", Body=bytes(damaged))
    found = s3_jobs.run(["verify", dst], any_s3)
    assert found.status == 1, found
    assert name in found.out + found.err, found
    repaired = s3_jobs.run(["verify", dst, "--repair"], any_s3)
    assert repaired.status == 0, repaired
    assert s3_jobs.files_at(any_s3, "both/shards") == files

    copy = tmp_path / "copy"
    for path, data in files.items():
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        (copy / path).write_bytes(data)
    batches = s3_jobs.read(str(copy), None)
    assert s3_jobs.same(s3_jobs.read(dst, any_s3), batches)
    assert s3_jobs.same(s3_jobs.read(dst, any_s3, cache=tmp_path / "cache"), batches)
    assert list((tmp_path / "cache").rglob("*.shard"))


def test_uploads_in_parts_and_exclusive_creation_work_on_every_server(
    any_s3: S3Server, noisy_videos: Path, tmp_path: Path
) -> None:
    """A shard of 22 MB."""
    s3_jobs.upload(noisy_videos, any_s3, "parts/raw")
    flags = ["--profile", "copy", "--clip-seconds", "0"]
    done = s3_jobs.run(["shard", any_s3.url("parts/raw"), any_s3.url("parts/shards"), *flags], any_s3)
    assert done.status == 0, done
    files = s3_jobs.files_at(any_s3, "parts/shards")
    assert any(len(data) > 20 << 20 for data in files.values())
    assert s3_jobs.open_uploads(any_s3, "parts/shards") == []
    with closing(any_s3.client()) as client:
        key = next(f"parts/shards/{name}" for name, data in files.items() if len(data) > 20 << 20)
        assert client.head_object(Bucket=any_s3.bucket, Key=key)["ETag"].strip('"').endswith("-2")
    assert s3_jobs.run(["verify", any_s3.url("parts/shards")], any_s3).status == 0
    assert Store(any_s3.url("parts/shards"), any_s3.access()).creates_exclusively
