"""The loop trains what it is given: here the mean colour of clips, by a model of one layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from reelmae.pipeline.errors import ConfigError
from reelmae.pipeline.loading.batch import ClipBatch
from reelmae.pipeline.loading.loader import ClipLoader
from reelmae.train import checkpoint
from reelmae.train.config import PretrainConfig
from reelmae.train.loop import Loop, RunSummary, StepLoss, Training
from reelmae.train.metrics import read_rows
from reelmae.train.optim import parameter_groups

MakeConfig = Callable[..., PretrainConfig]


class MeanColour(Training):
    """Learns each clip's mean colour from its first frame."""

    def __init__(self, config: PretrainConfig, loader: ClipLoader) -> None:
        self.config, self.index, self.loader = config, config.data.open(), loader
        torch.manual_seed(config.run.seed)
        self.model = nn.Linear(3 * 16 * 16, 3)
        self.optimizer = torch.optim.SGD(parameter_groups(self.model, 0.0), lr=1.0)
        self.begun = 0

    def compute_loss(self, batch: ClipBatch) -> StepLoss:
        wanted_BC = batch.clips_BCTHW.mean((2, 3, 4))
        error_BC = self.model(batch.clips_BCTHW[:, :, 0].flatten(1)) - wanted_BC
        return StepLoss(error_BC.pow(2).mean(), {"red": error_BC[:, 0].pow(2).mean()})

    def load_initial_weights(self) -> str | None:
        self.begun += 1
        return "began at random"

    def checkpoint_facts(self) -> dict[str, Any]:
        return {"colours": 3}

    def find_changes(self, content: dict[str, Any]) -> list[str]:
        seed = PretrainConfig.model_validate_json(content["config"]).run.seed
        return [] if seed == self.config.run.seed else [f"run.seed={self.config.run.seed} (was {seed})"]


def train(config: PretrainConfig) -> tuple[RunSummary, MeanColour]:
    with ClipLoader(config.data.open(), config.loader_config()) as loader:
        training = MeanColour(config, loader)
        return Loop(training, config.run, config.optim, 0.01).run(), training


def test_another_training_learns_resumes_and_is_refused_as_its_own_rules_say(
    tiny: MakeConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    constant = ["optim.warmup=0.0", "optim.min_lr=0.01"]
    whole, training = train(tiny(f"run.out={tmp_path / 'whole'}", "run.steps=12", *constant))
    assert whole.steps == 12 and whole.loss_last < whole.loss_first
    assert training.begun == 1 and "began at random" in capfd.readouterr().err
    content = checkpoint.load(whole.checkpoint)
    assert content["colours"] == 3 and set(content["model"]) == {"weight", "bias"}
    rows = read_rows(tmp_path / "whole/metrics.jsonl")
    assert len(rows) == 12 and all(0 < row["loss_red"] < 3 * row["loss"] for row in rows)

    train(tiny("run.steps=5", *constant))
    resumed, training = train(tiny("run.steps=12", *constant))
    assert resumed.steps == 12 and training.begun == 0
    assert [row["loss"] for row in read_rows(tmp_path / "run/metrics.jsonl")] == [row["loss"] for row in rows]
    with pytest.raises(ConfigError, match=r"holds another run: run\.seed=1 \(was 0\); give another run\.out"):
        train(tiny("run.steps=12", "run.seed=1"))
