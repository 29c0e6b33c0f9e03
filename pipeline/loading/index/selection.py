"""Which clips of a dataset are played: a condition on columns, a fraction of the sources, a list of keys.

Properties that hold:
- a clip is played where it satisfies every part of the selection;
- a fraction selects *sources*, by the hash at the start of their keys: the clips of one video are all on the same side
  of (0, 0.9) and (0.9, 1), which together select everything; (0, 0.1) is part of (0, 0.5). Sources that are added to
  the dataset later change nothing for the others;
- a list names clips of the dataset: a key that the dataset does not have is an error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from reelmae.pipeline.errors import ConfigError, InputError
from reelmae.pipeline.loading.index.keys import ORDINALS, parse_key
from reelmae.pipeline.loading.index.where import Where
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.checked import read_agreed
from reelmae.pipeline.storage.store import Store


@dataclass(frozen=True)
class Selection:
    """Which clips are played. The default plays all clips that repeat no other.

    `where` is a condition on index columns (see where.py), `fraction` a range of the sources' hashes between 0 and 1,
    `keys` a file or URL with one key a line. `duplicates` also plays clips that repeat another (the sharding job marks
    them).
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    where: str | None = None
    fraction: tuple[float, float] | None = None
    keys: str | None = None
    duplicates: bool = False

    def __post_init__(self) -> None:
        if self.where is not None and not self.where.strip():
            raise ConfigError('where is empty; write a condition like "duration > 4", or leave it out')
        if self.fraction is not None and not 0 <= self.fraction[0] < self.fraction[1] <= 1:
            raise ConfigError(
                f"fraction={self.fraction}: two shares of the sources, 0 <= from < to <= 1, like (0, 0.9)"
            )

    def __str__(self) -> str:
        asked = {"where": self.where, "fraction": self.fraction, "keys": self.keys}
        return ", ".join(f"{name}={value!r}" for name, value in asked.items() if value is not None)


class Chooser:
    """A selection, prepared for an index of this schema. Several threads may ask for masks at once.

    `keys_access` reaches the list of keys, if there is one.
    """

    def __init__(self, selection: Selection, schema: pa.Schema, keys_access: Access | None = None) -> None:
        self._where = Where(selection.where, schema) if selection.where else None
        self.columns = self._where.columns if self._where else set()
        self._fraction = selection.fraction
        self._listed = _KeyList(selection.keys, keys_access) if selection.keys else None

    def mask(self, rows: pa.RecordBatch, source_id: np.ndarray, ordinal: np.ndarray) -> np.ndarray | None:
        """bool [N]: which rows are chosen; None = all. `source_id` uint64 and `ordinal` uint16 are their keys."""
        masks = []
        if self._where is not None:
            masks.append(self._where.mask(rows))
        if self._fraction is not None:
            masks.append(in_fraction(source_id, self._fraction))
        if self._listed is not None:
            masks.append(self._listed.mask(source_id, ordinal))
        return np.logical_and.reduce(masks) if masks else None

    def check(self, url: str) -> None:
        """Call it after all rows were seen. InputError where a listed key was not among them."""
        if self._listed is not None:
            self._listed.check(url)


def in_fraction(source_id: np.ndarray, fraction: tuple[float, float]) -> np.ndarray:
    """bool [N]: whether source_id / 2**64 is in [from, to)."""
    low, high = (math.ceil(share * 2.0**64) for share in fraction)  # exact: a float times a power of two
    inside = source_id >= np.uint64(low) if low else np.ones(len(source_id), bool)
    return inside if high == 1 << 64 else inside & (source_id < np.uint64(high))


class _KeyList:
    """The keys of a list, and which of them have been seen."""

    def __init__(self, url: str, access: Access | None) -> None:
        self._url = url
        self._lines = [line for text in _read(url, access).splitlines() if (line := text.strip())]
        if not self._lines:
            raise InputError(f"{url}: holds no key; write one a line")
        parsed = np.empty((len(self._lines), 2), np.uint64)
        for i, line in enumerate(self._lines):
            found = parse_key(line)
            if found is None:
                raise InputError(f"{url}: {line[:60]!r} is not a key; a key is like 0123456789abcdef_0000, one a line")
            parsed[i] = found
        self._sources = np.unique(parsed[:, 0])
        self._keys, self._line_of_key = np.unique(self._numbers(parsed[:, 0], parsed[:, 1])[0], return_index=True)
        self._seen = np.zeros(len(self._keys), bool)

    def _numbers(self, source_id: np.ndarray, ordinal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(an int64 for each key, whether its source is listed)."""
        at = np.minimum(np.searchsorted(self._sources, source_id), len(self._sources) - 1)
        return at * ORDINALS + ordinal.astype(np.int64), self._sources[at] == source_id

    def mask(self, source_id: np.ndarray, ordinal: np.ndarray) -> np.ndarray:
        numbers, known = self._numbers(source_id, ordinal)
        at = np.minimum(np.searchsorted(self._keys, numbers), len(self._keys) - 1)
        found = known & (self._keys[at] == numbers)
        self._seen[at[found]] = True
        return found

    def check(self, url: str) -> None:
        if not self._seen.all():
            missing = self._line_of_key[~self._seen]
            raise InputError(
                f"{self._url}: {self._lines[missing.min()]} is not a clip of {url} ({len(missing)} such keys); "
                "correct the list, or give the dataset that the list was made for"
            )


def keys_access(keys: str | None, url: str, access: Access | None) -> Access | None:
    """How a list of keys is reached, by what reaches the dataset at `url`: as the dataset, where the protocol is the same.

    The options of another protocol mean something else, or nothing; patience and count of retries are the same.
    """
    if access is None or keys is None:
        return access
    (kind, of_keys, _), (protocol, _, _) = keys.partition("://"), url.partition("://")
    return access if of_keys and kind == protocol else replace(access, options={})


def _read(url: str, access: Access | None) -> str:
    folder, slash, name = url.rpartition("/")
    try:
        return read_agreed(Store(folder or slash or ".", access), name).decode("ascii")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as e:
        raise InputError(f"{url}: no such file; keys is a file or URL with one key a line") from e
    except UnicodeDecodeError as e:
        raise InputError(f"{url}: is not a list of keys; write one a line, like 0123456789abcdef_0000") from e
