"""Commands that make shards and look at them: shard, verify, inspect."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from reelmae.pipeline.errors import ConfigError
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.storage.access import PATIENCE_MINUTES
from reelmae.tools import show
from reelmae.tools.commands.access import AccessFlags, make_access
from reelmae.tools.commands.command import Command
from reelmae.tools.commands.runner import RunnerFlags
from reelmae.tools.show import Result

if TYPE_CHECKING:
    from reelmae.pipeline.dataset.repairs import RepairReport
    from reelmae.pipeline.dataset.verification import VerifyReport


@dataclass
class Shard(Command):
    """Turn a bucket of raw video into WebDataset shards. Run it again to resume."""

    src: Annotated[Positional[str], arg(metavar="SRC")]
    """Folder or fsspec URL (s3://…) of raw video or of tars of it, a manifest (.csv .tsv .parquet .jsonl), or tars by name
    ("s3://…/{000..999}.tar", or several with :: between them)."""
    dst: Annotated[Positional[str], arg(metavar="DST")]
    """Folder or fsspec URL for the shards."""
    config: Annotated[ShardConfig, arg(name="")] = field(default_factory=ShardConfig)
    workers: int | None = None
    """Number of sources to work on at once. None: one per core, of all nodes with --runner ray."""
    placement: Annotated[RunnerFlags, arg(name="")] = field(default_factory=RunnerFlags)
    append: bool = False
    """Add the sources of SRC that are not in DST yet."""
    retry_rejected: str | None = None
    """Try again the sources that were rejected for this reason, such as fetch_failed; all: for any reason."""
    limit: int | None = None
    """Plan at most this many sources, chosen at random. --append adds the others later."""
    takeover: bool = False
    """Take DST over from a job that works there; that job stops. Without it, DST is taken over only from a dead one."""
    src_storage_options: Annotated[str | None, arg(metavar="JSON|@FILE")] = None
    """Options of SRC's file system: a JSON object, or @FILE of one. For S3: key, secret, endpoint_url, profile, …"""
    dst_storage_options: Annotated[str | None, arg(metavar="JSON|@FILE")] = None
    """The same of DST's; the two may differ."""
    patience: float = PATIENCE_MINUTES
    """Minutes to wait for a store that fails or does not answer; then the job stops, and the same command resumes it."""
    dry_run: bool = False
    """Write nothing: list the sources, plan, try a few of them in a temporary folder, and estimate the whole job."""

    def run(self) -> Result:
        """Shard, with a progress bar on stderr."""
        from reelmae.pipeline.ingest.estimate import estimate
        from reelmae.pipeline.ingest.job import shard

        if self.dry_run and self.retry_rejected is not None:
            raise ConfigError("--dry-run estimates new sources only; leave out --retry-rejected")
        if self.dry_run and self.placement.runner != "local":
            raise ConfigError(
                f"--dry-run estimates by a trial on this machine; leave out --runner {self.placement.runner}"
            )
        src_access = make_access(self.src_storage_options, self.patience, flag="--src-storage-options")
        dst_access = make_access(self.dst_storage_options, self.patience, flag="--dst-storage-options")
        if self.dry_run:
            return estimate(
                self.src,
                self.dst,
                self.config,
                workers=self.workers,
                append=self.append,
                limit=self.limit,
                src_access=src_access,
                dst_access=dst_access,
            )
        with self.placement.open(self.workers) as runner, show.ShardProgress() as progress:
            summary = shard(
                self.src,
                self.dst,
                self.config,
                workers=self.workers,
                runner=runner,
                append=self.append,
                retry_rejected=self.retry_rejected,
                limit=self.limit,
                src_access=src_access,
                dst_access=dst_access,
                takeover=self.takeover,
                on_progress=progress,
            )
        values = asdict(summary) | {"dst": self.dst}
        if not self.json:
            retries = values.pop("retries")
            values |= {"retries": show.retries_text(retries)} if retries else {}
        return values


@dataclass
class Verify(Command):
    """Check a shard dataset: records of the job, index, every byte of the tars, DALI index. --deep decodes every clip."""

    dst: Annotated[Positional[str], arg(metavar="DST")]
    """Folder or fsspec URL of the shards."""
    deep: bool = False
    """Decode every frame of every clip, on all cores; with --runner ray, of all nodes."""
    repair: bool = False
    """Repair what is damaged: shards are made again from their sources with the same bytes, tables from the job's commits."""
    placement: Annotated[RunnerFlags, arg(name="")] = field(default_factory=RunnerFlags)
    access: Annotated[AccessFlags, arg(name="")] = field(default_factory=AccessFlags)
    src_storage_options: Annotated[str | None, arg(metavar="JSON|@FILE")] = None
    """With --repair: options of the file system of the sources, as --storage-options."""

    def run(self) -> Result:
        """Verify or repair; the exit status is 0 only if no fault is left."""
        from reelmae.pipeline.dataset.repairs import repair
        from reelmae.pipeline.dataset.verification import verify

        if self.src_storage_options is not None and not self.repair:
            raise ConfigError("--src-storage-options: only --repair reads the sources; leave it out, or add --repair")
        access = self.access.access()
        src_access = make_access(self.src_storage_options, self.access.patience, flag="--src-storage-options")
        with self.placement.open() as runner:
            if self.repair:
                report: VerifyReport | RepairReport = repair(
                    self.dst, deep=self.deep, access=access, src_access=src_access, runner=runner
                )
            else:
                report = verify(self.dst, deep=self.deep, access=access, runner=runner)
        values = report.as_dict() | {"exit_status": 0 if report.ok else 1}
        if not self.json and not values["retries"]:
            del values["retries"]
        return values


@dataclass
class Inspect(Command):
    """Show what a shard dataset holds: sources and clips, rejects, scores, labels, duplicates."""

    dst: Annotated[Positional[str], arg(metavar="DST")]
    """Folder or fsspec URL of the shards."""
    rejects: Annotated[tuple[str, ...] | None, arg(metavar="[REASON ...]")] = None
    """List the rejected sources and spans, all or those of these reasons. Columns, separated by tabs: reason, source, start, end, detail."""
    source: str | None = None
    """List what became of the sources whose URL contains this text."""
    access: Annotated[AccessFlags, arg(name="")] = field(default_factory=AccessFlags)

    def run(self) -> Result:
        """Print the tables or lines; with --json nothing is printed here."""
        from reelmae.tools.summary import inspect

        return inspect(
            self.dst, rejects=self.rejects, source=self.source, as_json=self.json, access=self.access.access()
        )
