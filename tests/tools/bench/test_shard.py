"""The sharding benchmark on a few short videos: both sides encode the same clips, with the settings of the job."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reelmae.pipeline.errors import InputError
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.tools.bench.config import BenchShardConfig
from reelmae.tools.bench.shard import _flags, bench_shard
from reelmae.tools.cli import parse
from reelmae.tools.commands.bench import Bench
from reelmae.tools.commands.data import Shard


@pytest.fixture
def videos(tmp_path: Path, make_video: Callable[..., Path]) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    for i in range(2):
        make_video(folder / f"{i}.mp4", frames=60, width=96, height=64)
    (folder / "notes.mp4").write_text("this is not a video\n" * 50)
    return folder


def test_sharding_and_ffmpeg_make_the_same_number_of_clips(videos: Path) -> None:
    shard = ShardConfig(short_side=32, clip_seconds=1.0)
    config = BenchShardConfig(src=str(videos), rounds=1, workers=1, shard=shard)
    found = json.loads(json.dumps(bench_shard(config)))
    assert (found["sources"], found["sources_encoded"]) == (3, 2)
    (only,) = found["rounds"]
    assert only["shard_clips"] == only["ffmpeg_clips"] == found["clips"] > 2  # each video is cut
    assert found["ratio"] == pytest.approx(only["ffmpeg_s"] / only["shard_s"])
    assert found["config"]["shard"]["short_side"] == 32
    assert {"cpu", "cores"} <= set(found["machine"])


def test_flags_of_sharding_reach_the_job_that_is_timed() -> None:
    flags = ["--profile", "small", "--short-side", "128", "--crf", "30", "--allow-outside", "--min-seconds", "1.5"]
    command: Any = parse(["bench", "shard", "videos", *flags, "--rounds", "2"])
    assert isinstance(command, Bench)
    shard = command.what.config.shard
    assert (shard.profile, shard.short_side, shard.crf, shard.allow_outside) == ("small", 128, 30, True)
    again: Any = parse(["shard", "videos", "dst", *_flags(shard)])
    assert isinstance(again, Shard) and again.config == shard
    assert _flags(ShardConfig()) == []


@pytest.mark.parametrize("change", [{"profile": "copy"}, {"cut": "scenes"}, {"crop_borders": True}])
def test_what_bare_ffmpeg_has_no_equal_of_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"copy encodes nothing|no equal in bare ffmpeg"):
        BenchShardConfig(src="videos", shard=ShardConfig(**change))


def test_a_bucket_is_no_local_folder() -> None:
    with pytest.raises(InputError, match="local folder"):
        bench_shard(BenchShardConfig(src="memory://videos"))
