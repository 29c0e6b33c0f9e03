"""Two loaders that a user would write without reelmae, for comparison. Both run on one thread, in the caller's process.

(a) `mae_st`, as the published MAE-ST code loads: a map-style dataset. It reads a video's bytes, decodes ALL its frames with
    PyAV, converts them to RGB, takes R samples, normalises them to float on the CPU, then crops and resizes tensors.
(b) `over_webdataset`: torch's DataLoader over webdataset. It decodes only the frames of a clip's R samples, with
    torchcodec (one call for all samples) or with PyAV (one seek per sample), crops and resizes them as bytes with torch's
    own kernel, and normalises to float last.

Properties that hold: a loader yields every clip of the index once per epoch, for ever, with R samples of each, as float32
[B, 3, T, S, S] with reelmae's normalisation. The draws (start, crop, flip) are those of reelmae for the same seed, epoch
and clip, so all loaders do the same work. Decoded frames are counted, except by torchcodec, which does not report them.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import av
import numpy as np
import torch
from torch.nn.functional import interpolate

from reelmae.pipeline.errors import ConfigError
from reelmae.pipeline.loading.config import PIXEL_MEAN, PIXEL_STD
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.loading.order.draws import Draw, SamplePolicy, draw, frame_indices

Seeking = Literal["torchcodec", "pyav"]
_SHUFFLE = 100  # clips in webdataset's shuffle buffer


@dataclass(frozen=True)
class Wanted:
    """What a loader must yield: batches of `batch_videos` × `repeats` samples. An epoch's last batch may be smaller."""

    repeats: int
    sample: SamplePolicy
    batch_videos: int
    seed: int = 0


@dataclass
class Batch:
    """`keys` of V videos, their V * R samples video by video, and the frames decoded for them if known."""

    keys: list[str]
    clips_BCTHW: torch.Tensor
    frames_decoded: int | None


@dataclass
class _Video:
    key: str
    clips_R: list[torch.Tensor]  # float32 [C, T, S, S] each; copied once, into the batch
    frames_decoded: int | None


def has_torchcodec() -> tuple[bool, str]:
    """Whether torchcodec can be used here, and why (not)."""
    if importlib.util.find_spec("torchcodec") is None:
        return False, "torchcodec is not installed; install reelmae[bench]"
    try:
        importlib.import_module("torchcodec.decoders")
    except (ImportError, OSError, RuntimeError) as e:
        first = (str(e).strip() or repr(e)).splitlines()[0]
        return False, f"torchcodec does not load; usually FFmpeg's shared libraries are missing: {first}"
    return True, "torchcodec is installed and finds FFmpeg's shared libraries"


def versions() -> dict[str, str]:
    """Versions of what only the baselines use, if installed. torchcodec uses the system's FFmpeg, not PyAV's."""
    found = {}
    if has_torchcodec()[0]:
        found["torchcodec_ffmpeg"] = str(importlib.import_module("torchcodec").ffmpeg_major_version)
    for name in ("webdataset", "torchcodec"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def mae_st(index: ClipIndex, wanted: Wanted) -> Generator[Batch]:
    """Loader (a) over the clips of `index`."""
    dataset = _DecodeAll(index, wanted)
    shuffled = torch.utils.data.RandomSampler(dataset, generator=torch.Generator().manual_seed(wanted.seed))
    loader: Iterable[list[_Video]] = torch.utils.data.DataLoader(
        dataset, batch_size=wanted.batch_videos, sampler=shuffled, collate_fn=list
    )
    while True:
        for videos in loader:
            yield _batch(videos)
        dataset.epoch += 1


def over_webdataset(index: ClipIndex, wanted: Wanted, seeking: Seeking) -> Generator[Batch]:
    """Loader (b) over the clips of `index`. Raises ConfigError if its store is not local or webdataset is not installed."""
    if not index.store.is_local:
        raise ConfigError(f"{index.store.url()}: the webdataset baseline reads local shards; copy them to a folder")
    try:
        import webdataset
    except ImportError as e:
        raise ConfigError(f"needs webdataset ({e}); install reelmae[bench]") from e
    rows = {index.key(clip): clip for clip in range(len(index))}
    shards = [str(index.store.local_path(name)) for name in sorted({index.shard(c) for c in rows.values()})]
    samples = _torchcodec_samples if seeking == "torchcodec" else _pyav_samples
    epoch = 0

    def decode(sample: tuple[str, bytes]) -> _Video:
        key, data = sample
        draws = _draws(index, rows[key], wanted, epoch)
        found, decoded = samples(data, draws, wanted.sample.frames)
        clips = [_resize_as_bytes(f, d, wanted.sample.size) for f, d in zip(found, draws, strict=True)]
        return _Video(key, clips, decoded)

    dataset = (
        webdataset.WebDataset(shards, shardshuffle=len(shards), seed=wanted.seed, empty_check=False)
        .to_tuple("__key__", "mp4")
        .select(lambda sample: sample[0] in rows)  # leave out what the index leaves out, such as duplicates
        .shuffle(_SHUFFLE, seed=wanted.seed)
        .map(decode)
    )
    loader: Iterable[list[_Video]] = torch.utils.data.DataLoader(
        dataset, batch_size=wanted.batch_videos, collate_fn=list
    )
    while True:
        for videos in loader:
            yield _batch(videos)
        epoch += 1


def _batch(videos: Sequence[_Video]) -> Batch:
    counts = [v.frames_decoded for v in videos]
    known = [n for n in counts if n is not None]
    clips_BCTHW = torch.stack([clip for v in videos for clip in v.clips_R])
    return Batch([v.key for v in videos], clips_BCTHW, sum(known) if len(known) == len(counts) else None)


def _draws(index: ClipIndex, clip: int, wanted: Wanted, epoch: int) -> list[Draw]:
    return [
        draw(
            wanted.sample,
            seed=wanted.seed,
            epoch=epoch,
            clip=clip,
            repeat=repeat,
            **index.facts(clip),
        )
        for repeat in range(wanted.repeats)
    ]


class _DecodeAll(torch.utils.data.Dataset[_Video]):
    """Loader (a)'s dataset: row → the video's samples."""

    def __init__(self, index: ClipIndex, wanted: Wanted) -> None:
        self.index, self.wanted, self.epoch = index, wanted, 0

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, clip: int) -> _Video:
        index, sample = self.index, self.wanted.sample
        data = index.store.read_range(index.shard(clip), int(index.offset[clip]), int(index.size[clip]))
        with av.open(io.BytesIO(data)) as container:
            container.streams.video[0].codec_context.thread_count = 1
            pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        frames_NHWC = torch.from_numpy(np.stack(pictures))
        clips = []
        for d in _draws(index, clip, self.wanted, self.epoch):
            taken = torch.from_numpy(frame_indices(d, sample.frames, len(pictures)))
            clips.append(_resize_as_floats(frames_NHWC[taken], d, sample.size))
        return _Video(index.key(clip), clips, len(pictures))


def _resize_as_floats(frames_THWC: torch.Tensor, d: Draw, size: int) -> torch.Tensor:
    """float32 [C, T, S, S]: normalised first, then cropped, resized (no antialiasing) and flipped."""
    normalised = (frames_THWC.float() / 255 - PIXEL_MEAN[0]) / PIXEL_STD[0]
    cropped = normalised.permute(3, 0, 1, 2)[..., d.top : d.top + d.height, d.left : d.left + d.width]
    resized_CTHW = interpolate(cropped, size=(size, size), mode="bilinear", align_corners=False)
    return resized_CTHW.flip(-1) if d.flip else resized_CTHW


def _resize_as_bytes(frames_TCHW: torch.Tensor, d: Draw, size: int) -> torch.Tensor:
    """float32 [C, T, S, S]: cropped, resized (antialiased) and flipped as uint8, normalised last and in place."""
    cropped = frames_TCHW[..., d.top : d.top + d.height, d.left : d.left + d.width]
    resized = interpolate(cropped, size=(size, size), mode="bilinear", align_corners=False, antialias=True)
    flipped_CTHW = (resized.flip(-1) if d.flip else resized).permute(1, 0, 2, 3).contiguous()
    return flipped_CTHW.float().div_(255).sub_(PIXEL_MEAN[0]).div_(PIXEL_STD[0])


def _torchcodec_samples(data: bytes, draws: list[Draw], frames: int) -> tuple[Any, int | None]:
    """uint8 [R, T, C, H, W]. All samples in one call, which sorts the frames and decodes none of them twice."""
    decoders = importlib.import_module("torchcodec.decoders")
    # `approximate` trusts the container's header and saves a scan of the file: right for clips of constant rate
    decoder = decoders.VideoDecoder(data, num_ffmpeg_threads=1, seek_mode="approximate")
    there = decoder.metadata.num_frames
    wanted = np.concatenate([frame_indices(d, frames, there) for d in draws])
    found = decoder.get_frames_at(wanted.tolist()).data
    return found.unflatten(0, (len(draws), frames)), None


def _pyav_samples(data: bytes, draws: list[Draw], frames: int) -> tuple[Any, int | None]:
    """R of uint8 [T, C, H, W]: each sample seeks to the keyframe before it and decodes up to its last frame."""
    clips, decoded = [], 0
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        rate, tick = float(stream.average_rate), float(stream.time_base)
        for d in draws:
            wanted = frame_indices(d, frames, stream.frames)
            container.seek(round(wanted[0] / rate / tick), stream=stream)
            pictures: dict[int, np.ndarray] = {}
            for frame in container.decode(stream):
                decoded += 1
                number = round(frame.time * rate)
                if number in wanted:
                    pictures[number] = frame.to_ndarray(format="rgb24")
                if number >= wanted[-1]:
                    break
            clips.append(torch.from_numpy(np.stack([pictures[n] for n in wanted.tolist()])).permute(0, 3, 1, 2))
    return clips, decoded


LOADERS: dict[str, Callable[[ClipIndex, Wanted], Generator[Batch]]] = {
    "mae_st": mae_st,
    "webdataset_torchcodec": lambda index, wanted: over_webdataset(index, wanted, "torchcodec"),
    "webdataset_pyav": lambda index, wanted: over_webdataset(index, wanted, "pyav"),
}
