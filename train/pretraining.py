"""Masked-autoencoder pretraining: the model, the clips and the loss that it puts into the training loop (loop.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from reelmae.model.mae import MaskedAutoencoder
from reelmae.model.weights.configs import config_to_json
from reelmae.pipeline.loading.batch import ClipBatch
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.loading.loader import ClipLoader
from reelmae.train.config import PretrainConfig, difference, from_json
from reelmae.train.initial import begin_from
from reelmae.train.loop import Loop, RunSummary, StepLoss, Training
from reelmae.train.metrics import Row
from reelmae.train.optim import adamw


def pretrain(config: PretrainConfig, *, on_step: Callable[[Row], None] | None = None) -> RunSummary:
    """Train as `config` says, or go on where the newest checkpoint of `run.out` ends; `on_step` gets every logged row.

    Raises ConfigError where `run.out` holds another run, DivergedError where the loss is not finite, and KeyboardInterrupt
    after Ctrl-C or SIGTERM (a preempted job), once the step is finished and saved.
    """
    threads = torch.get_num_threads()
    try:
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        index = config.data.open()
        with ClipLoader(index, config.loader_config()) as loader:
            training = Pretraining(config, index, loader)
            return Loop(training, config.run, config.optim, config.lr(), on_step).run()
    finally:
        torch.set_num_threads(threads)


class Pretraining(Training):
    """A MaskedAutoencoder that learns to predict the tokens removed from clips."""

    config: PretrainConfig
    model: MaskedAutoencoder

    def __init__(self, config: PretrainConfig, index: ClipIndex, loader: ClipLoader) -> None:
        self.config, self.index, self.loader = config, index, loader
        torch.manual_seed(config.run.seed)
        self.model = MaskedAutoencoder(config.model.mae()).to(config.run.torch_device())
        self.model.set_checkpointing(config.run.checkpointing)
        self.optimizer = adamw(self.model, config.optim)

    def compute_loss(self, batch: ClipBatch) -> StepLoss:
        """The objective's loss; its parts where it has several targets."""
        output = self.model(batch.clips_BCTHW, batch.ids_keep_BK, batch.ids_decode_BQ)
        return StepLoss(output.loss, output.losses if len(output.losses) > 1 else {})

    def load_initial_weights(self) -> str | None:
        """Load the file that `run.init` names, if any."""
        run = self.config.run
        return None if run.init is None else begin_from(self.model, run.init, run.init_allow)

    def checkpoint_facts(self) -> dict[str, Any]:
        """The model's config, by which reelmae.model.weights reads the weights, and the dataset's digest."""
        return {"model_config": config_to_json(self.model.config), "index_digest": self.index.digest}

    def find_changes(self, content: dict[str, Any]) -> list[str]:
        """What differs in the config, apart from the keys in FREE_ON_RESUME, and whether the dataset is another."""
        changes = difference(self.config, from_json(content["config"]))
        if content["index_digest"] != self.index.digest:
            changes.append(f"data.url={self.config.data} is another dataset, or another selection of it, than before")
        return changes
