"""Commands that train a model and look at what it learned: pretrain, reconstruct, features."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from reelmae.tools.commands.access import AccessFlags
from reelmae.tools.commands.command import Command
from reelmae.tools.commands.runner import RunnerFlags
from reelmae.tools.show import Result
from reelmae.train.precision import Precision


@dataclass
class Pretrain(Command):
    """Pretrain a masked autoencoder on shards. Run it again to resume."""

    recipe: Annotated[Positional[str], arg(metavar="RECIPE")]
    """Name of a recipe (demo, mae_st_vit_b, mae_st_vit_l, motion_mae_vit_b, videomae_vit_b), or a TOML file."""
    overrides: Annotated[Positional[tuple[str, ...]], arg(metavar="KEY=VALUE")] = ()
    """Settings that replace the recipe's, such as data.url=s3://bucket/shards data.storage_options=@FILE run.out=runs/a."""

    def run(self) -> Result:
        """Pretrain to the recipe's last step."""
        from reelmae.train.config import load_recipe
        from reelmae.train.pretraining import pretrain

        return asdict(pretrain(load_recipe(self.recipe, self.overrides)))


@dataclass
class Reconstruct(Command):
    """Draw clips as original | masked | reconstructed: a PNG and an animated WebP."""

    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")]
    """A run's folder (its newest checkpoint is used) or a checkpoint file."""
    data: Annotated[Positional[str], arg(metavar="DATA")]
    """Folder or fsspec URL of shards."""
    out: Path = Path("reconstructions")
    """Folder for the pictures."""
    clips: int = 6
    """Number of clips to draw."""
    seed: int = 0
    """Another seed chooses other clips, windows and masks."""
    access: Annotated[AccessFlags, arg(name="")] = field(default_factory=AccessFlags)

    def run(self) -> Result:
        """Draw the pictures."""
        from reelmae.tools.reconstruct import reconstruct

        access = self.access.access()
        return reconstruct(self.checkpoint, self.data, self.out, clips=self.clips, seed=self.seed, access=access)


@dataclass
class Features(Command):
    """Write frozen features: one vector per view of every clip, in one parquet file with a summary beside it. Run it again to resume."""

    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")]
    """A run's folder (its newest checkpoint is used), a checkpoint file, or exported weights (.safetensors)."""
    data: Annotated[Positional[str], arg(metavar="DATA")]
    """Folder or fsspec URL of shards."""
    out: Path = Path("features.parquet")
    """The file to write, with columns key, label, label_id, view, feature. The summary goes beside it, as .json."""
    views: int = 1
    """Views of each clip, spread evenly over its length."""
    pool: Literal["mean", "cls"] = "mean"
    """mean: the mean of the encoder's tokens. cls: its class token."""
    fps: float | None = None
    """Sampled frames per second. None: as the checkpoint was trained."""
    where: str | None = None
    """Only clips that meet this condition, such as "duration > 4 and label != 'x'"."""
    batch: int = 8
    """Views encoded at a time."""
    workers: int | None = None
    """Decoding processes. None: one per core; with --runner ray, of each task, 4 on CUDA, else 1. 0: decode in this process."""
    device: str = "auto"
    """auto: CUDA if this machine has a GPU, else the CPU. With --runner ray give cuda where only the nodes have GPUs."""
    precision: Precision = "auto"
    """auto: bf16 on CUDA, float32 on the CPU."""
    placement: Annotated[RunnerFlags, arg(name="")] = field(default_factory=RunnerFlags)
    access: Annotated[AccessFlags, arg(name="")] = field(default_factory=AccessFlags)

    def run(self) -> Result:
        """Encode every clip, with a progress bar on stderr."""
        from reelmae.tools.show import ClipProgress
        from reelmae.train.features import features, task_needs

        access = self.access.access()
        needs = {} if self.placement.runner == "local" else task_needs(self.checkpoint, self.device, self.workers)
        with self.placement.open(**needs) as runner, ClipProgress() as progress:
            return features(
                self.checkpoint,
                self.data,
                self.out,
                views=self.views,
                pool=self.pool,
                fps=self.fps,
                where=self.where,
                batch=self.batch,
                workers=self.workers,
                device=self.device,
                precision=self.precision,
                access=access,
                runner=runner,
                on_progress=progress,
            )
