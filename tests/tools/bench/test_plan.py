"""The planning benchmark at a small size: both kinds plan everything, and say on what."""

from __future__ import annotations

import json

import pytest

from reelmae.tools.bench.config import BenchPlanConfig
from reelmae.tools.bench.plan import bench_plan


@pytest.mark.parametrize("kind", ["manifest", "listing"])
def test_a_run_plans_all_and_resumes_at_half(kind: str) -> None:
    found = json.loads(json.dumps(bench_plan(BenchPlanConfig(sources=2500, kind=kind))))  # type: ignore[arg-type]
    assert (found["sources"], found["kind"]) == (2500, kind)
    assert found["tasks"] == 63  # 64ths, rounded up: 40 sources each
    assert found["waiting"] == 31
    assert set(found["seconds"]) == {"plan", "resume", "join"}
    assert all(seconds > 0 for seconds in found["seconds"].values())
    assert 30 << 20 < found["peak_rss_bytes"]["plan"] <= found["peak_rss_bytes"]["join"] < 1 << 30
    assert {"cpu", "cores"} <= set(found["machine"]) and "pyarrow" in found["versions"]
