"""The step benchmark at a very small size: its fields, and that what it says is consistent."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from reelmae.model.config import mae_config
from reelmae.model.decoder import Decoder
from reelmae.model.mae import MaskedAutoencoder
from reelmae.pipeline.errors import ConfigError
from reelmae.tools.bench import step
from reelmae.tools.bench.step import BenchStepConfig, bench_step
from reelmae.train.optim import adamw

SMALL: dict[str, Any] = {"model": "vit_t", "frames": 4, "size": 64, "device": "cpu", "threads": 1}


def test_one_run_times_both_encoders_and_says_on_what() -> None:
    found = json.loads(json.dumps(bench_step(BenchStepConfig(**SMALL, steps=3))))
    assert found["tokens"] == {"all": 32, "kept": 3}
    for encoder in ("dense", "sparse"):
        times = sorted(found["step_ms_all"][encoder])
        assert len(times) == 3 and found["step_ms"][encoder] == times[1] > 0
    assert found["speedup"]["compute"] == pytest.approx(found["step_ms"]["dense"] / found["step_ms"]["sparse"])
    assert found["flops"]["dense"] > found["flops"]["sparse"] > 0
    assert found["model"] == "vit_t" and found["settings"]["dtype"] == "float32"
    assert {"cpu", "cores"} <= set(found["machine"]) and "torch" in found["versions"]
    assert "load_step_ms" not in found


def test_forward_and_backward_are_a_part_of_the_step() -> None:
    found = bench_step(BenchStepConfig(**SMALL, steps=3))
    for part in (found, found["decoder_mask"]):
        for encoder in ("dense", "sparse"):
            pairs = zip(part["forward_backward_ms_all"][encoder], part["step_ms_all"][encoder], strict=True)
            assert all(0 < inner < whole for inner, whole in pairs)
        assert part["speedup"]["forward_backward"] == pytest.approx(
            part["forward_backward_ms"]["dense"] / part["forward_backward_ms"]["sparse"]
        )


def test_the_optimiser_is_in_the_step_and_not_in_forward_and_backward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def slow(model: torch.nn.Module, config: Any) -> torch.optim.Optimizer:
        optimizer = adamw(model, config)
        optimizer.register_step_pre_hook(lambda *_: time.sleep(0.1))
        return optimizer

    monkeypatch.setattr(step, "adamw", slow)
    found = bench_step(BenchStepConfig(**SMALL, steps=1, warmup=0, decoder_mask=0.0))
    for encoder in ("dense", "sparse"):
        assert found["step_ms"][encoder] - found["forward_backward_ms"][encoder] > 100


def test_decoder_masking_predicts_fewer_tokens_in_the_steps_that_are_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    predicted: list[int] = []
    forward = Decoder.forward

    def watched(self: Decoder, latent: Any, keep: Any, ids_BQ: torch.Tensor, *rest: Any) -> torch.Tensor:
        if ids_BQ.device.type != "meta":  # there FLOPs are counted
            predicted.append(ids_BQ.shape[1])
        return forward(self, latent, keep, ids_BQ, *rest)

    monkeypatch.setattr(Decoder, "forward", watched)
    bench_step(BenchStepConfig(**SMALL, steps=1, warmup=0))
    assert predicted == [29, 29, 16, 16]


def test_decoder_masking_is_timed_beside_it_and_saves_flops() -> None:
    found = bench_step(BenchStepConfig(**SMALL, steps=1, warmup=0))
    masked = found["decoder_mask"]
    assert masked["tokens"] == {"all": 32, "kept": 3, "predicted": 16} and masked["ratio"] == 0.5
    for encoder in ("dense", "sparse"):
        assert masked["flops"][encoder] < found["flops"][encoder]
    assert masked["speedup"]["flops"] > found["speedup"]["flops"]
    assert "decoder_mask" not in bench_step(BenchStepConfig(**SMALL, steps=1, warmup=0, decoder_mask=0.0))


def test_a_grid_without_cells_is_timed_without_decoder_masking() -> None:
    odd = {**SMALL, "size": 48, "steps": 1, "warmup": 0}
    assert "decoder_mask" not in bench_step(BenchStepConfig(**odd))
    with pytest.raises(ConfigError, match="cannot be cut into cells"):
        bench_step(BenchStepConfig(**odd, decoder_mask=0.5))


@pytest.mark.parametrize("objective", ["slowfast", "videomae", "motion"])
def test_each_objective_can_be_timed(objective: Any) -> None:
    found = bench_step(BenchStepConfig(**SMALL, objective=objective, steps=1, warmup=0))
    assert found["flops"]["dense"] > found["flops"]["sparse"] > 0
    assert found["tokens"]["kept"] == (4 if objective == "videomae" else 3)


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
        ({"decoder_mask": 0.6}, "decoder_mask.ratio=0.6: give 0.25, 0.5 or 0.75"),
    ],
)
def test_what_cannot_be_timed_is_named(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as e:
        bench_step(BenchStepConfig(**{**SMALL, **changes}))
    assert told in str(e.value)
