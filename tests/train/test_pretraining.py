"""The training loop on real clips: it learns, resumes exactly, and stops with a reason."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from reelmae.model import vit
from reelmae.model.mae import MaskedAutoencoder
from reelmae.model.weights import load_model
from reelmae.pipeline.errors import ConfigError, DivergedError
from reelmae.pipeline.loading.loader import ClipLoader
from reelmae.train import checkpoint
from reelmae.train.config import PretrainConfig, load_config
from reelmae.train.metrics import Row, read_rows
from reelmae.train.pretraining import pretrain

MakeConfig = Callable[..., PretrainConfig]


class CrashError(Exception):
    """Stands for a crash at a step."""


def kill_at(step: int) -> Callable[[Row], None]:
    def on_step(row: Row) -> None:
        if row["step"] == step:
            raise CrashError

    return on_step


WAITING_RUN = """
import sys
from reelmae.train.config import from_json
from reelmae.train.pretraining import pretrain

def wait(row):
    if row["step"] == 2:
        print("step 2", flush=True)
        sys.stdin.readline()

if __name__ == "__main__":
    pretrain(from_json(open(sys.argv[1]).read()), on_step=wait)
"""  # a run that stands still after its second step until it gets a line on stdin


def losses(out: str) -> list[float]:
    return [row["loss"] for row in read_rows(Path(out) / "metrics.jsonl")]


def test_loss_falls_and_the_run_leaves_its_files(tiny: MakeConfig) -> None:
    config = tiny("run.steps=150", "run.log_every=10", "optim.warmup=0.1")
    summary = pretrain(config)
    out = Path(config.run.out)
    assert summary.steps == 150 and summary.loss_last < 0.55 * summary.loss_first
    assert 0 <= summary.wait_share <= 1 and summary.clips_per_s > 0 and summary.bad_clips == {}
    rows = read_rows(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(10, 151, 10))
    assert {"loss", "lr", "clips_per_s", "wait_share", "grad_norm", "epoch"} <= set(rows[0])
    assert rows[-1]["epoch"] == pytest.approx(150 / 3)
    assert json.loads((out / "summary.json").read_text())["loss_last"] == summary.loss_last
    assert json.loads((out / "config.json").read_text())["run"]["steps"] == 150
    assert list((out / "tensorboard").iterdir())
    assert load_config(summary.checkpoint) == config and not load_model(summary.checkpoint).training


@pytest.mark.parametrize("objective", ["mae", "slowfast", "videomae", "motion"])
def test_every_objective_trains_and_its_losses_are_told_apart(tiny: MakeConfig, objective: str) -> None:
    options = "loader.decoder_mask.kind=cells run.steps=4 run.log_every=2 run.checkpointing=true model.decoder_heads=2"
    config = tiny(f"model.objective={objective}", *options.split())
    summary = pretrain(config)
    rows = read_rows(Path(config.run.out) / "metrics.jsonl")
    parts = {key for key in rows[0] if key.startswith("loss_")}
    assert parts == ({"loss_space", "loss_motion"} if objective == "motion" else set())
    for row in rows:
        if parts:
            assert row["loss"] == pytest.approx(row["loss_space"] + row["loss_motion"])
    assert load_model(summary.checkpoint).config == config.model.mae()


def test_a_run_checkpoints_activations_where_it_is_told_to(tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return real(*args, **kwargs)

    real = vit.checkpoint
    monkeypatch.setattr(vit, "checkpoint", counting)
    pretrain(tiny("run.steps=1"))
    assert not calls
    config = tiny("run.steps=2", "run.checkpointing=true")  # it may change on resume
    pretrain(config)
    mae = config.model.mae()
    assert len(calls) == mae.depth + mae.decoder_depth


def test_the_schedule_of_a_run_is_that_of_its_recipe(tiny: MakeConfig) -> None:
    config = tiny("run.steps=4", "optim.warmup=0.5", "optim.schedule=from_start", "optim.start_lr=1e-5")
    pretrain(config)
    rates = [row["lr"] for row in read_rows(Path(config.run.out) / "metrics.jsonl")]
    half = config.lr() / 2  # what a cosine from the start has left after two of four steps
    assert rates == pytest.approx([1e-5, (1e-5 + half) / 2, half, config.lr() * 0.5 * (1 - 0.5**0.5)])


def test_decoder_masking_leaves_tokens_out_of_the_loss(tiny: MakeConfig, tmp_path: Path) -> None:
    config = tiny(f"run.out={tmp_path / 'half'}", "run.steps=1", "optim.warmup=0.0", "loader.decoder_mask.kind=cells")
    pretrain(config)
    torch.manual_seed(config.run.seed)  # the model as it was before its only step
    model = MaskedAutoencoder(config.model.mae())
    with ClipLoader(config.data.open(), config.loader_config()) as loader:
        batch = next(iter(loader))
    kept = [set(row) for row in batch.ids_keep_BK.tolist()]
    asked = [sorted(set(row) - kept[b]) for b, row in enumerate(batch.ids_decode_BQ.tolist())]
    pred_BLP = model.predict(batch.clips_BCTHW, batch.ids_keep_BK)  # all tokens: of another loss than the run's
    assert 0 < sum(map(len, asked)) < pred_BLP.shape[0] * (pred_BLP.shape[1] - batch.ids_keep_BK.shape[1])
    out = model(batch.clips_BCTHW, batch.ids_keep_BK, batch.ids_decode_BQ)
    assert [out.ids_BQ[b][out.weight_BQ[b] > 0].tolist() for b in range(len(asked))] == asked
    assert losses(config.run.out)[0] == pytest.approx(out.loss.item(), rel=1e-6)


def test_killed_and_resumed_equals_never_killed(tiny: MakeConfig, tmp_path: Path) -> None:
    whole = tiny(f"run.out={tmp_path / 'whole'}", "run.steps=9", "run.checkpoint_every=4")
    killed = tiny(f"run.out={tmp_path / 'killed'}", "run.steps=9", "run.checkpoint_every=4")
    pretrain(whole)
    for step in (6, 9):  # after checkpoint 4, and in the last step before its checkpoint
        with pytest.raises(CrashError):
            pretrain(killed, on_step=kill_at(step))
    pretrain(killed)
    assert losses(whole.run.out) == losses(killed.run.out)
    assert len(losses(whole.run.out)) == 9
    states = [checkpoint.load(checkpoint.checkpoints(Path(c.run.out))[-1]) for c in (whole, killed)]
    assert all(torch.equal(states[0]["model"][k], states[1]["model"][k]) for k in states[0]["model"])
    assert states[0]["loader"] == states[1]["loader"]


def test_a_finished_run_is_not_run_again(tiny: MakeConfig) -> None:
    config = tiny()
    first = pretrain(config)
    assert pretrain(config, on_step=kill_at(1)) == first


def test_more_steps_go_on_from_the_end(tiny: MakeConfig) -> None:
    pretrain(tiny("run.steps=3"))
    assert pretrain(tiny("run.steps=5"), on_step=kill_at(3)).steps == 5


def test_another_config_on_the_same_out_is_refused_by_name(tiny: MakeConfig, other_dataset: str) -> None:
    pretrain(tiny("run.steps=2"))
    with pytest.raises(
        ConfigError, match=r"run\.out=.* holds another run: optim\.blr=0\.25 \(was 0\.5\); give another"
    ):
        pretrain(tiny("run.steps=2", "optim.blr=0.25"))
    with pytest.raises(ConfigError, match=r"data\.url=.* is another dataset, or another selection of it, than before"):
        pretrain(tiny("run.steps=2", f"data.url={other_dataset}"))


def test_equal_seeds_give_equal_runs_and_others_differ(tiny: MakeConfig, tmp_path: Path) -> None:
    runs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        config = tiny(f"run.out={tmp_path / name}", f"run.seed={seed}", "run.steps=3")
        pretrain(config)
        runs.append(losses(config.run.out))
    assert runs[0] == runs[1] != runs[2]


def test_epochs_are_turned_into_steps(tiny: MakeConfig) -> None:
    assert pretrain(tiny("run.epochs=1.5")).steps == 5  # 12 clips, 4 a step: 3 steps an epoch


def test_a_loss_that_is_not_finite_stops_the_run_with_step_and_clips(tiny: MakeConfig) -> None:
    config = tiny("optim.blr=1e30", "optim.clip_grad=0", "optim.warmup=0.0")
    with pytest.raises(DivergedError) as e:
        pretrain(config)
    assert "at step 2" in str(e.value) and "lower optim.blr=1e+30" in str(e.value)
    assert str(e.value).count("_0000") == 4  # the keys of the step's four videos
    assert not checkpoint.checkpoints(Path(config.run.out))


def test_bfloat16_and_dense_runs_learn_too(tiny: MakeConfig, tmp_path: Path) -> None:
    for name, override in (("bf16", "run.precision=bf16"), ("dense", "model.encoder=dense")):
        summary = pretrain(tiny(f"run.out={tmp_path / name}", override, "run.steps=60", "run.log_every=10"))
        assert summary.loss_last < summary.loss_first, name


def test_clip_grad_bounds_the_update_and_the_row_tells_the_norm_before(tiny: MakeConfig, tmp_path: Path) -> None:
    norms = []
    for name, clip in (("free", 0), ("clipped", 1e-3)):
        config = tiny(f"run.out={tmp_path / name}", f"optim.clip_grad={clip}", "run.steps=1")
        pretrain(config)
        norms.append(read_rows(Path(config.run.out) / "metrics.jsonl")[0]["grad_norm"])
    assert norms[0] == norms[1] > 1e-3


def test_threads_of_the_caller_are_given_back(tiny: MakeConfig) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        pretrain(tiny("run.steps=1"))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told(tiny: MakeConfig) -> None:
    with pytest.raises(ConfigError, match="sees no GPU here; give cpu or auto"):
        tiny("run.device=cuda")


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_or_preemption_while_a_step_is_told_ends_the_run_after_the_next(
    tiny: MakeConfig, kind: signal.Signals
) -> None:
    config = tiny()

    def stop(row: Row) -> None:
        if row["step"] == 3:
            signal.raise_signal(kind)

    before = signal.getsignal(kind)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config, on_step=stop)
    assert signal.getsignal(kind) is before
    assert [p.name for p in checkpoint.checkpoints(Path(config.run.out))] == ["step_000004.pt"]


def test_ctrl_c_saves_the_step_and_the_run_goes_on_from_there(tiny: MakeConfig, tmp_path: Path) -> None:
    overrides = ["run.steps=400", "loader.workers=1"]
    config = tiny(*overrides)
    script, text = tmp_path / "run.py", tmp_path / "config.json"
    script.write_text(WAITING_RUN)
    text.write_text(config.model_dump_json())
    child = subprocess.Popen(
        [sys.executable, str(script), str(text)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert child.stdout is not None
    line = child.stdout.readline()
    assert line == "step 2\n", line or child.communicate()[1]
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does: the workers get it too
    _, err = child.communicate("go on\n")
    metrics = Path(config.run.out) / "metrics.jsonl"
    assert child.returncode == -signal.SIGINT or "KeyboardInterrupt" in err, err
    saved = checkpoint.load(checkpoint.checkpoints(Path(config.run.out))[-1])["step"]
    assert 0 < saved < 400 and saved == read_rows(metrics)[-1]["step"]
    assert f"interrupted at step {saved} of 400" in err
    with pytest.raises(CrashError):  # the next step, and not the first
        pretrain(tiny(*overrides), on_step=kill_at(saved + 1))
