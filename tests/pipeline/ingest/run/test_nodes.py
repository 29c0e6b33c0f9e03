"""A node of a cluster is asked before it works, and a worker of one that joined later asks itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from reelmae.pipeline.errors import ClusterError
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.ffmpeg import find_ffmpeg
from reelmae.pipeline.ingest.plan import parts
from reelmae.pipeline.ingest.run.nodes import NodeWorker, find_problem
from reelmae.pipeline.ingest.run.task import JobSpec
from reelmae.pipeline.storage.claim import Claim
from reelmae.pipeline.storage.store import Store


@pytest.fixture
def src(make_video: Callable[..., Path], tmp_path: Path) -> Path:
    for i in range(2):
        make_video(tmp_path / "src" / f"{i}.mp4", seed=i)
    return tmp_path / "src"


def _spec(src: Path, dst: Path, claim: Claim) -> JobSpec:
    store, config = Store(str(dst)), ShardConfig(short_side=48).resolve()
    return JobSpec.of(store, parts.new_plan(str(src), store, config, find_ffmpeg(), None), holders=claim.holders)


def test_a_node_sees_the_claim_and_the_sources_or_says_what_it_does_not_see(src: Path, tmp_path: Path) -> None:
    with Claim(Store(str(tmp_path / "dst"))) as claim:
        spec = _spec(src, tmp_path / "dst", claim)
        seen = ((str(src / "0.mp4"), str(src)), (str(src / "1.mp4"), str(src)))
        assert find_problem(spec, seen) == ""
        (src / "1.mp4").unlink()
        assert find_problem(spec, seen).startswith(f"does not see {src / '1.mp4'}; give a SRC that all nodes share")
        with NodeWorker(spec, seen) as worker:  # one of them may have gone since
            assert worker.run(0).sources == 2
    assert find_problem(spec, seen).startswith(f"does not see this job's files at {tmp_path / 'dst'}")


def test_a_node_that_joined_without_the_sources_does_not_call_them_gone(src: Path, tmp_path: Path) -> None:
    with Claim(Store(str(tmp_path / "dst"))) as claim:
        spec = _spec(src, tmp_path / "dst", claim)
        with pytest.raises(ClusterError, match=r"does not see /not/mounted/0\.mp4; give a SRC that all nodes share"):
            NodeWorker(spec, (("/not/mounted/0.mp4", str(src)),))
    with pytest.raises(ClusterError, match="does not see this job's files"):
        NodeWorker(spec, ())
