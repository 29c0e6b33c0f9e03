"""Every exception reelmae raises on purpose. A message names the value and the remedy.

ReelmaeError                        exit status 1: failed while running
├── UsageError (also ValueError)    exit status 2: wrong usage, configuration or input
│   ├── ConfigError                 a key or value of a flag, recipe or override
│   ├── InputError                  a path, URL, bucket or manifest that is missing, empty or not what it should be
│   │   └── WeightsError            a file of weights that cannot be read, or does not fit the model or layout
│   └── JobMismatchError            DST holds another job, or one that needs other tools than this machine has
├── ClaimedError                    another job works at the same destination
├── ClusterError                    a Ray cluster that does not answer, has no room for a task, or loses it again and again
├── StorageError                    reading or writing failed after retries
│   ├── StorageFullError            no space left
│   └── ShortFileError              a file ends before the bytes that were asked for
├── ChildError                      a sandboxed child failed (carries returncode and the last lines of stderr)
│   ├── ChildTimeoutError           it ran past its wall-clock limit and was killed
│   └── ChildCrashedError           it died of a signal or a resource limit
│       └── ChildKilledError        somebody else killed it: it may work when it is run again
├── NothingKeptError                a sharding run in which every source was rejected
├── DivergedError                   training whose loss is not finite
└── DatasetError                    a dataset is not what its index says
    ├── BadClipError                one clip cannot be read or decoded (carries its key)
    └── TooManyBadClipsError        more bad clips than `max_bad_fraction` allows
"""

from __future__ import annotations


class ReelmaeError(Exception):
    """Base of all; `exit_status` is what the command line returns for it."""

    exit_status = 1


class UsageError(ReelmaeError, ValueError):
    """Wrong usage, configuration or input."""

    exit_status = 2


class ConfigError(UsageError):
    """A wrong configuration key or value."""


class InputError(UsageError):
    """A path, URL, bucket or manifest that is missing, empty or not what it should be."""


class WeightsError(InputError):
    """A file of weights that cannot be read, or that does not fit the model or the layout."""


class JobMismatchError(UsageError):
    """The destination holds another job, or one that needs other tools than this machine has."""


class ClaimedError(ReelmaeError):
    """Another job works at the same destination, or has taken it over."""


class ClusterError(ReelmaeError):
    """A Ray cluster that does not answer, has no room for a task, or loses it again and again."""


class StorageError(ReelmaeError):
    """Reading or writing failed after retries."""


class StorageFullError(StorageError):
    """No space left on the destination."""


class ShortFileError(StorageError):
    """A file ends before the bytes that were asked for."""


class ChildError(ReelmaeError):
    """A sandboxed child process failed.

    `returncode` is None where the child never started or was killed by us.
    """

    def __init__(self, message: str, *, returncode: int | None = None, stderr: str = "") -> None:
        super().__init__(message)
        self.returncode = returncode
        self.stderr = stderr


class ChildTimeoutError(ChildError):
    """The child ran past its wall-clock limit and its process group was killed."""


class ChildCrashedError(ChildError):
    """The child died of a signal or of a resource limit."""


class ChildKilledError(ChildCrashedError):
    """The child was killed by SIGKILL or SIGTERM that neither we nor a limit of ours sent."""


class NothingKeptError(ReelmaeError):
    """Every source of a sharding run was rejected."""


class DivergedError(ReelmaeError):
    """Training whose loss is not finite."""


class DatasetError(ReelmaeError):
    """A dataset is not what its index says."""


class BadClipError(DatasetError):
    """One clip cannot be read or decoded."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"clip {key}: {reason}")
        self.key = key
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadClipError], tuple[str, str]]:
        """Pickle by its two arguments: it crosses process borders."""
        return type(self), (self.key, self.reason)


class TooManyBadClipsError(DatasetError):
    """More clips were bad than `max_bad_fraction` allows."""
