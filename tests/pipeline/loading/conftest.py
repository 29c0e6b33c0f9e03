"""Small format-1 datasets, written here from numpy pictures with PyAV, webdataset and pyarrow.

Two kinds of clip:
- natural: smooth textures that move, in gamut, so that two decoders' colours can be compared;
- numbered: each frame shows its own number as 12 large black and white squares, readable after any crop-free resize.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from reelmae.pipeline import schema
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.loading.order import epochs
from reelmae.pipeline.storage.store import Store

BT601, LIMITED = 5, 1
GOP = 16
BITS = 12
ENCODERS: dict[str, tuple[str, dict[str, str]]] = {
    "h264": (
        "libx264",
        {
            "crf": "18",
            "preset": "veryfast",
            "x264-params": f"bframes=0:keyint={GOP}:min-keyint={GOP}:scenecut=0",
        },
    ),
    "h264 with B-frames": (
        "libx264",
        {"crf": "18", "x264-params": f"bframes=3:keyint={GOP}:min-keyint={GOP}:scenecut=0:open-gop=0"},
    ),
    "h264 with one keyframe": (
        "libx264",
        {"crf": "18", "preset": "veryfast", "x264-params": "bframes=0:keyint=400:min-keyint=400:scenecut=0"},
    ),
    "hevc": (
        "libx265",
        {
            "crf": "18",
            "preset": "ultrafast",
            "x265-params": f"log-level=none:bframes=0:keyint={GOP}:min-keyint={GOP}:scenecut=0:open-gop=0",
        },
    ),
    "hevc with B-frames": (
        "libx265",
        {
            "crf": "18",
            "preset": "ultrafast",
            "x265-params": f"log-level=none:bframes=3:keyint={GOP}:min-keyint={GOP}:scenecut=0:open-gop=0",
        },
    ),
    "vp9": (
        "libvpx-vp9",
        {
            "crf": "20",
            "b": "0",
            "g": str(GOP),
            "keyint_min": str(GOP),
            "deadline": "realtime",
            "cpu-used": "8",
            "lag-in-frames": "0",
            "auto-alt-ref": "0",
        },
    ),
}


@dataclass(frozen=True)
class ClipSpec:
    """One clip of a test dataset."""

    frames: int = 48
    height: int = 64
    width: int = 96
    fps: float = 30
    codec: str = "h264"
    numbered: bool = False
    grain: float = 0.0  # of noise over natural pictures, in levels: it makes clips large
    label: str | None = None
    seed: int = 0
    video: str | None = None  # a file whose pictures are taken
    # whole by its tables and its hash, but its pictures are overwritten: all of them, or a stretch in the middle
    spoiled: Literal["", "all", "some"] = ""


def real_frames(spec: ClipSpec) -> list[np.ndarray]:
    """The first pictures of a real video, scaled to the clip's size."""
    assert spec.video is not None
    with av.open(spec.video) as container:
        frames = islice(container.decode(video=0), spec.frames)
        return [f.to_ndarray(format="rgb24", width=spec.width, height=spec.height) for f in frames]


def natural_frames(spec: ClipSpec) -> list[np.ndarray]:
    """A sum of waves, panned; uint8 [H, W, 3] each, away from the borders of the colour range."""
    rng = np.random.default_rng(spec.seed)
    margin = 48
    y, x = np.mgrid[0 : spec.height + margin, 0 : spec.width + margin]
    texture = np.full((*y.shape, 3), 128.0)
    for _ in range(16):
        fy, fx = rng.uniform(-0.25, 0.25, 2)
        wave = np.sin(fy * y + fx * x + rng.uniform(0, 6.28)) / (1 + 6 * max(abs(fy), abs(fx)))
        texture += 14 * wave[..., None] * (0.7 + 0.3 * rng.uniform(-1, 1, 3))
    frames = []
    for t in range(spec.frames):
        top, left = int(margin / 2 * (1 + np.sin(t / 9 + spec.seed))), (t * 3 // 2 + spec.seed) % margin
        picture = texture[top : top + spec.height, left : left + spec.width]
        if spec.grain:
            picture = picture + rng.normal(0, spec.grain, picture.shape)
        frames.append(np.clip(picture, 30, 220).astype(np.uint8))
    return frames


def numbered_frames(spec: ClipSpec) -> list[np.ndarray]:
    """Frame n shows n in binary, 3 rows of 4 squares, lowest bit first."""
    row = np.arange(spec.height)[:, None] * 3 // spec.height
    column = np.arange(spec.width)[None, :] * 4 // spec.width
    bit = row * 4 + column
    return [
        np.where(((n >> bit) & 1)[..., None], 215, 40).repeat(3, axis=2).astype(np.uint8) for n in range(spec.frames)
    ]


def _read_numbers(clip_THWC: np.ndarray) -> list[int]:
    """The numbers of uncropped frames of a numbered clip."""
    t, h, w, _ = clip_THWC.shape
    green = clip_THWC[..., 1]
    centres = green[:, [h // 6, h // 2, h - h // 6]][:, :, [w // 8, 3 * w // 8, 5 * w // 8, w - w // 8]]
    bits = (centres.reshape(t, BITS) > 128).astype(int)
    return (bits << np.arange(BITS)).sum(axis=1).tolist()


@lru_cache(maxsize=64)
def encode(spec: ClipSpec) -> bytes:
    """The clip as an mp4 with its tables in front."""
    with tempfile.TemporaryDirectory() as folder:  # moving the tables to the front takes a real file
        path = Path(folder, "clip.mp4")
        _write(path, spec)
        data = bytearray(path.read_bytes())
    if spec.spoiled:
        start = data.index(b"mdat") + 4
        stop = start + int.from_bytes(data[start - 8 : start - 4]) - 8
        if spec.spoiled == "some":
            start, stop = (start + stop) // 2, (start + stop) // 2 + 300
        data[start:stop] = b"\xa5" * (stop - start)
    return bytes(data)


def _write(path: Path, spec: ClipSpec) -> None:
    name, options = ENCODERS[spec.codec]
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream(name, rate=round(spec.fps), options=options)
        stream.width, stream.height, stream.pix_fmt = spec.width, spec.height, "yuv420p"
        context = stream.codec_context
        context.thread_count = 1
        context.colorspace, context.color_range = BT601, LIMITED
        kind = real_frames if spec.video else numbered_frames if spec.numbered else natural_frames
        for picture in kind(spec):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(
                stream.encode(frame.reformat(format="yuv420p", dst_colorspace=BT601, dst_color_range=LIMITED))
            )
        container.mux(stream.encode())


def write_dataset(write: Callable[..., str], folder: Path, specs: Sequence[ClipSpec], clips_per_shard: int) -> str:
    """A dataset of these clips, equal ones encoded once; its path."""
    encoded = {spec: encode(spec) for spec in dict.fromkeys(specs)}
    clips = [
        {
            "source": f"source{i}",
            "video": encoded[spec],
            "frames": spec.frames,
            "fps": spec.fps,
            "height": spec.height,
            "width": spec.width,
            "codec": spec.codec.split()[0],
            "label": spec.label,
        }
        for i, spec in enumerate(specs)
    ]
    return write(folder, clips, clips_per_shard)


@pytest.fixture
def gpu() -> torch.device:
    """A CUDA device; skips where there is none, fails there with REELMAE_REQUIRE_GPU=1."""
    if not torch.cuda.is_available():
        if os.environ.get("REELMAE_REQUIRE_GPU") == "1":
            pytest.fail("REELMAE_REQUIRE_GPU=1, and torch sees no CUDA device")
        pytest.skip("needs an NVIDIA GPU with NVDEC; torch sees no CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="session")
def spec() -> type[ClipSpec]:
    return ClipSpec


@pytest.fixture(scope="session")
def read_numbers() -> Callable[[np.ndarray], list[int]]:
    return _read_numbers


@pytest.fixture
def make_dataset(ready_dataset: Callable[..., str], tmp_path: Path) -> Callable[..., ClipIndex]:
    """make_dataset(specs, clips_per_shard=4) → ClipIndex of a dataset of its own."""
    count = iter(range(1000))

    def make(specs: Sequence[ClipSpec], clips_per_shard: int = 4) -> ClipIndex:
        return ClipIndex.open(write_dataset(ready_dataset, tmp_path / f"dataset{next(count)}", specs, clips_per_shard))

    return make


@pytest.fixture
def make_remote(ready_dataset: Callable[..., str], s3_server: Any, tmp_path: Path) -> Callable[..., str]:
    """make_remote(specs, clips_per_shard=4) → s3:// URL of a dataset of its own."""
    count = iter(range(1000))

    def make(specs: Sequence[ClipSpec], clips_per_shard: int = 4) -> str:
        name = f"{tmp_path.name}-{next(count)}"
        folder = Path(write_dataset(ready_dataset, tmp_path / f"for-{name}", specs, clips_per_shard))
        store = Store(s3_server.url(f"loading/{name}"), s3_server.access())
        for file in folder.rglob("*.*"):
            store.publish(file, file.relative_to(folder).as_posix())
        return store.url()

    return make


class _Ranges(http.server.BaseHTTPRequestHandler):
    """Serves ranges of a store's files, each after `gate` has returned."""

    store: Store
    gate: Callable[[str, int], object]

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(self.store.size(self.path.lstrip("/"))))
        self.end_headers()

    def do_GET(self) -> None:
        asked = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        assert asked is not None
        start, end = int(asked[1]), int(asked[2]) + 1
        type(self).gate(self.path, start)
        data = self.store.read_range(self.path.lstrip("/"), start, end - start)
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/*")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128  # more than 5 connections come at once


@pytest.fixture
def serve_ranges() -> Iterator[Callable[..., str]]:
    """serve_ranges(store, gate) → URL of a web server with a store's files; gate(path, start) may hold a request."""
    servers = []

    def serve(store: Store, gate: Callable[[str, int], object]) -> str:
        handler = type("Handler", (_Ranges,), {"store": store, "gate": staticmethod(gate)})
        server = _Server(("127.0.0.1", 0), handler)
        servers.append((server, threading.Thread(target=server.serve_forever)))
        servers[-1][1].start()
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="session")
def natural_index(ready_dataset: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> ClipIndex:
    """22 clips (8 distinct) in 4 shards, H.264, labelled. Read-only: shared by tests."""
    specs = [ClipSpec(seed=i % 8, frames=48 + i % 8, label="ab"[i % 2]) for i in range(22)]
    return ClipIndex.open(write_dataset(ready_dataset, tmp_path_factory.mktemp("natural"), specs, 6))


@pytest.fixture
def index_of_rows(tmp_path: Path) -> Callable[..., str]:
    """index_of_rows([dict(shard=…, source=…, frames=…, …), …], columns={name: kind}, labels={…}, rows_of_group=…) → URL

    A dataset that has an index and no shards. What a row does not give is made up: `source` N, ordinal 0, shards of 4.
    """
    count = iter(range(1000))

    def write(
        rows: Sequence[dict[str, Any]],
        columns: dict[str, str] | None = None,
        labels: dict[str, int] | None = None,
        rows_of_group: int = 5,
    ) -> str:
        folder = tmp_path / f"rows{next(count)}"
        folder.mkdir()
        whole = [_index_row(i, row) for i, row in enumerate(rows)]
        table = pa.Table.from_pylist(whole, schema=schema.with_columns(schema.CLIPS, columns or {}))
        pq.write_table(table, folder / schema.INDEX, row_group_size=rows_of_group)
        (folder / schema.LABELS).write_text(json.dumps(labels or {}))
        (folder / schema.DATASET_JSON).write_text(json.dumps({"format": schema.FORMAT, "clips": len(rows)}))
        return str(folder)

    return write


def _index_row(i: int, row: dict[str, Any]) -> dict[str, Any]:
    made_up = {f.name: "" if pa.types.is_string(f.type) else 0 for f in schema.CLIPS if not f.nullable}
    made_up |= {
        "shard": schema.shard_name(i // 4, 0, schema.FORMAT),
        "source": f"source{i}",
        "codec": "h264",
        "label_id": -1,
    }
    made_up |= {
        "offset": 512 + 4096 * (i % 4),
        "size": 1000 + i,
        "frames": 60,
        "fps": 30.0,
        "width": 96,
        "height": 64,
    }
    made_up["key"] = schema.clip_key(row.get("source", made_up["source"]), row.get("ordinal", 0))
    made_up["sha256"] = hashlib.sha256(f"{made_up['key']} {i}".encode()).hexdigest()
    return made_up | {name: value for name, value in row.items() if name != "ordinal"}


@pytest.fixture(scope="session")
def epoch_of() -> Callable[..., epochs.Epoch]:
    """epoch_of(shard_of_clip, seed=…, epoch=…, lanes=64) → the Epoch of one dataset."""

    def make(shard_of_clip: np.ndarray, *, seed: int = 0, epoch: int = 0, lanes: int = 64) -> epochs.Epoch:
        sizes = np.bincount(shard_of_clip)
        start = np.concatenate([[0], np.cumsum(sizes)])
        return epochs.Epoch(start, (epochs.ShardRange(0, len(sizes)),), seed=seed, epoch=epoch, lanes=lanes)

    return make


@pytest.fixture(scope="session")
def global_batches() -> Callable[..., np.ndarray]:
    """global_batches(index, seed=…, epoch=…, global_batch=…, lanes=64) → int64 [S, G], all of an epoch."""

    def batches_of(index: ClipIndex, *, seed: int, epoch: int, global_batch: int, lanes: int = 64) -> np.ndarray:
        played = epochs.Epoch(index.shard_start, index.parts, seed=seed, epoch=epoch, lanes=lanes)
        steps = len(played) // global_batch
        return played.clips_at(np.arange(steps * global_batch)).reshape(steps, global_batch)

    return batches_of
