"""A raw bucket on the S3 server, and what an undisturbed job makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import s3_jobs
from s3_servers import S3Server

from reelmae.pipeline.loading.batch import ClipBatch
from reelmae.tools.synth.bucket import make_bucket


@dataclass(frozen=True)
class Undisturbed:
    """A job from `src` to `dst` on a server, and all that matters of its outcome."""

    src: str
    dst: str
    files: dict[str, bytes]
    batches: list[ClipBatch]


@pytest.fixture(scope="session")
def nine_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine small videos and two files that are none."""
    folder = tmp_path_factory.mktemp("nine") / "raw"
    make_bucket(folder, videos=9, broken=2, seconds=1.0, seed=3)
    return folder


@pytest.fixture(scope="session")
def undisturbed(nine_videos: Path, s3_server: S3Server) -> Undisturbed:
    """Of nine_videos, on SeaweedFS, with nothing in between."""
    s3_jobs.upload(nine_videos, s3_server, "nine/raw")
    src, dst = s3_server.url("nine/raw"), s3_server.url("nine/shards")
    done = s3_jobs.shard(src, dst, s3_server)
    assert done.status == 0, done
    files = s3_jobs.files_at(s3_server, "nine/shards")
    assert s3_jobs.facts(files)["sources_kept"] == 9
    return Undisturbed(src, dst, files, s3_jobs.read(dst, s3_server))


@pytest.fixture(scope="session")
def noisy_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos of noise that are copied as they are into one shard of 22 MB, which is uploaded in parts."""
    folder = tmp_path_factory.mktemp("noisy") / "raw"
    s3_jobs.write_noisy_videos(folder)
    return folder
