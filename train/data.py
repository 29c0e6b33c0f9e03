"""Which clips a run plays: one dataset or several mixed, all of their clips or a selection; how their stores are reached.

Properties that hold: the config is written into run folders and checkpoints, so it names the file of storage options
(`@FILE`) and never holds them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from reelmae.pipeline.errors import ConfigError
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.loading.index.mixture import mix
from reelmae.pipeline.loading.index.selection import Selection
from reelmae.pipeline.storage.access import PATIENCE_MINUTES, Access, parse_options


def _require_reference(value: Any) -> Any:
    """The value, where it is None or `@FILE`; else ConfigError, which does not show what may be a secret."""
    if value is None or (isinstance(value, str) and value.startswith("@") and len(value) > 1):
        return value
    raise ConfigError(
        "storage_options=(not shown): the config is written into the run's folder, so it takes @FILE only; "
        "put the JSON into a file and name it"
    )


@dataclass(frozen=True)
class _Reached(Selection):
    """The keys of a Selection, and how the dataset's store is reached."""

    storage_options: Annotated[str | None, BeforeValidator(_require_reference)] = None
    """@FILE: a file with a JSON object of options of the file system, such as key, secret and endpoint_url for S3."""
    patience: float = PATIENCE_MINUTES
    """Minutes to wait for a store that fails or does not answer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_reference(self.storage_options)
        if not (math.isfinite(self.patience) and self.patience >= 0):
            raise ConfigError(f"patience={self.patience:g}: give minutes, 0 or more; 0 gives up at the first failure")

    def access(self) -> Access:
        """How the store is reached; ConfigError where the file of options cannot be read."""
        try:
            return Access(parse_options(self.storage_options), self.patience * 60)
        except ConfigError as e:
            raise ConfigError(f"data.storage_options: {e}") from e

    def selection(self) -> Selection:
        """The Selection made of these keys, without url, weight and mix."""
        return Selection(**{field.name: getattr(self, field.name) for field in fields(Selection)})


@dataclass(frozen=True, kw_only=True)
class DataPart(_Reached):
    """One dataset of a mix, and which of its clips are played."""

    url: str
    """A dataset written by `reelmae shard`: a folder or any fsspec URL."""
    weight: Annotated[float | None, Field(gt=0)] = None
    """Its share of the clips played is weight / sum of all weights. Give it for every part, or for none."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(_Reached):
    """Where the clips are: `url`, or `mix` for several datasets. The other keys are about `url`."""

    url: str | None = None
    """A dataset written by `reelmae shard`: a folder or any fsspec URL."""
    mix: tuple[DataPart, ...] = ()
    """Several datasets, each with its own selection, weight and storage options."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.url is None and not self.mix:
            raise ConfigError("url: is not given; add data.url=VALUE (or data.mix)")
        if self.mix:
            for field in fields(self):
                if field.name != "mix" and getattr(self, field.name) != field.default:
                    raise ConfigError(f"{field.name} beside data.mix: put it into the parts of the mix")

    def open(self) -> ClipIndex:
        """The index of the clips played. Errors are those of ClipIndex.open and of `mix`."""
        if self.url is not None:
            return ClipIndex.open(self.url, self.selection(), access=self.access())
        opened = ((ClipIndex.open(p.url, p.selection(), access=p.access()), p.weight) for p in self.mix)
        return mix(list(opened))

    def __str__(self) -> str:
        return self.url or " + ".join(part.url for part in self.mix)
