"""Pure: the values of a manifest's own columns: what types they have, and how they are kept for the index."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any

_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,18}")
_DECIMAL = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+([eE][+-]?[0-9]+)?|[eE][+-]?[0-9]+)")
encode_json = json.JSONEncoder(sort_keys=True, ensure_ascii=False, default=str).encode
# the kinds of a column's values; their union gives its type
INT, BIG, FLOAT, BOOL, TEXT = 1, 2, 4, 8, 16


def kind_of_text(text: str) -> int:
    """The kind of a value that is written as text."""
    if _INTEGER.fullmatch(text):
        return kind_of_value(int(text))
    return (_DECIMAL.fullmatch(text) and kind_of_value(float(text))) or TEXT


def kind_of_value(value: Any) -> int:
    """The kind of a JSON value; 0 where it counts as none."""
    if is_empty(value):
        return 0
    if isinstance(value, bool):
        return BOOL
    if isinstance(value, int):
        return INT if abs(value) <= 1 << 53 else BIG if -(1 << 63) <= value < 1 << 63 else TEXT
    return FLOAT if isinstance(value, float) else TEXT


def column_type(seen: int) -> str:
    """int64, double, bool or string, by the union of the kinds of all values."""
    if seen in (INT, BIG, INT | BIG):
        return "int64"
    return "double" if seen in (FLOAT, FLOAT | INT) else "bool" if seen == BOOL else "string"


def is_empty(value: Any) -> bool:
    """Whether a value counts as none: null, empty text, NaN, infinity."""
    return value is None or value == "" or (isinstance(value, float) and not math.isfinite(value))


def to_text(value: Any) -> str:
    """The value as text: JSON, where it is none."""
    return value if isinstance(value, str) else encode_json(value)


def encode_values(values: Iterable[tuple[str, str, Any]]) -> str | None:
    """(name, type, value) of a row's own columns → a JSON object of those that are there; None where none is.

    ValueError where a number is beyond int64.
    """
    found = {}
    for name, kind, value in values:
        if is_empty(value):
            continue
        if kind == "int64":
            value = int(value)
            if not -(1 << 63) <= value < 1 << 63:  # Parquet has uint64 too
                raise ValueError(f"{name} {value} is beyond int64; write that column as text")
        elif kind != "bool":
            value = float(value) if kind == "double" else to_text(value)
        found[name] = value
    return encode_json(found) if found else None
