"""Where the pictures of an mp4 in memory lie: reads its sample tables (ISO/IEC 14496-12), and nothing else.

Opening a clip with FFmpeg's demuxer costs as much as decoding several frames, since it decodes some itself to find out
what the file holds. The layout of a shard's clip is known: one video track, written by `reelmae shard`, its tables in
front. So the tables are read here, the decoder gets packets straight from the clip's bytes, and a jump to a keyframe is
one look-up. Another layout raises ValueError. No content can make this open another file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

# sample entry → (FFmpeg's decoder, box with the decoder's configuration)
_CODECS = {
    b"avc1": ("h264", b"avcC"),
    b"avc3": ("h264", b"avcC"),
    b"hvc1": ("hevc", b"hvcC"),
    b"hev1": ("hevc", b"hvcC"),
    b"vp08": ("vp8", None),
    b"vp09": ("vp9", None),
    b"av01": ("libdav1d", b"av1C"),
}
_VISUAL_ENTRY = 78  # bytes of a visual sample entry before its own boxes


@dataclass(frozen=True, eq=False)
class Track:
    """A video track of N pictures, in decoding order."""

    codec: str
    """FFmpeg's name of the decoder."""
    extradata: bytes
    """The decoder's configuration."""
    offsets: np.ndarray
    """int64 [N]: where each picture begins in the file."""
    sizes: np.ndarray
    """int64 [N]: bytes of each picture."""
    numbers: np.ndarray
    """int64 [N]: each picture's place in display order."""
    keyframes: np.ndarray
    """int64, ascending: their places in decoding order."""

    def __len__(self) -> int:
        return len(self.sizes)

    def stop_after(self, number: int) -> int:
        """Place in decoding order behind the last picture that is shown no later than this one."""
        return int(np.flatnonzero(self.numbers <= number)[-1]) + 1


def read_track(data: bytes, size: int | None = None) -> Track:
    """The first video track. ValueError where there is none, or its tables do not fit the bytes.

    `data` may be the bytes in front of an mp4 of `size` bytes, as far as its tables end (tables_end).
    """
    try:
        return _read_track(data, len(data) if size is None else size)
    except (struct.error, IndexError, KeyError) as e:
        raise ValueError(f"its mp4 tables are damaged ({type(e).__name__}: {e})") from e


def tables_end(head: bytes) -> int | None:
    """Where the tables of an mp4 end, in bytes; None where these first bytes do not say it (the pictures come first)."""
    at = 0
    while at + 8 <= len(head):
        size, kind = struct.unpack_from(">I4s", head, at)
        if size < 8 or kind == b"mdat":
            return None
        at += size
        if kind == b"moov":
            return at
    return None


def _read_track(data: bytes, whole: int) -> Track:
    moov = next((content for kind, content in _boxes(data) if kind == b"moov"), None)
    if moov is None:
        raise ValueError("is not an mp4 (it has no moov box)")
    for kind, trak in _boxes(moov):
        if kind == b"trak":
            mdia = dict(_boxes(dict(_boxes(trak))[b"mdia"]))
            if bytes(mdia[b"hdlr"][8:12]) == b"vide":
                break
    else:
        raise ValueError("no video stream")
    stbl = dict(_boxes(dict(_boxes(mdia[b"minf"]))[b"stbl"]))
    codec, extradata = _codec(stbl[b"stsd"])
    sizes = _sizes(stbl[b"stsz"])
    offsets = _offsets(stbl, sizes)
    if not len(sizes):
        raise ValueError("holds no picture")
    if (offsets + sizes).max() > whole:
        raise ValueError(f"ends before its last picture ({whole} of {(offsets + sizes).max()} bytes)")
    keyframes = _table(stbl[b"stss"], 1)[:, 0] - 1 if b"stss" in stbl else np.arange(len(sizes))
    return Track(codec, extradata, offsets, sizes, _numbers(stbl, len(sizes)), keyframes)


def _boxes(data: bytes | memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """(kind, content) of the boxes in a row."""
    view, at = memoryview(data), 0
    while at + 8 <= len(view):
        size, kind = struct.unpack_from(">I4s", view, at)
        head = 8
        if size == 1:
            (size,), head = struct.unpack_from(">Q", view, at + 8), 16
        elif size == 0:
            size = len(view) - at
        if size < head or at + size > len(view):
            raise ValueError(f"ends within a box ({kind!r} at byte {at})")
        yield kind, view[at + head : at + size]
        at += size


def _codec(stsd: memoryview) -> tuple[str, bytes]:
    kind, entry = next(_boxes(stsd[8:]))
    if kind not in _CODECS:
        raise ValueError(f"holds {kind!r}, no codec of shards")
    codec, config = _CODECS[kind]
    return codec, bytes(dict(_boxes(entry[_VISUAL_ENTRY:]))[config]) if config else b""


def _table(box: memoryview, columns: int, *, kind: str = ">u4") -> np.ndarray:
    """int64 [N, columns] of a box that holds N and then N rows."""
    (n,) = struct.unpack_from(">I", box, 4)
    width = columns * np.dtype(kind).itemsize
    if 8 + n * width > len(box):
        raise ValueError(f"a table of {n} rows does not fit its box of {len(box)} bytes")
    return np.frombuffer(box, kind, n * columns, 8).reshape(n, columns).astype(np.int64)


def _sizes(stsz: memoryview) -> np.ndarray:
    """int64 [N]: bytes of each picture."""
    (same,) = struct.unpack_from(">I", stsz, 4)
    if same:
        raise ValueError("all its pictures are said to have one size, which no codec of shards gives")
    return _table(stsz[4:], 1)[:, 0]


def _offsets(stbl: dict[bytes, memoryview], sizes: np.ndarray) -> np.ndarray:
    """int64 [N]: where each picture begins; pictures of a chunk follow each other."""
    if b"co64" in stbl:
        chunks = _table(stbl[b"co64"], 1, kind=">u8")[:, 0]
    else:
        chunks = _table(stbl[b"stco"], 1)[:, 0]
    runs = _table(stbl[b"stsc"], 3)  # first chunk, pictures in each, description; valid up to the next row
    lengths = np.diff(np.append(runs[:, 0], len(chunks) + 1))
    if len(runs) == 0 or runs[0, 0] != 1 or (lengths < 0).any():
        raise ValueError("its table of chunks has gaps")
    per_chunk = np.repeat(runs[:, 1], lengths)
    if per_chunk.sum() != len(sizes):
        raise ValueError(f"its chunks hold {per_chunk.sum()} pictures, its table of sizes {len(sizes)}")
    before = np.cumsum(sizes) - sizes
    first = np.cumsum(per_chunk) - per_chunk
    return before + np.repeat(chunks - before[first], per_chunk)


def _numbers(stbl: dict[bytes, memoryview], n: int) -> np.ndarray:
    """int64 [N]: display order, which with B-frames differs from decoding order."""
    if b"ctts" not in stbl:
        return np.arange(n)
    durations = np.repeat(*_table(stbl[b"stts"], 2).T[::-1])
    shifts = np.repeat(*_table(stbl[b"ctts"], 2).T[::-1])
    if not len(durations) == len(shifts) == n:
        raise ValueError("its tables of times do not fit its pictures")
    shown = np.cumsum(durations) - durations + shifts.astype(np.uint32).astype(np.int32)
    return np.argsort(np.argsort(shown, kind="stable"), kind="stable")
