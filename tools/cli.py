"""`reelmae COMMAND …`: the only place that reads argv, prints results and turns errors into exit statuses.

Exit status: 0 done; 1 failed while running; 2 wrong usage, configuration or input; 130 interrupted (where it says so, the
same command resumes). A user's mistake is one line that names the value and the remedy, never a traceback.
With `--json` stdout is one JSON object and everything else goes to stderr.

The commands are in `commands/`. They import torch and DALI only when they run, so `--help` and `shard` start at once.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import pydantic
import tyro
from tyro.conf import subcommand

from reelmae.pipeline.errors import ConfigError, ReelmaeError
from reelmae.tools import show
from reelmae.tools.commands.bench import Bench
from reelmae.tools.commands.data import Inspect, Shard, Verify
from reelmae.tools.commands.overview import Demo, Doctor, Report
from reelmae.tools.commands.train import Features, Pretrain, Reconstruct
from reelmae.tools.commands.weights import Export, ImportWeights

UNUSABLE_PATH = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}

AnyCommand = (
    Annotated[Demo, subcommand("demo")]
    | Annotated[Shard, subcommand("shard")]
    | Annotated[Verify, subcommand("verify")]
    | Annotated[Pretrain, subcommand("pretrain")]
    | Annotated[Reconstruct, subcommand("reconstruct")]
    | Annotated[ImportWeights, subcommand("import-weights")]
    | Annotated[Export, subcommand("export")]
    | Annotated[Features, subcommand("features")]
    | Annotated[Bench, subcommand("bench")]
    | Annotated[Report, subcommand("report")]
    | Annotated[Inspect, subcommand("inspect")]
    | Annotated[Doctor, subcommand("doctor")]
)

RESUMABLE = (Demo, Shard, Pretrain, Features)  # what they have done stays, and the same command goes on


def parse(argv: list[str]) -> AnyCommand:
    """argv → one command. Exits with 2 at an unknown flag; raises ConfigError at a value out of range."""
    try:
        return tyro.cli(
            AnyCommand,
            prog="reelmae",
            description="Raw video buckets to shards to pretrained encoders, at the accelerator's pace.",
            args=argv,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
        )
    except pydantic.ValidationError as e:
        raise ConfigError("; ".join(_wrong_value(error) for error in e.errors())) from e


def _wrong_value(error: Any) -> str:
    """One of pydantic's errors as text. An error without a place is about several flags together."""
    message = error["msg"].removeprefix("Value error, ")
    flag = ".".join(map(str, error["loc"])).replace("_", "-")
    return f"--{flag} {error['input']}: {message}" if flag else message


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in args
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a preempted job ends as after Ctrl-C: resumable
    command: AnyCommand | None = None
    try:
        try:
            command = parse(args)
        except BrokenPipeError:  # from --help
            _discard_stdout()
            return 0
        with log_to_stderr():
            result = command.run()
    except KeyboardInterrupt:
        resumes = isinstance(command, RESUMABLE) or (isinstance(command, Verify) and command.repair)
        again = "run the same command again to resume" if resumes else "nothing of it is kept"
        return _fail(f"interrupted; {again}", 130, as_json)
    except ReelmaeError as e:
        return _fail(str(e), e.exit_status, as_json)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            return _fail(f"{e.filename or 'disk'}: no space left; free some and run again (it resumes)", 1, as_json)
        if e.errno in UNUSABLE_PATH and e.filename is not None:
            return _fail(f"{e.filename}: {e.strerror}; check the path and its rights", 2, as_json)
        raise
    try:
        if as_json:
            print(json.dumps(result, indent=2, default=str), flush=True)
        else:
            show.print_result(result)
    except BrokenPipeError:
        _discard_stdout()
    return int(result.get("exit_status", 0))


class _LineHandler(logging.Handler):
    """Writes records as lines of ours to stderr as it is at that moment: a progress bar replaces it and prints above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        try:
            sys.stderr.write(f"reelmae: {show.printable(record.getMessage())}\n")
            sys.stderr.flush()
        except (OSError, ValueError):  # stderr is gone
            self.handleError(record)


@contextmanager
def log_to_stderr() -> Iterator[None]:
    """Show what our code logs, such as what it waits for, as plain lines on stderr; once, whoever else logs."""
    log, handler = logging.getLogger("reelmae"), _LineHandler(logging.WARNING)
    before, log.propagate = log.propagate, False
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = before


def _discard_stdout() -> None:
    """Its reader, such as `head`, has gone: what Python flushes at exit goes to /dev/null."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, status: int, as_json: bool) -> int:
    print(f"reelmae: {message}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": message, "exit_status": status}))
    return status


if __name__ == "__main__":
    sys.exit(main())
