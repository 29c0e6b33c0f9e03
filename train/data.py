"""Which clips a run plays: one dataset or several mixed, all of their clips or a selection."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.loading.index.mixture import mix
from reelmae.pipeline.loading.index.selection import Selection


class _Selected(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    where: str | None = None  # a condition on the index's columns: "duration > 4 and label != 'x'"
    fraction: tuple[float, float] | None = None  # the sources whose hash lies there: (0, 0.9) and (0.9, 1) are apart
    keys: str | None = None  # a file or URL with one clip's key a line
    duplicates: bool = False  # play clips that repeat another (marked by the sharding job) as well

    def selection(self) -> Selection:
        """ConfigError where a condition or fraction cannot be."""
        return Selection(self.where, self.fraction, self.keys, self.duplicates)


class DataPart(_Selected):
    """One dataset of a mix."""

    url: str
    weight: float | None = Field(None, gt=0)  # its share of what is played, of all weights; give it for all or for none


class DataSection(_Selected):
    """Where the clips are: `url`, a dataset written by `reelmae shard` (a folder or any fsspec URL), or `mix`, several."""

    url: str | None = None
    mix: tuple[DataPart, ...] = ()

    @model_validator(mode="after")
    def _url_or_mix(self) -> DataSection:
        if self.url is None and not self.mix:
            raise ValueError("url: is not given; add data.url=VALUE (or data.mix)")
        if self.mix:
            for name, field in type(self).model_fields.items():
                if name != "mix" and getattr(self, name) != field.default:
                    raise ValueError(f"{name} beside data.mix: put it into the parts of the mix")
        return self

    def open(self) -> ClipIndex:
        """The index of what is played. Errors as those of ClipIndex.open, and ConfigError for a mix that cannot be."""
        if self.url is not None:
            return ClipIndex.open(self.url, self.selection())
        return mix([(ClipIndex.open(part.url, part.selection()), part.weight) for part in self.mix])

    def __str__(self) -> str:
        return self.url or " + ".join(part.url for part in self.mix)
