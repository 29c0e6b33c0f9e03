"""Commands about the whole: demo, report, doctor."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from reelmae.tools.commands.access import AccessFlags
from reelmae.tools.commands.command import Command
from reelmae.tools.show import Result

DOCTORS_PATIENCE = 0.1  # minutes: who asks wants to know


@dataclass
class Demo(Command):
    """Do everything with one command: raw bucket, shards, pretraining, reconstructions, timings, report.html."""

    src: str | None = None
    """Your own bucket (folder or fsspec URL). None: a generated one."""
    out: Path = Path("runs/demo")
    """Folder for everything. Run again with the same folder to resume."""
    quick: bool = False
    """A shorter demo: shorter videos, fewer training steps, a smaller model to time."""

    def run(self) -> Result:
        """Run the demo."""
        from reelmae.tools.demo import DemoConfig, demo

        return demo(DemoConfig(src=self.src, out=str(self.out), quick=self.quick))


@dataclass
class Report(Command):
    """Write one self-contained HTML page about a shard dataset, a run, or both."""

    run_dir: Annotated[Positional[str], arg(metavar="RUN")]
    """The demo's folder, a training run, or a shard dataset (folder or fsspec URL)."""
    out: Path | None = None
    """The page to write. None: RUN/report.html, where RUN is a folder."""
    access: Annotated[AccessFlags, arg(name="")] = field(default_factory=AccessFlags)

    def run(self) -> Result:
        """Write the page."""
        from reelmae.tools.report.write import write_report

        return {"report": str(write_report(self.run_dir, out=self.out, access=self.access.access()))}


@dataclass
class Doctor(Command):
    """Show what this machine can do: ffmpeg and its encoders, sandbox, scene detection, GPU; warn of what is missing."""

    url: Annotated[Positional[str | None], arg(metavar="URL")] = None
    """Also look at this bucket or folder: can it be reached and written? A small file is written there and removed."""
    access: Annotated[AccessFlags, arg(name="")] = field(default_factory=lambda: AccessFlags(patience=DOCTORS_PATIENCE))

    def run(self) -> Result:
        """Look at the machine, and at the store."""
        from reelmae.tools.doctor import doctor

        return doctor(self.url, self.access.access())
