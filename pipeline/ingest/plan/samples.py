"""Pure: the members of a tar → the sources in it, with what their side files say of them.

A sample is what webdataset calls one: consecutive members with one key, which is the path up to the first dot of the
file's name. `.cls` beside a video is its label (else the json's label column), `.txt` its column `txt`, each name of
the object in `.json` a column. Every other member is a source; so is a side file that has no other member beside it,
or cannot be read as what its name says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from reelmae.pipeline.ingest.plan.values import encode_json, is_empty, to_text
from reelmae.pipeline.ingest.tars.scan import Member, TarScan, show_name

SIDES = ("json", "txt", "cls")
SIDE_BYTES = 1 << 20  # a longer one is not read
TXT = "txt"  # name of the column
_KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)


@dataclass(frozen=True)
class TarSource:
    """A member that is a source."""

    member: Member
    label: str | None
    columns: Mapping[str, Any] = field(default_factory=dict)
    """What its side files say beside the label."""


@dataclass
class _Sample:
    key: str | None
    videos: list[Member] = field(default_factory=list)
    sides: dict[str, tuple[Member, bytes | None]] = field(default_factory=dict)
    """Extension → the member and its bytes; None where they are too many."""


class SampleReader:
    """Goes through the members of one tar."""

    def __init__(self, label_column: str) -> None:
        self._label_column = label_column
        self.unreadable = 0
        """Side files so far that could not be read."""
        self.labels = 0
        """Samples so far whose json has the label column."""

    def read(self, scan: TarScan) -> Iterator[TarSource]:
        """The sources of the tar, in its order but for side files, which come when their sample ends."""
        sample = _Sample(None)
        for member in scan:
            key, extension = split_name(member.name)
            side = extension in SIDES and not member.fault
            if key is None or key != sample.key or (side and extension in sample.sides):
                yield from self._end(sample)
                sample = _Sample(key)
            if side:
                content = scan.content(member) if member.size <= SIDE_BYTES else None
                sample.sides[extension] = member, content
            else:
                sample.videos.append(member)
        yield from self._end(sample)

    def _end(self, sample: _Sample) -> Iterator[TarSource]:
        label: str | None = None
        columns: dict[str, Any] = {}
        left = [member for member, _ in sample.sides.values()]
        if sample.videos and sample.sides:
            label, columns, left = self._read_sides(sample.sides)
        for member in sample.videos:
            yield TarSource(member, label, columns)
        for member in left:
            yield TarSource(member, None)

    def _read_sides(
        self, sides: Mapping[str, tuple[Member, bytes | None]]
    ) -> tuple[str | None, dict[str, Any], list[Member]]:
        """The label, the columns, and the side files that could not be read."""
        read = {name: _parse(name, content) for name, (_, content) in sides.items()}
        left = [sides[name][0] for name, value in read.items() if value is None]
        self.unreadable += len(left)
        columns = dict(read.get("json") or {})
        self.labels += self._label_column in columns
        label = columns.pop(self._label_column, None)
        if not is_empty(read.get("cls")):
            label = read["cls"]
        if not is_empty(read.get("txt")):
            columns[TXT] = read["txt"]
        return (None if is_empty(label) else to_text(label)), columns, left


def split_name(name: str) -> tuple[str | None, str]:
    """webdataset's key of a member, None where its name gives none, and its extension in lower case."""
    found = _KEY.fullmatch(name)
    return (found.group(1), found.group(2).lower()) if found else (None, "")


def is_side(name: str) -> bool:
    """Whether a member of this name can be a side file."""
    return split_name(name)[1] in SIDES


def _parse(extension: str, content: bytes | None) -> Any:
    """The object of a json, the text of another; None where it is neither."""
    if content is None:
        return None
    try:
        text = content.decode()
        if extension != "json":
            return text.strip() if "\0" not in text else None
        value = json.loads(text)
        encode_json(value).encode()  # half a surrogate pair can be written so
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def folder_of(name: str) -> str | None:
    """The first folder of a member's path; None where it lies in none."""
    folders = [part for part in show_name(name).split("/")[:-1] if part not in ("", ".")]
    return folders[0] if folders else None


def encode_columns(columns: Mapping[str, Any]) -> str | None:
    """What `decode_columns` gives back; None where there is none."""
    return encode_json(columns) if columns else None


def decode_columns(texts: Iterable[str | None]) -> Iterator[dict[str, Any]]:
    """The columns of each source."""
    return (json.loads(text) if text else {} for text in texts)
