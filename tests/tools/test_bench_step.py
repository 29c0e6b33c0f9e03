"""The step benchmark at a very small size: its fields, and that what it says is consistent."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from reelmae.model.mae import MaskedAutoencoder, mae_config
from reelmae.pipeline.errors import ConfigError
from reelmae.tools.bench.step import BenchStepConfig, bench_step

SMALL: dict[str, Any] = {"model": "vit_t", "frames": 4, "size": 64, "device": "cpu", "threads": 1}


def test_one_run_times_both_encoders_and_says_on_what() -> None:
    found = json.loads(json.dumps(bench_step(BenchStepConfig(**SMALL, steps=3))))
    assert found["tokens"] == {"all": 32, "kept": 3}
    for encoder in ("dense", "sparse"):
        times = sorted(found["step_ms_all"][encoder])
        assert len(times) == 3 and found["step_ms"][encoder] == times[1] > 0
    assert found["speedup"]["compute"] == pytest.approx(
        found["step_ms"]["dense"] / found["step_ms"]["sparse"]
    )
    assert found["flops"]["dense"] > found["flops"]["sparse"] > 0
    assert found["model"] == "vit_t" and found["settings"]["dtype"] == "float32"
    assert {"cpu", "cores"} <= set(found["machine"]) and "torch" in found["versions"]
    assert "load_step_ms" not in found


def test_flops_are_those_of_a_real_step() -> None:
    found = bench_step(BenchStepConfig(**SMALL, steps=1, warmup=0, batch=2))
    for encoder in ("dense", "sparse"):
        model = MaskedAutoencoder(mae_config("vit_t", frames=4, size=64, encoder=encoder))
        ids = torch.rand(2, 32).argsort(1)[:, :3]
        with (
            FlopCounterMode(display=False) as counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            model(torch.randn(2, 3, 4, 64, 64), ids).loss.backward()
        assert found["flops"][encoder] == counter.get_total_flops()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": "vit_z"}, "preset='vit_z': give one of vit_t"),
        ({"size": 65}, "size=65: choose a size that patch=16 divides"),
        ({"steps": 0}, "steps=0: give at least 1"),
        ({"mask_ratio": 1.0}, "mask_ratio=1.0: give a share between 0 and 1"),
    ],
)
def test_what_cannot_be_timed_is_named(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as e:
        bench_step(BenchStepConfig(**{**SMALL, **changes}))
    assert told in str(e.value)
