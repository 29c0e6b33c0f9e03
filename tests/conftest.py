"""Fixtures for all tests: generated videos, the shared corpus, a real S3 server, leftovers checked."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from reelmae.pipeline import schema

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests/servers"))  # so that tests can import these modules by their names too

from ceph_server import CephServer  # noqa: E402
from fault_proxy import FaultProxy, Faults  # noqa: E402
from s3_servers import S3Server, WeedServer, put_environment, restore_environment  # noqa: E402

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # loopback only; Ray reads it once, when it is imported
os.environ.pop("RAY_ADDRESS", None)  # tests kill workers: never those of a real cluster


def pictures(n: int, width: int, height: int, seed: int = 0) -> Iterator[np.ndarray]:
    """`n` RGB pictures uint8 [H, W, 3]: a smooth texture panning under a moving square."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    a, b, c = rng.uniform(0.05, 0.2, 3)
    for t in range(n):
        base = 128 + 60 * np.sin(a * (x + 2 * t)) * np.cos(b * y)
        picture = np.stack([base, 128 + 50 * np.sin(c * (x + y - t)), 255 - base], axis=-1)
        at = (3 * t) % max(1, width - 12)
        picture[height // 4 : height // 4 + 12, at : at + 12] = (230, 40, 40)
        yield picture.clip(0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Video:
    """What to generate; `rotation` in degrees is written into the display matrix."""

    frames: int = 20
    width: int = 96
    height: int = 64
    fps: Fraction | int = 25
    codec: str = "libx264"
    pix_fmt: str = "yuv420p"
    rotation: int = 0
    sar: Fraction | None = None
    audio: bool = False
    seed: int = 0
    times: tuple[int, ...] | None = None  # of the frames, in 1/fps; None = 0, 1, 2, …
    options: tuple[tuple[str, str], ...] = (("preset", "ultrafast"),)


def write_video(path: Path, video: Video) -> Path:
    """Encode a generated video; container by the path's extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        options = dict(video.options) if video.codec.startswith("libx26") else {}
        stream = container.add_stream(video.codec, rate=video.fps, options=options)
        stream.width, stream.height, stream.pix_fmt = video.width, video.height, video.pix_fmt
        if video.sar is not None:
            stream.codec_context.sample_aspect_ratio = video.sar
        if video.rotation:
            stream.set_display_rotation(video.rotation)
        sound = container.add_stream("aac", rate=16000, layout="mono") if video.audio else None
        stream.codec_context.time_base = 1 / Fraction(video.fps)
        for i, picture in enumerate(pictures(video.frames, video.width, video.height, video.seed)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=video.pix_fmt)
            frame.pts = video.times[i] if video.times else i
            frame.time_base = 1 / Fraction(video.fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            tone = np.sin(np.arange(16000, dtype=np.float32) / 20)[None]
            audio = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
            audio.rate = 16000
            container.mux(sound.encode(audio))
            container.mux(sound.encode(None))
    return path


@pytest.fixture(scope="session")
def make_video() -> Callable[..., Path]:
    """make_video(path, frames=…, width=…, …) → path"""

    def make(path: Path, **values: object) -> Path:
        return write_video(path, Video(**values))  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def make_pictures() -> Callable[..., Iterator[np.ndarray]]:
    """make_pictures(n, width, height, seed): what make_video encodes."""
    return pictures


@dataclass(frozen=True)
class ReadyClip:
    """An encoded clip of a dataset that is written without the sharding job."""

    source: str
    video: bytes
    frames: int
    fps: float
    height: int
    width: int
    codec: str = "h264"
    label: str | None = None


def _index_row(clip: ReadyClip, key: str, shard: str, offset: int, labels: dict[str, int]) -> dict[str, Any]:
    """A row of index.parquet: the clip is the whole of its source."""
    seconds = clip.frames / clip.fps
    where = {"key": key, "shard": shard, "offset": offset, "size": len(clip.video)}
    span = {"span_start_s": 0.0, "span_end_s": seconds, "wanted_start_s": 0.0, "wanted_end_s": seconds}
    pictures = {"frames": clip.frames, "fps": float(clip.fps), "width": clip.width, "height": clip.height}
    label = {"label": clip.label, "label_id": labels.get(clip.label or "", -1)}
    scores = {"motion": 5.0, "luma": 100.0, "contrast": 50.0, "border": 0.0, "phash": None, "duplicate_of": None}
    of_source = {
        "source": clip.source,
        "source_bytes": len(clip.video),
        "source_container": "mov",
        "source_codec": clip.codec,
        "source_width": clip.width,
        "source_height": clip.height,
        "source_fps": float(clip.fps),
        "source_seconds": seconds,
    }
    made = {"sha256": hashlib.sha256(clip.video).hexdigest(), "codec": clip.codec, "encoder": "x264", "colour": "none"}
    made["blocks"] = schema.clip_blocks(clip.video)
    return {**where, **span, **pictures, **label, **scores, **of_source, **made}


def write_ready_dataset(folder: Path, clips: Sequence[ReadyClip], clips_per_shard: int) -> str:
    """A whole dataset, written with webdataset and pyarrow alone; its path."""
    (folder / "shards").mkdir(parents=True)
    labels = {label: i for i, label in enumerate(sorted({c.label for c in clips if c.label}))}
    rows = []
    for start in range(0, len(clips), clips_per_shard):
        shard, members = (
            schema.shard_name(start // clips_per_shard, 0, schema.FORMAT),
            clips[start : start + clips_per_shard],
        )
        with webdataset.TarWriter(str(folder / shard)) as writer:
            for clip in members:
                key = schema.clip_key(clip.source, 0)
                writer.write({"__key__": key, "mp4": clip.video, "json": {"label": clip.label}})
        with tarfile.open(folder / shard) as tar:
            offsets = {member.name: member.offset_data for member in tar.getmembers()}
        for clip in members:
            key = schema.clip_key(clip.source, 0)
            rows.append(_index_row(clip, key, shard, offsets[f"{key}.mp4"], labels))
    pq.write_table(pa.Table.from_pylist(rows, schema=schema.CLIPS), folder / schema.INDEX)
    (folder / schema.LABELS).write_text(json.dumps(labels))
    (folder / schema.DATASET_JSON).write_text(json.dumps({"format": schema.FORMAT, "clips": len(rows)}))
    return str(folder)


@pytest.fixture(scope="session")
def ready_dataset() -> Callable[..., str]:
    """ready_dataset(folder, [dict(source=…, video=…, frames=…, fps=…, height=…, width=…), …], clips_per_shard) → path"""

    def write(folder: Path, clips: Sequence[dict[str, Any]], clips_per_shard: int) -> str:
        return write_ready_dataset(folder, [ReadyClip(**clip) for clip in clips], clips_per_shard)

    return write


@pytest.fixture(scope="session")
def tiny_bucket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 videos in two labelled folders and 4 files that are none. Read only: copy it to change it."""
    bucket = tmp_path_factory.mktemp("bucket") / "raw"
    kinds = (
        ("a/one.mp4", Video()),
        ("a/two.mkv", Video(seed=1, fps=30, audio=True)),
        ("a/three.avi", Video(seed=2, codec="mpeg4")),
        ("a/four.mov", Video(seed=3, rotation=90)),
        ("a/five.webm", Video(seed=4, codec="libvpx", frames=12)),
        ("a/six.ts", Video(seed=5, frames=30)),
        ("b/seven.mp4", Video(seed=6, width=130, height=98)),
        ("b/eight.mp4", Video(seed=7, fps=Fraction(30000, 1001))),
        ("b/nine.mp4", Video(seed=8, sar=Fraction(4, 3))),
        ("b/ten.mp4", Video(seed=9, frames=75)),
        ("b/$(touch x);`id`&'\"\n.mp4", Video(seed=10)),
        ("b/-rf %03d concat:a|b.mp4", Video(seed=11)),
    )
    for name, video in kinds:
        write_video(bucket / name, video)
    (bucket / "b/empty.mp4").write_bytes(b"")
    (bucket / "b/notes.mp4").write_text("not a video at all\n")
    (bucket / "b/cut.mp4").write_bytes((bucket / "b/ten.mp4").read_bytes()[:900])
    (bucket / ".DS_Store").write_bytes(b"\0\0\0\1Bud1" + bytes(100))
    return bucket


@pytest.fixture(scope="session")
def corpus() -> Path:
    """The shared corpus; skips where there is none."""
    shared = Path(os.environ.get("REELMAE_SHARED", str(ROOT.parent / "shared")))
    folder = Path(os.environ.get("REELMAE_CORPUS", str(shared / "corpus" / "open")))
    if not (folder / "INDEX.csv").exists():
        pytest.skip(f"no corpus at {folder}; set REELMAE_CORPUS")
    return folder


# --- S3 servers


@pytest.fixture(scope="session")
def weed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WeedServer]:
    """SeaweedFS on loopback with a fresh folder, killed at the end. A test that kills it starts it again."""
    server = WeedServer(tmp_path_factory.mktemp("weed"))
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="session")
def s3_server(weed_server: WeedServer) -> Iterator[S3Server]:
    """SeaweedFS, and AWS_* in the environment point at it; the environment is restored."""
    before = put_environment(weed_server.s3.environment())
    try:
        yield weed_server.s3
    finally:
        restore_environment(before)


@pytest.fixture(scope="session")
def ceph_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Ceph's gateway on loopback (some 15 s until it answers), killed at the end; skips where it is not installed."""
    server = CephServer(tmp_path_factory.mktemp("ceph"))
    try:
        server.start()
        yield server.s3
    finally:
        server.kill()


@pytest.fixture(scope="module", params=["seaweedfs", "ceph"])
def any_s3(request: pytest.FixtureRequest) -> S3Server:
    """Each S3 server in turn. Reach it by its `access()` or `environment()`: what AWS_* says here may be another."""
    return request.getfixturevalue("ceph_server") if request.param == "ceph" else request.getfixturevalue("s3_server")


@pytest.fixture
def faulty(s3_server: S3Server) -> Iterator[Callable[..., FaultProxy]]:
    """faulty(*kinds, share=0.1, seed=0, method=None, path="", most=None, server=s3_server) → a running FaultProxy

    Its `s3` is the server as reached through it: `s3.access(patience_s)` for Store, `s3.environment()` for a process.
    """
    proxies = []

    def make(*kinds: str, server: S3Server = s3_server, **which: Any) -> FaultProxy:
        proxies.append(FaultProxy(server, Faults(kinds, **which) if kinds else None))
        return proxies[-1]

    yield make
    for proxy in proxies:
        proxy.close()


# --- a tiny run made by the real parts: raw bucket → shards → three training steps


@pytest.fixture(scope="session")
def raw_bucket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from reelmae.tools.synth.bucket import make_bucket

    folder = tmp_path_factory.mktemp("bucket")
    make_bucket(folder, videos=9, seconds=1.0, seed=3)
    return folder


@pytest.fixture(scope="session")
def tiny_run(raw_bucket: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Laid out as the demo's folder: shards/ and train/."""
    from reelmae.pipeline.ingest.config import ShardConfig
    from reelmae.pipeline.ingest.job import shard
    from reelmae.train.config import load_recipe
    from reelmae.train.pretraining import pretrain

    folder = tmp_path_factory.mktemp("tiny")
    shards, train = folder / "shards", folder / "train"
    shard(str(raw_bucket), str(shards), ShardConfig(short_side=64, labels="folder"))
    small = ("model.depth=1", "model.decoder_depth=1", "loader.batch_videos=4", "loader.workers=0")
    pretrain(load_recipe("demo", [f"data.url={shards}", f"run.out={train}", "run.steps=3", "run.log_every=1", *small]))
    return folder


@pytest.fixture
def run_copy(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of the tiny run's folder, to be changed at will."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))
