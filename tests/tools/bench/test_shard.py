"""The sharding benchmark on a few short videos: both sides encode the same clips, with the settings of the job."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reelmae.pipeline.errors import InputError, ReelmaeError
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.tools.bench.config import BenchShardConfig
from reelmae.tools.bench.shard import bench_shard
from reelmae.tools.bench.shard_ways import flags_of
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
    again: Any = parse(["shard", "videos", "dst", *flags_of(shard)])
    assert isinstance(again, Shard) and again.config == shard
    assert flags_of(ShardConfig()) == []


def test_tars_give_the_clips_of_loose_files_in_every_round(videos: Path) -> None:
    shard = ShardConfig(short_side=32, clip_seconds=1.0)
    found = json.loads(
        json.dumps(bench_shard(BenchShardConfig(src=str(videos), rounds=2, workers=1, tars=2, shard=shard)))
    )
    assert (found["ways"], found["sources"], found["clips"]) == (["loose", "tars"], 3, 4)
    loose, tars = (sum(costs[way]["seconds"] for costs in found["rounds"]) for way in found["ways"])
    assert found["ratio"] == pytest.approx(loose / tars)
    assert found["sources_per_s"] == pytest.approx({"loose": 6 / loose, "tars": 6 / tars})
    for costs in found["rounds"]:
        assert all(cost["cpu_s"] > 0 and cost["peak_bytes"] > 50e6 for cost in costs.values())


@pytest.mark.slow
def test_ray_gives_the_clips_of_local_workers(videos: Path) -> None:
    pytest.importorskip("ray")
    shard = ShardConfig(short_side=32, clip_seconds=1.0)
    found = bench_shard(BenchShardConfig(src=str(videos), rounds=1, workers=1, runner="ray", shard=shard))
    assert (found["ways"], found["sources"], found["clips"]) == (["local", "ray"], 3, 4)
    (costs,) = found["rounds"]
    assert costs["ray"]["peak_bytes"] > costs["local"]["peak_bytes"]  # its processes are seen


def test_a_job_that_fails_says_so_in_its_own_words(tmp_path: Path) -> None:
    (tmp_path / "notes.mp4").write_text("this is not a video\n" * 50)
    with pytest.raises(ReelmaeError, match=r"failed: .*all 1 sources were rejected"):
        bench_shard(BenchShardConfig(src=str(tmp_path), rounds=1, workers=1, tars=1))


def test_only_one_comparison_at_a_time() -> None:
    command: Any = parse(["bench", "shard", "videos", "--runner", "ray", "--crop-borders"])
    assert command.what.config.contender == "ray"  # which can do what bare ffmpeg cannot
    with pytest.raises(ValueError, match="--tars and --runner ray are two comparisons"):
        BenchShardConfig(src="videos", runner="ray", tars=100)


@pytest.mark.parametrize("change", [{"profile": "copy"}, {"cut": "scenes"}, {"crop_borders": True}])
def test_what_bare_ffmpeg_has_no_equal_of_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"copy encodes nothing|no equal in bare ffmpeg"):
        BenchShardConfig(src="videos", shard=ShardConfig(**change))


def test_a_bucket_is_no_local_folder() -> None:
    with pytest.raises(InputError, match="local folder"):
        bench_shard(BenchShardConfig(src="memory://videos"))
