"""A job on a cluster ends with the bytes, the sums and the progress of one on local workers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import s3_jobs
from ray_cluster import RayCluster

Run = Callable[..., s3_jobs.Ended]
FREE = ("seconds", "dst")  # of the --json object


def _events(ended: s3_jobs.Ended) -> list[dict[str, Any]]:
    """The lines of progress of a job whose stderr is no terminal."""
    return [json.loads(line) for line in ended.err.splitlines() if line.startswith("{")]


def test_local_folders(cluster: RayCluster, run: Run, bucket: Path, plain: Any, tmp_path: Path) -> None:
    """Files, the --json object and the progress."""
    done = run(bucket, tmp_path / "dst", cluster.address, "--json")
    assert done.status == 0, done
    assert s3_jobs.files_in(tmp_path / "dst") == plain.files
    here, there = json.loads(done.out), json.loads(plain.ended.out)
    assert {k: v for k, v in here.items() if k not in FREE} == {k: v for k, v in there.items() if k not in FREE}
    assert list(here) == list(there)
    told, wanted = _events(done), _events(plain.ended)
    assert {tuple(event) for event in told} == {tuple(event) for event in wanted}
    sums = ("sources_done", "sources", "clips", "rejected", "written_mb")
    assert [told[-1][name] for name in sums] == [wanted[-1][name] for name in sums]
    counts = [event["sources_done"] for event in told]
    assert counts == sorted(counts)
    assert all(event["sources_done"] <= event["sources"] for event in told)
    assert [line for line in done.err.splitlines() if not line.startswith("{")] == []


def test_a_driver_outside_of_the_cluster(
    cluster: RayCluster, run: Run, bucket: Path, plain: Any, tmp_path: Path
) -> None:
    """It joins by ray://; what it makes and its result are the same."""
    done = run(bucket, tmp_path / "dst", cluster.client_address, "--json")
    assert done.status == 0, done
    assert s3_jobs.files_in(tmp_path / "dst") == plain.files
    assert json.loads(done.out)["clips"] == json.loads(plain.ended.out)["clips"]
    assert "Traceback" not in done.err  # under load Ray's client may say a word of its connection
