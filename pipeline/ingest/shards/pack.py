"""Clips → shards: tar by webdataset, DALI's index, and the rows of the clips.

- A shard is plain USTAR: KEY.json and KEY.mp4 per clip, in that order, with fixed owner, mode and time, so equal
  clips give equal bytes. Clips wait as files until their shard is larger than `shard_bytes`; then a child writes it
  whole (tars/child.py), and the task's next one begins.
- Offsets and sizes in rows and index are read back from the finished tar.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from reelmae.pipeline.ingest.tars.webdataset_child import TarChild
from reelmae.pipeline.schema import IDX_VERSION, clip_blocks, shard_name


@dataclass(frozen=True)
class ClipRow:
    """One row of the index: the columns of schema.CLIPS, and in `extra` the manifest's own columns."""

    key: str
    shard: str
    offset: int
    size: int
    sha256: str
    source: str
    span_start_s: float
    span_end_s: float
    frames: int
    fps: float
    width: int
    height: int
    codec: str
    label: str | None
    label_id: int
    wanted_start_s: float
    wanted_end_s: float
    motion: float
    luma: float
    contrast: float
    border: float
    phash: bytes | None
    duplicate_of: str | None
    source_bytes: int
    source_container: str
    source_codec: str
    source_width: int
    source_height: int
    source_fps: float
    source_seconds: float
    encoder: str
    colour: str
    extra: dict[str, Any]
    blocks: bytes | None = None
    """Not in format 1."""

    def record(self) -> dict[str, Any]:
        """The row as in the index: the manifest's own columns beside ours."""
        values = asdict(self)
        return values | values.pop("extra")


@dataclass(frozen=True)
class PackedShard:
    """A finished shard on local disk: its name in the dataset, its tar and its DALI index."""

    name: str
    tar: Path
    idx: Path


class Packer:
    """Writes the shards of one task into a folder. Use as a context; `shards` and `rows` are complete after it.

    `tars` is started at the first clip: it gets ready while the next one is made.
    """

    def __init__(self, folder: Path, task: int, shard_bytes: int, format: int, tars: TarChild) -> None:
        self._folder = folder
        self._task = task
        self._shard_bytes = shard_bytes
        self._format = format
        self._tars = tars
        self._open_clips: list[tuple[ClipRow, bytes]] = []
        """Row and json of each clip of the open shard."""
        self._open_bytes = 0
        self.shards: list[PackedShard] = []
        self.rows: list[ClipRow] = []

    def add(self, clip: Path, row: ClipRow) -> None:
        """Append one clip, whose file is taken. The packer fills in shard, offset, size, sha256 and blocks of its row.

        StorageFullError, or StorageError where the shard that it fills cannot be written.
        """
        if not self._open_clips and not self.shards:
            self._tars.start()
        data = clip.read_bytes()
        clip.rename(self._clip(row))
        blocks = clip_blocks(data) if self._format > 1 else None
        sha256 = hashlib.sha256(data).hexdigest()
        row = replace(row, shard=self._name(), size=len(data), sha256=sha256, blocks=blocks)
        names = ("codec", "fps", "frames", "height", "label", "label_id", "source", "width")
        facts = {name: getattr(row, name) for name in names}
        facts |= {"span_s": [row.span_start_s, row.span_end_s]}
        if row.extra:
            facts["manifest"] = row.extra
        text = json.dumps(facts, sort_keys=True).encode()
        self._open_clips.append((row, text))
        self._open_bytes += _member_bytes(len(text)) + _member_bytes(len(data))
        if self._open_bytes >= self._shard_bytes:
            self._close()

    def _name(self) -> str:
        return shard_name(self._task, len(self.shards), self._format)

    def _tar(self) -> Path:
        return self._folder / Path(self._name()).name

    def _clip(self, row: ClipRow) -> Path:
        """Where a clip waits for its shard."""
        return self._folder / f"{row.key}.mp4"

    def _close(self) -> None:
        if not self._open_clips:
            return
        tar = self._tar()
        self._tars.write(tar, [(row.key, text, self._clip(row)) for row, text in self._open_clips])
        offsets = member_offsets(tar)
        for row, _ in self._open_clips:
            self.rows.append(replace(row, offset=offsets[f"{row.key}.mp4"][0]))
            self._clip(row).unlink()
        self._open_clips, self._open_bytes = [], 0
        idx = tar.with_suffix(".idx")
        idx.write_text(dali_index(tar), encoding="ascii")
        self.shards.append(PackedShard(self._name(), tar, idx))

    def __enter__(self) -> Packer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._close()


def _member_bytes(size: int) -> int:
    """Bytes of a tar that a member of this size takes: its header, and its data in whole blocks."""
    return tarfile.BLOCKSIZE * (1 + -(-size // tarfile.BLOCKSIZE))


def member_offsets(tar: Path) -> dict[str, tuple[int, int]]:
    """Name → (offset of the data, size), in the order of the tar."""
    with tarfile.open(tar, "r:") as f:
        return {m.name: (m.offset_data, m.size) for m in f}


def dali_index(tar: Path) -> str:
    """DALI's index v1.2: a line `v1.2 N`, then per sample `ext offset size name` for each of its files."""
    samples: dict[str, list[str]] = {}
    for name, (offset, size) in member_offsets(tar).items():
        key, _, extension = name.partition(".")
        samples.setdefault(key, []).append(f"{extension} {offset} {size} {name}")
    return "\n".join([f"{IDX_VERSION} {len(samples)}", *(" ".join(files) for files in samples.values())]) + "\n"
