"""The flags of a command that takes one URL: how its store is reached."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from reelmae.pipeline.errors import ConfigError
from reelmae.pipeline.storage.access import PATIENCE_MINUTES, Access, parse_options


@dataclass(kw_only=True)
class AccessFlags:
    """How the store of a URL is reached. A command holds one as a field with `arg(name="")`, which flattens it."""

    storage_options: Annotated[str | None, arg(metavar="JSON|@FILE")] = None
    """Options of the URL's file system: a JSON object, or @FILE of one. For S3: key, secret, endpoint_url, profile, …"""
    patience: float = PATIENCE_MINUTES
    """Minutes to wait for a store that fails or does not answer."""

    def access(self) -> Access:
        """These flags as an Access; ConfigError, without the options' text, where they are no JSON object."""
        return make_access(self.storage_options, self.patience)


def make_access(storage_options: str | None, patience: float, *, flag: str = "--storage-options") -> Access:
    """An Access of a flag's text (JSON or @FILE) and of minutes of patience; ConfigError where one is wrong."""
    if not (math.isfinite(patience) and patience >= 0):
        raise ConfigError(f"--patience {patience:g}: give minutes, 0 or more; 0 gives up at the first failure")
    try:
        return Access(parse_options(storage_options), patience * 60)
    except ConfigError as e:
        raise ConfigError(f"{flag}: {e}") from e
