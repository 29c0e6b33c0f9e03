"""Which clips a run plays: one dataset or several mixed, all of their clips or a selection."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated

from pydantic import Field

from reelmae.pipeline.errors import ConfigError
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.loading.index.mixture import mix
from reelmae.pipeline.loading.index.selection import Selection


@dataclass(frozen=True)
class _Selected(Selection):
    """The keys of a Selection, beside others."""

    def selection(self) -> Selection:
        """The Selection made of these keys, without url, weight and mix."""
        return Selection(**{field.name: getattr(self, field.name) for field in fields(Selection)})


@dataclass(frozen=True, kw_only=True)
class DataPart(_Selected):
    """One dataset of a mix, and which of its clips are played."""

    url: str
    """A dataset written by `reelmae shard`: a folder or any fsspec URL."""
    weight: Annotated[float | None, Field(gt=0)] = None
    """Its share of the clips played is weight / sum of all weights. Give it for every part, or for none."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(_Selected):
    """Where the clips are: `url`, or `mix` for several datasets. The other keys select clips of `url`."""

    url: str | None = None
    """A dataset written by `reelmae shard`: a folder or any fsspec URL."""
    mix: tuple[DataPart, ...] = ()
    """Several datasets, each with its own selection and weight."""

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
            return ClipIndex.open(self.url, self.selection())
        return mix([(ClipIndex.open(part.url, part.selection()), part.weight) for part in self.mix])

    def __str__(self) -> str:
        return self.url or " + ".join(part.url for part in self.mix)
