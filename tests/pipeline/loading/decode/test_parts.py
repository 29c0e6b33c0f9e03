"""Of a long clip on a remote store only what its samples need is read, and the pictures are those of the whole clip."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

import av
import numpy as np
import pytest

from reelmae.pipeline import schema
from reelmae.pipeline.errors import BadClipError
from reelmae.pipeline.loading.config import LoaderConfig
from reelmae.pipeline.loading.decode.mp4 import read_track, tables_end
from reelmae.pipeline.loading.decode.parts import needed_of, picture_ranges
from reelmae.pipeline.loading.decode.pyav import AvDecoder
from reelmae.pipeline.loading.fetch.blocks import ClipParts
from reelmae.pipeline.loading.fetch.clip import ClipSource, SourceSettings
from reelmae.pipeline.loading.index.blocks import NO_CHECKS
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.loading.loader import ClipLoader
from reelmae.pipeline.loading.order.draws import SamplePolicy, draw
from reelmae.pipeline.loading.tasks import ClipTask, DecodePolicy, clip_task
from reelmae.pipeline.storage.store import Store

SAMPLE = SamplePolicy(frames=4, size=48, stride=4)
FRAMES = 320
CODECS = ("h264", "h264 with B-frames", "hevc", "hevc with B-frames", "vp9")


def task_of(index: ClipIndex, *starts: int, clip: int = 0, stride: int = 4) -> ClipTask:
    """The work for windows that begin at these frames."""
    drawn = [
        draw(SAMPLE, seed=0, epoch=0, clip=clip, repeat=repeat, **index.facts(clip)) for repeat in range(len(starts))
    ]
    draws = tuple(replace(d, start=start, stride=stride) for d, start in zip(drawn, starts, strict=True))
    return clip_task(index, clip, draws, planned=clip)


def decode(task: ClipTask, data: bytes | ClipParts, policy: DecodePolicy = "auto") -> np.ndarray:
    out = np.zeros((len(task.draws), 3, SAMPLE.frames, SAMPLE.size, SAMPLE.size), np.uint8)
    AvDecoder(frames=SAMPLE.frames, size=SAMPLE.size, policy=policy).decode(task, data, out)
    return out


class Wire(Store):
    """Remembers what is read, and may change it: `spoil` gives the bytes that come for (offset, data)."""

    def __init__(self, url: str, access: Any = None) -> None:
        super().__init__(url, access)
        self.ranges: list[tuple[int, int]] = []
        self.spoil: Callable[[int, bytes], bytes] = lambda offset, data: data

    def _read_piece(self, path: str, offset: int, size: int) -> bytes:
        self.ranges.append((offset, size))
        return self.spoil(offset, bytes(super()._read_piece(path, offset, size)))


@pytest.fixture
def open_large(make_remote: Any, s3_server: Any, spec: type) -> Callable[..., tuple[ClipIndex, ClipSource, Wire]]:
    """open_large(codec) → an index of one clip of over 1 MiB, a source of its bytes, and the wire they come over."""

    def open_(codec: str = "h264", frames: int = FRAMES) -> tuple[ClipIndex, ClipSource, Wire]:
        url = make_remote([spec(frames=frames, height=96, width=128, grain=30, codec=codec)])
        index = ClipIndex.open(url, access=s3_server.access())
        assert index.size[0] >= schema.BLOCKS_FROM
        source = ClipSource(SourceSettings(index.stores))
        wire = Wire(url, s3_server.access())
        source.stores = (wire,)
        return index, source, wire

    return open_


@pytest.mark.parametrize("codec", CODECS)
def test_the_pictures_are_those_of_the_whole_clip(open_large: Any, codec: str) -> None:
    index, source, _ = open_large(codec)
    windows = [(0,), (20,), (37, 41), (300,), (120, 128, 250), (15, 16), (FRAMES - 13,), (FRAMES - 1,)]
    policies: tuple[DecodePolicy, ...] = ("auto", "windows")
    for starts in windows:
        task = task_of(index, *starts)
        whole = source.fetch(task)
        for policy in policies:
            decoder = AvDecoder(frames=SAMPLE.frames, size=SAMPLE.size, policy=policy)
            part = source.fetch_needed(task, decoder.needed)
            assert isinstance(part, ClipParts) and part.n_read < len(whole) / 2, (starts, policy)
            assert np.array_equal(decode(task, part, policy), decode(task, whole, policy)), (starts, policy)
    near = task_of(index, 100, 130)
    part = source.fetch_needed(near, AvDecoder(frames=SAMPLE.frames, size=SAMPLE.size, policy="span").needed)
    assert isinstance(part, ClipParts)
    assert np.array_equal(decode(near, part, "span"), decode(near, source.fetch(near), "span"))


@pytest.mark.parametrize("codec", CODECS)
def test_the_pictures_are_those_that_ffmpeg_gives_for_the_whole_file(open_large: Any, codec: str) -> None:
    """What is read in parts is held against FFmpeg's own demuxer, decoding from the start."""
    index, source, _ = open_large(codec)
    task = task_of(index, 150)
    part = source.fetch_needed(task, AvDecoder(frames=4, size=48).needed)
    assert isinstance(part, ClipParts)
    with av.open(io.BytesIO(source.fetch(task))) as container:
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    box = task.draws[0]
    for t, n in enumerate((150, 154, 158, 162)):
        cut = frames[n][box.top : box.top + box.height, box.left : box.left + box.width].mean(axis=(0, 1))
        assert np.abs(decode(task, part)[0, :, t].mean(axis=(1, 2)) - cut).max() < 3


def test_a_window_costs_its_own_bytes_and_no_hole_is_read(open_large: Any) -> None:
    index, source, wire = open_large()
    task = task_of(index, 193)
    part = source.fetch_needed(task, AvDecoder(frames=4, size=48).needed)
    assert isinstance(part, ClipParts)
    assert part.n_read == sum(size for _, size in wire.ranges) < task.size / 7
    track = read_track(part.runs[0], task.size)
    [(start, stop)] = picture_ranges(track, np.array([[193, 197, 201, 205]]), "auto")
    assert (start, stop) == (int(track.offsets[192]), int(track.offsets[205] + track.sizes[205]))
    for offset, size in wire.ranges[1:]:
        assert start - schema.BLOCK < offset - task.offset and offset - task.offset + size < stop + schema.BLOCK


def test_what_needs_most_of_a_clip_reads_it_whole_and_once(open_large: Any) -> None:
    index, source, wire = open_large()
    everywhere = task_of(index, *range(0, FRAMES, 20))
    data = source.fetch_needed(everywhere, AvDecoder(frames=4, size=48).needed)
    assert isinstance(data, bytes) and wire.ranges == [(everywhere.offset, everywhere.size)]
    wire.ranges.clear()
    span = task_of(index, 0, 230)  # its tables are not asked
    assert isinstance(source.fetch_needed(span, AvDecoder(frames=4, size=48, policy="span").needed), bytes)
    assert wire.ranges == [(span.offset, span.size)]


def test_what_turns_out_to_need_most_of_a_clip_reads_no_byte_twice(open_large: Any) -> None:
    """Its groups of pictures are longer than was guessed: a keyframe at the start alone."""
    index, source, wire = open_large("h264 with one keyframe")
    task = task_of(index, 300)
    data = source.fetch_needed(task, AvDecoder(frames=4, size=48).needed)
    assert isinstance(data, bytes)
    assert sum(size for _, size in wire.ranges) == task.size
    early = task_of(index, 30)
    assert isinstance(source.fetch_needed(early, AvDecoder(frames=4, size=48).needed), ClipParts)


def test_a_wrong_byte_of_a_block_is_read_again_and_is_bad_where_it_stays(open_large: Any) -> None:
    index, source, wire = open_large()
    task, needed = task_of(index, 200), AvDecoder(frames=4, size=48).needed
    whole = decode(task, source.fetch(task))
    wrong = 1

    def flip(offset: int, data: bytes) -> bytes:
        nonlocal wrong
        if offset > task.offset and wrong:
            wrong -= 1
            return data[:100] + bytes([data[100] ^ 1]) + data[101:]
        return data

    wire.spoil = flip
    part = source.fetch_needed(task, needed)
    assert isinstance(part, ClipParts) and np.array_equal(decode(task, part), whole)
    assert wire.access.retries.counts() == {"checksum": 1}
    wrong = 1 << 20  # every answer has the same wrong byte
    with pytest.raises(BadClipError, match=r"its bytes in s3://.* are not those of the index.*is damaged") as bad:
        source.fetch_needed(task, needed)
    assert bad.value.key == task.key
    assert wire.access.retries.counts() == {"checksum": 2}  # two equal wrong answers are enough


def test_a_clip_whose_tables_are_damaged_is_bad_as_if_it_were_read_whole(open_large: Any) -> None:
    index, source, _ = open_large()
    task = task_of(index, 200)
    head = source.fetch(task)[: schema.BLOCK]
    assert needed_of(task, head.replace(b"moov", b"free"), 4, "auto") is None
    assert needed_of(task, head.replace(b"stco", b"xxxx"), 4, "auto") is None
    assert needed_of(task, b"not an mp4 at all" * 10, 4, "auto") is None
    at = head.index(b"stss") + 8
    last = at + 4 * int.from_bytes(head[at : at + 4], "big")
    beyond = head[:last] + (400).to_bytes(4, "big") + head[last + 4 :]  # a keyframe behind the last picture
    assert needed_of(replace(task_of(index, 500), frames=1000), beyond, 4, "auto") is None


def test_long_tables_are_asked_for_first() -> None:
    tables = (20_000).to_bytes(4, "big") + b"moov" + bytes(19_992)
    file = (16).to_bytes(4, "big") + b"ftypisom0000" + tables
    assert tables_end(file[:100]) == tables_end(file) == 20_016
    assert tables_end(file[:16] + (8).to_bytes(4, "big") + b"mdat" + tables) is None
    assert tables_end(b"") is None and tables_end(file[:20]) is None


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_reads_less_and_gives_the_same_batches(
    make_remote: Any, s3_server: Any, spec: type, workers: int
) -> None:
    specs = [spec(frames=FRAMES, height=96, width=128, grain=30, seed=s) for s in range(2)] * 2
    index = ClipIndex.open(make_remote(specs), access=s3_server.access())
    base = {"backend": "av", "device": "cpu", "patch": (2, 8, 8), "batch_videos": 2, "lanes": 1, "repeats": 2}
    config = LoaderConfig(**base, sample=SamplePolicy(frames=4, size=32, stride=2), workers=workers)  # type: ignore[arg-type]
    with ClipLoader(index, config) as parts:
        of_parts = list(islice(parts, 4))
    with ClipLoader(replace(index, blocks=NO_CHECKS), config) as whole:
        of_whole = list(islice(whole, 4))
    for a, b in zip(of_parts, of_whole, strict=True):
        assert np.array_equal(a.clips_BCTHW.numpy(), b.clips_BCTHW.numpy())
    assert not parts.stats.bad
    assert whole.stats.bytes_read == sum(int(index.size[batch.clip_B[::2]].sum()) for batch in of_whole)
    assert parts.stats.bytes_read < whole.stats.bytes_read / 2
