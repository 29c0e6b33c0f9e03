"""Keys and hashes of clips as numbers: `0123456789abcdef_0042` is (0x0123456789abcdef, 42), ten bytes instead of 61.

The first number is the source's hash, the second the clip's place within the source (see schema.py).
"""

from __future__ import annotations

import binascii
import re

import numpy as np
import pyarrow as pa

ORDINALS = 10_000  # keys have four digits
_HEX, _KEY = 16, 21  # letters of a hash's first half, of a key
_PARTS = re.compile(r"([0-9a-f]{16})_([0-9]{4})")


def key_text(source_id: int, ordinal: int) -> str:
    """The key of these numbers."""
    return f"{source_id:016x}_{ordinal:04d}"


def parse_key(text: str) -> tuple[int, int] | None:
    """The numbers of a key; None where the text is not a key."""
    parts = _PARTS.fullmatch(text)
    return (int(parts[1], 16), int(parts[2])) if parts else None


def parse_keys(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """(uint64 [N], uint16 [N]) of a column of keys; ValueError naming the first that is not a key."""
    letters = _letters(column, _KEY)
    if letters is not None:
        digits = letters[:, _HEX + 1 :] - np.uint8(ord("0"))
        source_id = _numbers(letters)
        if source_id is not None and (letters[:, _HEX] == ord("_")).all() and (digits < 10).all():
            return source_id, digits @ np.array([1000, 100, 10, 1], np.uint16)
    wrong = next((k for k in column.to_pylist() if k is None or parse_key(k) is None), None)
    raise ValueError(f"{wrong!r} is not a key")


def parse_hashes(column: pa.Array) -> np.ndarray:
    """uint64 [N]: the first 8 bytes of hashes written as hex, big endian; ValueError naming the first wrong one."""
    letters = _letters(column, 64)
    numbers = None if letters is None else _numbers(letters)
    if numbers is None:
        wrong = next((h for h in column.to_pylist() if not re.fullmatch("[0-9a-fA-F]{64}", h or "")), None)
        raise ValueError(f"{wrong!r} is not a sha256")
    return numbers


def _letters(column: pa.Array, width: int) -> np.ndarray | None:
    """uint8 [N, width] of texts that all have this length, else None."""
    texts = column if pa.types.is_string(column.type) else column.cast(pa.string())
    n = len(texts)
    if not n:
        return np.empty((0, width), np.uint8)
    _, ends, data = texts.buffers()
    at = np.frombuffer(ends, np.int32)[texts.offset : texts.offset + n + 1]
    if texts.null_count or (np.diff(at) != width).any():
        return None
    return np.frombuffer(data, np.uint8)[at[0] : at[-1]].reshape(n, width)


def _numbers(letters: np.ndarray) -> np.ndarray | None:
    """uint64 [N] of the first 16 hex digits; None where a letter is not a hex digit."""
    try:
        # one item a row: numpy copies that several times as fast as single letters
        halves = np.ndarray(len(letters), f"V{_HEX}", letters, strides=letters.strides[:1])
        raw = binascii.unhexlify(np.ascontiguousarray(halves).data)
    except binascii.Error:
        return None
    return np.frombuffer(raw, ">u8").astype(np.uint64)
