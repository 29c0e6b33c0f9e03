"""Bytes of a shard, read again before they are called damaged.

No store checks a range: S3 has no checksum of one. So a byte that was changed on its way is noticed here, by the hash
that the index keeps. What is wrong may be wrong in the store, or only in this answer: on a remote store it is read
again, and counted as a retry. It is damage where two reads gave the same wrong bytes. Where each of READS reads gave
others, it is the network or the store that fails, as for whole files (pipeline/storage/checked.py). A file that ends
too early is treated alike, since a cut answer looks like a cut file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from reelmae.pipeline.errors import ShortFileError, StorageError
from reelmae.pipeline.storage.checked import CAUSE, READS, UNSTEADY
from reelmae.pipeline.storage.store import Store


@dataclass(frozen=True)
class Piece:
    """Bytes of a shard."""

    offset: int
    """Where they begin in the shard."""
    size: int
    """How many there are."""
    check: int | None = None
    """The first 8 bytes of their sha256, big endian; None: unknown, only their number is checked."""


@dataclass(frozen=True)
class Damage:
    """Why a piece is not what the index says."""

    reason: str
    """In words, with the shard's URL."""


def check_of(data: bytes | memoryview) -> int:
    """The first 8 bytes of the sha256, big endian: what the index keeps of each clip, and of each block of large ones."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def read_pieces(store: Store, shard: str, pieces: Sequence[Piece]) -> list[bytes | Damage]:
    """The bytes of each piece, or what is wrong with them; several pieces are read by as few requests as possible.

    FileNotFoundError where there is no such shard, StorageError where the storage fails after all retries, or gives
    other wrong bytes each time.
    """
    found: dict[int, bytes] = {}
    wrong: dict[int, list[tuple[object, str]]] = {at: [] for at in range(len(pieces))}  # (what tells them apart, words)
    left = list(wrong)
    for read in range(1 if store.is_local else READS):
        if read:
            store.access.retries.add(CAUSE, len(left))
        for at, data in zip(left, _read(store, shard, [pieces[at] for at in left]), strict=True):
            told = _tell(store, shard, pieces[at], data)
            if told is None:
                assert isinstance(data, bytes)
                found[at] = data
            else:
                wrong[at].append(told)
        left = [at for at in left if at not in found and not _is_settled(wrong[at])]
        if not left:
            break
    if left and not store.is_local:
        raise StorageError(f"{wrong[left[0]][-1][1]} ({UNSTEADY})")
    return [found[at] if at in found else Damage(wrong[at][-1][1]) for at in range(len(pieces))]


def _is_settled(wrong: list[tuple[object, str]]) -> bool:
    """Whether two reads gave the same."""
    return len({told for told, _ in wrong}) < len(wrong)


def _read(store: Store, shard: str, pieces: Sequence[Piece]) -> list[bytes | ShortFileError]:
    """Each piece as it comes."""
    if len(pieces) > 1:
        try:
            return list(store.read_ranges(shard, [(piece.offset, piece.size) for piece in pieces]))
        except ShortFileError:
            pass  # one by one, to know which piece it is
    read: list[bytes | ShortFileError] = []
    for piece in pieces:
        try:
            read.append(store.read_range(shard, piece.offset, piece.size))
        except ShortFileError as e:
            read.append(e)
    return read


def _tell(store: Store, shard: str, piece: Piece, data: bytes | ShortFileError) -> tuple[object, str] | None:
    """What is wrong, as something that tells it from other wrong bytes and in words; None: nothing."""
    if isinstance(data, ShortFileError):
        return str(data), str(data)
    if piece.check is None or (check := check_of(data)) == piece.check:
        return None
    return check, (
        f"its bytes in {store.url(shard)} are not those of the index (sha256 {check:016x}…, "
        f"wanted {piece.check:016x}…); the shard is damaged"
    )
