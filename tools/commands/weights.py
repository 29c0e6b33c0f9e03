"""Commands that exchange weights with other codes: import-weights, export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from reelmae.tools.commands.command import Command
from reelmae.tools.show import Result


@dataclass
class ImportWeights(Command):
    """Read a checkpoint of mae_st, PySlowFast, VideoMAE, timm or ours; write it as safetensors with its config."""

    src: Annotated[Positional[Path], arg(metavar="SRC")]
    """A checkpoint file. Its layout is recognised by its content."""
    out: Annotated[Positional[Path], arg(metavar="OUT.safetensors")]
    """The file to write."""
    frames: int | None = None
    """Frames of a clip. If the file has another number, its positions are resized."""
    size: int | None = None
    """Side of a clip in pixels. If the file has another size, its positions are resized."""
    heads: int | None = None
    """Attention heads of the encoder; required if its width is not a published one."""
    decoder_heads: int | None = None
    """Attention heads of the decoder; required if its width is not a published one."""
    patch: int | None = None
    """Side of a patch in pixels; required for a file in our layout that has no config."""
    grid: tuple[int, int, int] | None = None
    """Tokens along time, height and width, for a file with one joint table of positions. It must agree with the file."""
    allow: tuple[str, ...] = ()
    """Patterns of tensors in the file to ignore, such as 'head.*'."""
    encoder_only: bool = False
    """Read and write the encoder only; ignore the rest of the file."""

    def run(self) -> Result:
        """Import."""
        from reelmae.tools.convert import import_weights

        return import_weights(
            self.src,
            self.out,
            allow=self.allow,
            grid=self.grid,
            encoder_only=self.encoder_only,
            frames=self.frames,
            size=self.size,
            heads=self.heads,
            decoder_heads=self.decoder_heads,
            patch=self.patch,
        )


@dataclass
class Export(Command):
    """Write a model for others: as safetensors with its config, or in the layout that another code reads."""

    checkpoint: Annotated[Positional[Path], arg(metavar="CHECKPOINT")]
    """A run's folder (its newest checkpoint is used), a checkpoint file, or our own .safetensors file."""
    out: Annotated[Positional[Path], arg(metavar="OUT")]
    """The file to write. If its name ends in .safetensors, any layout is written as safetensors."""
    format: Literal["safetensors", "timm", "mae_st", "slowfast", "videomae"] = "safetensors"
    """safetensors: our own names, with the config. timm: encoder or classifier. Others: the layout of that code."""
    encoder_only: bool = False
    """Write the encoder only."""

    def run(self) -> Result:
        """Export."""
        from reelmae.tools.convert import export

        return export(self.checkpoint, self.out, format=self.format, encoder_only=self.encoder_only)
