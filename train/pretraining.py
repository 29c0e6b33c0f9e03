"""The pretraining loop of one process: batches in, checkpoints and metrics out.

    OUT/config.json  metrics.jsonl  summary.json  tensorboard/  checkpoints/step_000500.pt

The resume contract. A checkpoint holds model, optimiser, the loader's place, torch's random state, the config and the
digest of the dataset's index. A run started again on the same OUT goes on from the newest checkpoint by itself; killed
and resumed equals never killed, step for step (bit for bit on one CPU and thread count). It refuses where the config
or the dataset differ, and names the difference; only keys of FREE_ON_RESUME may change. A finished run is not run
again: it returns its summary.

Legend: B batch, C channel, T frame, H height, W width, K kept token.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reelmae.model.mae import MaskedAutoencoder
from reelmae.model.weights import config_to_json
from reelmae.pipeline.errors import ConfigError, DivergedError
from reelmae.pipeline.loading.batch import ClipBatch
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.loading.loader import ClipLoader
from reelmae.train import checkpoint
from reelmae.train.config import PretrainConfig, difference, from_json
from reelmae.train.initial import begin_from
from reelmae.train.metrics import Display, MetricsLog, Row, as_json
from reelmae.train.optim import adamw, learning_rate, set_learning_rate


@dataclass(frozen=True)
class PretrainSummary:
    """What a run came to, over all its sessions. `loss_first`, `loss_last`: means over the first and last logged window."""

    steps: int
    loss_first: float
    loss_last: float
    clips_per_s: float
    wait_share: float  # of the wall time spent waiting for the loader
    seconds: float
    checkpoint: str
    bad_clips: dict[str, str]  # key → reason


@dataclass
class _Totals:
    """Sums over all sessions of a run; travels in the checkpoint."""

    clips: int = 0
    seconds: float = 0.0
    wait_s: float = 0.0
    loss_first: float = math.nan
    loss_last: float = math.nan
    bad_clips: dict[str, str] = field(default_factory=dict)


@dataclass
class _Window:
    """Steps since the last row; losses, the whole and its parts, stay on the device until they are read together."""

    losses: list[Tensor] = field(default_factory=list)
    parts: dict[str, list[Tensor]] = field(default_factory=dict)
    norms: list[Tensor] = field(default_factory=list)
    clips: list[np.ndarray] = field(default_factory=list)
    seconds: float = 0.0
    wait_s: float = 0.0


def pretrain(config: PretrainConfig, *, on_step: Callable[[Row], None] | None = None) -> PretrainSummary:
    """Train as `config` says, or go on where OUT's newest checkpoint ends; `on_step` sees every logged row.

    Raises ConfigError where OUT holds another run, DivergedError where the loss is not finite, and KeyboardInterrupt
    after Ctrl-C or SIGTERM (a preempted job), once the step is finished and saved.
    """
    threads = torch.get_num_threads()
    try:
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        index = config.data.open()
        with ClipLoader(index, config.loader_config()) as loader:
            return _Trainer(config, index, loader, on_step).run()
    finally:
        torch.set_num_threads(threads)


class _Trainer:
    def __init__(
        self,
        config: PretrainConfig,
        index: ClipIndex,
        loader: ClipLoader,
        on_step: Callable[[Row], None] | None,
    ) -> None:
        self.config, self.index, self.loader, self.on_step = config, index, loader, on_step
        self.out = Path(config.run.out)
        self.device = config.run.torch_device()
        self.steps = config.run.steps or math.ceil((config.run.epochs or 0) * loader.steps_per_epoch)
        torch.manual_seed(config.run.seed)
        self.model = MaskedAutoencoder(config.model.mae()).to(self.device)
        self.model.set_checkpointing(config.run.checkpointing)
        self.optimizer = adamw(self.model, config.optim)
        self.parameters = list(self.model.parameters())
        self.step = 0
        self.totals = _Totals()
        self.window = _Window()

    def run(self) -> PretrainSummary:
        resumed = self._resume()
        begun = None
        if self.config.run.init is not None and not resumed:  # a checkpoint holds all: the file may be gone
            begun = begin_from(self.model, self.config.run.init, self.config.run.init_allow)
        if self.step >= self.steps:
            return self._summary()
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "config.json").write_text(self.config.model_dump_json(indent=2) + "\n", encoding="utf-8")
        if self.config.run.compile:
            self.model.compile(fullgraph=True)
        log = MetricsLog(self.out, self.step)
        try:
            with Display(self.steps, self.step) as display, _interrupts() as interrupted:
                if begun:
                    display.note(begun)
                if resumed:
                    display.note(f"resumed at step {self.step} of {self.steps} from {resumed}")
                self._loop(log, display, interrupted)
        finally:
            log.close()
        summary = self._summary()
        (self.out / "summary.json").write_text(as_json(asdict(summary)), encoding="utf-8")
        return summary

    def _loop(self, log: MetricsLog, display: Display, interrupted: threading.Event) -> None:
        run = self.config.run
        batches = iter(self.loader)
        while self.step < self.steps:
            self._one_step(batches)
            last = self.step == self.steps
            stopping = interrupted.is_set()  # read once: a Ctrl-C from here on belongs to the next step
            saving = last or stopping or self.step % run.checkpoint_every == 0
            if saving or self.step % run.log_every == 0:
                row = self._row()
                log.write(row)
                display.show(row)
                if self.on_step:
                    self.on_step(row)
            if saving:  # after the row was made: it would have told of a loss that is not finite
                path = self._save()
            if stopping and not last:
                display.note(f"interrupted at step {self.step} of {self.steps}; saved {path}, run again to go on")
                raise KeyboardInterrupt

    def _one_step(self, batches: Iterator[ClipBatch]) -> None:
        started = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - started
        optim = self.config.optim
        rate = learning_rate(
            self.step, self.steps, peak=self.config.lr(), warmup=optim.warmup, min_lr=optim.min_lr,
            start_lr=optim.start_lr, schedule=optim.schedule,
        )  # fmt: skip
        set_learning_rate(self.optimizer, rate)
        dtype = self.config.run.autocast_dtype()
        with torch.autocast(self.device.type, dtype=dtype) if dtype else nullcontext():
            output = self.model(batch.clips_BCTHW, batch.ids_keep_BK, batch.ids_decode_BQ)
        output.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, optim.clip_grad or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.window.losses.append(output.loss.detach())
        if len(output.losses) > 1:
            for name, part in output.losses.items():
                self.window.parts.setdefault(name, []).append(part.detach())
        self.window.norms.append(norm.detach())
        self.window.clips.append(batch.clip_B)
        self.window.wait_s += waited
        self.window.seconds += time.perf_counter() - started

    def _row(self) -> Row:
        """The window as a row, read from the device at once; a new window is begun."""
        window, started = self.window, time.perf_counter()
        losses = torch.stack(window.losses).tolist()
        norms = torch.stack(window.norms).tolist()
        parts = {f"loss_{name}": torch.stack(some).mean().item() for name, some in window.parts.items()}
        window.seconds += time.perf_counter() - started  # on a GPU the steps are finished here
        self.window = _Window()
        first = self.step - len(losses) + 1
        for i, value in enumerate(losses):
            if not math.isfinite(value):
                self._diverged(first + i, value, window.clips[i])
        clips = sum(len(clip_B) for clip_B in window.clips)
        loss = math.fsum(losses) / len(losses)
        totals = self.totals
        totals.clips += clips
        totals.seconds += window.seconds
        totals.wait_s += window.wait_s
        totals.loss_first = loss if math.isnan(totals.loss_first) else totals.loss_first
        totals.loss_last = loss
        return {
            "step": self.step,
            "epoch": self.step / self.loader.steps_per_epoch,
            "loss": loss,
            **parts,
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": math.fsum(norms) / len(norms),
            "clips_per_s": clips / window.seconds,
            "wait_share": window.wait_s / window.seconds,
            "seconds": totals.seconds,
        }

    def _diverged(self, step: int, loss: float, clips: np.ndarray) -> None:
        keys = ", ".join(self.index.key(int(clip)) for clip in dict.fromkeys(clips.tolist()))
        raise DivergedError(
            f"loss is {loss} at step {step}; lower optim.blr={self.config.optim.blr} or set optim.clip_grad, "
            f"and look at the step's clips: {keys}"
        )

    def _save(self) -> Path:
        self.totals.bad_clips.update(self.loader.stats.bad)
        rng: dict[str, Any] = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return checkpoint.save(
            self.out,
            self.step,
            {
                "config": self.config.model_dump_json(),
                "model_config": config_to_json(self.model.config),  # so that `model.weights` reads it, too
                "index_digest": self.index.digest,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "loader": self.loader.state_dict(),
                "rng": rng,
                "totals": asdict(self.totals),
            },
        )

    def _resume(self) -> Path | None:
        """Take up the newest checkpoint of OUT, if there is one."""
        found = checkpoint.checkpoints(self.out)
        if not found:
            return None
        content = checkpoint.load(found[-1], self.device)
        changed = difference(self.config, from_json(content["config"]))
        if content["index_digest"] != self.index.digest:
            changed.append(f"data.url={self.config.data} is another dataset, or another selection of it, than before")
        if changed:
            raise ConfigError(
                f"run.out={self.out} holds another run: {'; '.join(changed)}; give another run.out, or the old values"
            )
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.loader.load_state_dict(content["loader"])
        torch.set_rng_state(content["rng"]["cpu"].cpu())
        if self.device.type == "cuda" and "cuda" in content["rng"]:
            torch.cuda.set_rng_state(content["rng"]["cuda"].cpu(), self.device)
        self.step = content["step"]
        self.totals = _Totals(**content["totals"])
        return found[-1]

    def _summary(self) -> PretrainSummary:
        totals = self.totals
        return PretrainSummary(
            steps=self.step,
            loss_first=totals.loss_first,
            loss_last=totals.loss_last,
            clips_per_s=totals.clips / totals.seconds,
            wait_share=totals.wait_s / totals.seconds,
            seconds=totals.seconds,
            checkpoint=str(checkpoint.checkpoints(self.out)[-1]),
            bad_clips=totals.bad_clips,
        )


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; the second acts at once. Only the main thread gets signals."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for kind, handler in before.items():
            signal.signal(kind, handler)

    def note(_signal: int, _frame: FrameType | None) -> None:
        event.set()
        restore()

    for kind in before:
        signal.signal(kind, note)
    try:
        yield event
    finally:
        restore()
