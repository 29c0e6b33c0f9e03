"""The training loop of one process, whatever is trained: batches in, checkpoints and metrics out.

    OUT/config.json  metrics.jsonl  summary.json  tensorboard/  checkpoints/step_000500.pt

A `Training` (pretraining.py has one) gives the model, the optimiser, the loader and the loss of a batch. The loop does the
rest: learning rates, steps, rows of metrics, checkpoints, resuming, interrupts.

The resume contract. A checkpoint holds model, optimiser, the loader's place, torch's random state, the config and the
digest of the dataset's index. A run started again on the same OUT goes on from the newest checkpoint by itself; killed
and resumed equals never killed, step for step (bit for bit on one CPU and thread count). It refuses where the config
or the dataset differ, and names the difference. A finished run is not run again: it returns its summary.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from reelmae.pipeline.devices import resolve_device
from reelmae.pipeline.errors import ConfigError, DivergedError
from reelmae.pipeline.loading.batch import ClipBatch
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.loading.loader import ClipLoader
from reelmae.train import checkpoint
from reelmae.train.metrics import Display, MetricsLog, Row, as_json
from reelmae.train.optim import OptimConfig, set_learning_rate
from reelmae.train.precision import Precision, autocast_dtype


class RunConfig(BaseModel):
    """Where the run writes, how long it goes on, and on what. Give exactly one of `steps` and `epochs`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    out: str
    """Local folder of the run. A run that is already there is resumed."""
    init: str | None = None
    """File with the first weights: a checkpoint of ours, or what `reelmae import-weights` wrote. None: random weights."""
    init_allow: tuple[str, ...] = ()
    """Patterns such as "decoder*" of names: file tensors to ignore, and model tensors to leave as initialised."""
    steps: int | None = Field(default=None, ge=1)
    """Steps of the optimiser, over all sessions of the run."""
    epochs: float | None = Field(default=None, gt=0)
    """Length of the run in passes over the dataset, in place of `steps`."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Seed of the initial weights, and of the loader's order, crops and masks."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is a GPU, else the CPU."""
    precision: Precision = "auto"
    """auto: bf16 on CUDA, float32 on the CPU."""
    compile: bool = False
    """Run the model through torch.compile."""
    checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of torch on the CPU. None: torch's own choice."""
    log_every: int = Field(default=10, ge=1)
    """Steps from one row of metrics to the next."""
    checkpoint_every: int = Field(default=500, ge=1)
    """Steps from one checkpoint to the next."""

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"steps={self.steps}, epochs={self.epochs}: give exactly one of the two")
        if "://" in self.out:
            raise ValueError(f"out={self.out}: a run writes to a local folder; give a path")
        return self

    def torch_device(self) -> torch.device:
        """The device to train on; ConfigError where there is none."""
        try:
            return resolve_device(self.device)
        except ConfigError as e:
            raise ConfigError(f"run.{e}") from e

    def autocast_dtype(self) -> torch.dtype | None:
        """bfloat16 where the forward pass runs in it, else None."""
        return autocast_dtype(self.precision, self.torch_device())


@dataclass
class StepLoss:
    """The loss of a batch, and its parts by name where it is a sum of several."""

    loss: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


class Training(ABC):
    """One kind of training: what is trained, on what, by which loss."""

    config: BaseModel
    """The whole config of the run. It is written to OUT/config.json and into every checkpoint."""
    model: nn.Module
    optimizer: torch.optim.Optimizer
    index: ClipIndex
    loader: ClipLoader

    @abstractmethod
    def compute_loss(self, batch: ClipBatch) -> StepLoss:
        """The loss to minimise, with its graph. Called under autocast where the run's precision asks for it."""

    @abstractmethod
    def load_initial_weights(self) -> str | None:
        """Called where a run begins: load the file that the config names, if any. A line that says what was loaded."""

    @abstractmethod
    def checkpoint_facts(self) -> dict[str, Any]:
        """What a checkpoint holds beside the state of the run, for `find_changes` and for those who read the weights."""

    @abstractmethod
    def find_changes(self, content: dict[str, Any]) -> list[str]:
        """What makes the run of this checkpoint another one than this, as `key=new (was old)`. Empty: it may be resumed."""


@dataclass(frozen=True)
class RunSummary:
    """The results of a run, over all its sessions."""

    steps: int
    loss_first: float
    """Mean over the first logged window."""
    loss_last: float
    """Mean over the last logged window."""
    clips_per_s: float
    """Samples trained on in a second."""
    wait_share: float
    """Share of the wall time spent waiting for the loader."""
    seconds: float
    """Wall time of all steps."""
    checkpoint: str
    """Path of the last checkpoint."""
    bad_clips: dict[str, str]
    """key → reason."""
    retries: dict[str, int]
    """cause → requests to the dataset's storage that were tried again."""


@dataclass
class _Totals:
    """Sums over all sessions of a run; travels in the checkpoint."""

    clips: int = 0
    seconds: float = 0.0
    wait_s: float = 0.0
    loss_first: float = math.nan
    loss_last: float = math.nan
    bad_clips: dict[str, str] = field(default_factory=dict)
    retries: dict[str, int] = field(default_factory=dict)

    def add(self, loss: float, clips: int, seconds: float, wait_s: float) -> None:
        self.clips += clips
        self.seconds += seconds
        self.wait_s += wait_s
        self.loss_first = loss if math.isnan(self.loss_first) else self.loss_first
        self.loss_last = loss


@dataclass
class _Window:
    """The steps since the last row. Losses and norms stay on the device until all are read together."""

    losses: list[Tensor] = field(default_factory=list)
    parts: dict[str, list[Tensor]] = field(default_factory=dict)
    norms: list[Tensor] = field(default_factory=list)
    clips: list[np.ndarray] = field(default_factory=list)
    seconds: float = 0.0
    wait_s: float = 0.0

    def add(self, loss: StepLoss, norm: Tensor, clip_B: np.ndarray) -> None:
        self.losses.append(loss.loss.detach())
        for name, part in loss.parts.items():
            self.parts.setdefault(name, []).append(part.detach())
        self.norms.append(norm.detach())
        self.clips.append(clip_B)


class Loop:
    """Runs a `Training` to its last step."""

    def __init__(
        self,
        training: Training,
        run: RunConfig,
        optim: OptimConfig,
        peak_lr: float,
        on_step: Callable[[Row], None] | None = None,
    ) -> None:
        """`peak_lr`: the learning rate that `optim`'s schedule reaches. `on_step` is called with every row of metrics."""
        self.training, self.config, self.optim, self.peak_lr, self.on_step = training, run, optim, peak_lr, on_step
        self.model, self.optimizer, self.loader = training.model, training.optimizer, training.loader
        self.parameters = list(self.model.parameters())
        self.out, self.device, self.dtype = Path(run.out), run.torch_device(), run.autocast_dtype()
        self.steps = run.steps or math.ceil((run.epochs or 0) * self.loader.steps_per_epoch)
        self.step = 0
        self.totals, self.window = _Totals(), _Window()
        self.retries_before: dict[str, int] = {}  # of earlier sessions

    def run(self) -> RunSummary:
        """Train to the last step, from OUT's newest checkpoint where there is one."""
        resumed = self._resume()
        # a checkpoint holds all weights: the file of the first ones may be gone
        loaded = None if resumed else self.training.load_initial_weights()
        if self.step >= self.steps:
            return self._summary()
        self.out.mkdir(parents=True, exist_ok=True)
        config = self.training.config.model_dump_json(indent=2)
        (self.out / "config.json").write_text(config + "\n", encoding="utf-8")
        if self.config.compile:
            self.model.compile(fullgraph=True)
        log = MetricsLog(self.out, self.step)
        try:
            with Display(self.steps, self.step) as display, _catch_interrupts() as interrupted:
                if loaded:
                    display.note(loaded)
                if resumed:
                    display.note(f"resumed at step {self.step} of {self.steps} from {resumed}")
                self._train(log, display, interrupted)
        finally:
            log.close()
        summary = self._summary()
        (self.out / "summary.json").write_text(as_json(asdict(summary)), encoding="utf-8")
        return summary

    def _train(self, log: MetricsLog, display: Display, interrupted: threading.Event) -> None:
        batches = iter(self.loader)
        while self.step < self.steps:
            self._run_step(batches)
            last = self.step == self.steps
            stopping = interrupted.is_set()  # read once: a Ctrl-C from here on belongs to the next step
            saving = last or stopping or self.step % self.config.checkpoint_every == 0
            if saving or self.step % self.config.log_every == 0:
                row = self._row()
                log.write(row)
                display.show(row)
                if self.on_step:
                    self.on_step(row)
            if saving:  # `_row` raises on a non-finite loss, so save after it
                path = self._save()
            if stopping and not last:
                display.note(f"interrupted at step {self.step} of {self.steps}; saved {path}, run again to go on")
                raise KeyboardInterrupt

    def _run_step(self, batches: Iterator[ClipBatch]) -> None:
        started = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - started
        set_learning_rate(self.optimizer, self.optim.rate(self.step, self.steps, self.peak_lr))
        with torch.autocast(self.device.type, dtype=self.dtype) if self.dtype else nullcontext():
            loss = self.training.compute_loss(batch)
        loss.loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.optim.clip_grad or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.window.add(loss, norm, batch.clip_B)
        self.window.wait_s += waited
        self.window.seconds += time.perf_counter() - started

    def _row(self) -> Row:
        """The metrics of the window, read from the device at once; a new window begins."""
        window, started = self.window, time.perf_counter()
        losses = torch.stack(window.losses).tolist()
        norms = torch.stack(window.norms).tolist()
        parts = {f"loss_{name}": torch.stack(some).mean().item() for name, some in window.parts.items()}
        window.seconds += time.perf_counter() - started  # on a GPU the steps are finished here
        self.window = _Window()
        first = self.step - len(losses) + 1
        for i, value in enumerate(losses):
            if not math.isfinite(value):
                self._raise_diverged(first + i, value, window.clips[i])
        clips = sum(len(clip_B) for clip_B in window.clips)
        loss = math.fsum(losses) / len(losses)
        self.totals.add(loss, clips, window.seconds, window.wait_s)
        return {
            "step": self.step,
            "epoch": self.step / self.loader.steps_per_epoch,
            "loss": loss,
            **parts,
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": math.fsum(norms) / len(norms),
            "clips_per_s": clips / window.seconds,
            "wait_share": window.wait_s / window.seconds,
            "seconds": self.totals.seconds,
            "retries": sum(self._retries().values()),
        }

    def _retries(self) -> dict[str, int]:
        """cause → retries of all sessions: those that the checkpoint knew, and the loader's since."""
        return dict(Counter(self.retries_before) + Counter(self.loader.stats.retries))

    def _raise_diverged(self, step: int, loss: float, clip_B: np.ndarray) -> None:
        keys = ", ".join(self.training.index.key(int(clip)) for clip in dict.fromkeys(clip_B.tolist()))
        raise DivergedError(
            f"loss is {loss} at step {step}; lower optim.blr={self.optim.blr} or set optim.clip_grad, "
            f"and look at the step's clips: {keys}"
        )

    def _save(self) -> Path:
        self.totals.bad_clips.update(self.loader.stats.bad)
        self.totals.retries = self._retries()
        rng: dict[str, Any] = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        content = {
            "config": self.training.config.model_dump_json(),
            **self.training.checkpoint_facts(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loader": self.loader.state_dict(),
            "rng": rng,
            "totals": asdict(self.totals),
        }
        return checkpoint.save(self.out, self.step, content)

    def _resume(self) -> Path | None:
        """Go on from the newest checkpoint of OUT; None where there is none. ConfigError where it is of another run."""
        found = checkpoint.checkpoints(self.out)
        if not found:
            return None
        content = checkpoint.load(found[-1], self.device)
        changed = self.training.find_changes(content)
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
        self.retries_before = self.totals.retries
        return found[-1]

    def _summary(self) -> RunSummary:
        totals = self.totals
        return RunSummary(
            steps=self.step,
            loss_first=totals.loss_first,
            loss_last=totals.loss_last,
            clips_per_s=totals.clips / totals.seconds,
            wait_share=totals.wait_s / totals.seconds,
            seconds=totals.seconds,
            checkpoint=str(checkpoint.checkpoints(self.out)[-1]),
            bad_clips=totals.bad_clips,
            retries=totals.retries,
        )


@contextmanager
def _catch_interrupts() -> Iterator[threading.Event]:
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
