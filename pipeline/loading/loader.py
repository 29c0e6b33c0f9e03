"""An endless stream of batches: order → draws → fetch → decode → device, with masks, and a state of a few integers.

The resume contract. A state holds a place (epoch, step), the digest of the index, and what shapes the sequence of
samples (seed, lanes, global batch, repeats, sample, masks, patch). A loader that loads it goes on with the next global
batch. Every draw is the same with any number of workers, any backend, with or without a cache, and for any world size
that divides the lanes and the global batch. Another index, or other settings of the sequence, are refused.

The bad-clip policy is in `quarantine`.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from reelmae.pipeline.devices import resolve_device
from reelmae.pipeline.errors import BadClipError, ConfigError
from reelmae.pipeline.loading.batch import ClipBatch, Floats, batch_ids_decode, batch_ids_keep
from reelmae.pipeline.loading.config import LoaderConfig
from reelmae.pipeline.loading.decode.av_pool import AvPool
from reelmae.pipeline.loading.decode.backends import make_decoder, resolve_backend
from reelmae.pipeline.loading.fetch.clip import accesses_of, stores_to_stop
from reelmae.pipeline.loading.fetch.read_ahead import ReadAhead, Stay, shard_stays
from reelmae.pipeline.loading.fetch.readers import CLIPS_IN_FLIGHT
from reelmae.pipeline.loading.fetch.shard_cache import CacheSettings, ShardCache
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.loading.order import epochs
from reelmae.pipeline.loading.order.draws import draw
from reelmae.pipeline.loading.quarantine import Quarantine, replacement
from reelmae.pipeline.loading.tasks import BatchDecoder, ClipTask, Decoded, clip_task

AHEAD_BYTES = 256 << 20  # of pixels that are prepared ahead to hide the latency of a remote store


@dataclass
class LoaderStats:
    """What one rank's loader has done since it was made."""

    batches: int = 0
    """Batches yielded."""
    videos: int = 0
    """Clips fetched, decoded and yielded."""
    clips: int = 0
    """Samples yielded: videos × repeats."""
    frames_decoded: int = 0
    """Frames that the decoder went through; 0 with DALI, which does not say."""
    frames_used: int = 0
    """Frames of the samples yielded."""
    bytes_read: int = 0
    """Bytes of the clips fetched."""
    # where the time goes: seconds of the thread or process that did the work, summed over clips
    fetch_s: float = 0.0
    """Reading bytes from store or cache, and hashing them."""
    decode_s: float = 0.0
    """Decoding; with DALI also crop and resize."""
    resize_s: float = 0.0
    """Crop, resize and conversion to RGB, which swscale does in one step."""
    copy_s: float = 0.0
    """To the device and to floats, in the consumer's thread."""
    wait_s: float = 0.0
    """Time that the consumer spent in next()."""
    seconds: float = 0.0
    """From the first next() to the end of the last one."""
    worker_restarts: int = 0
    """Workers that died or hung and were replaced."""
    bad: dict[str, str] = field(default_factory=dict)
    """Key of each bad clip → why it is bad."""
    retries: dict[str, int] = field(default_factory=dict)
    """Cause → how often reading from a store was tried again because of it, in all threads and workers."""

    @property
    def wait_share(self) -> float:
        """Share of the time that the consumer waited for data."""
        return self.wait_s / self.seconds if self.seconds else 0.0


class ClipLoader:
    """Batches of one rank, for ever. Iterate it; close it, or use it as a context manager.

    `steps_per_epoch` global batches make an epoch; the last incomplete one is dropped. `backend` is the decoder in use,
    `backend_reason` says why. `ranks_on_node` ranks share the cache; None: all ranks. Raises ConfigError where index,
    config and world do not fit each other; while iterating, TooManyBadClipsError and StorageError.
    """

    def __init__(
        self,
        index: ClipIndex,
        config: LoaderConfig,
        *,
        rank: int = 0,
        world: int = 1,
        ranks_on_node: int | None = None,
    ) -> None:
        self.index = index
        self.config = config
        self.rank, self.world = rank, world
        self.ranks_on_node = ranks_on_node or world
        self._epoch = lru_cache(maxsize=3)(self._make_epoch)  # one is played, one planned, one read ahead
        self.steps_per_epoch = epochs.check_sizes(
            n_clips=len(self._epoch(0)),
            batch_videos=config.batch_videos,
            lanes=config.lanes,
            rank=rank,
            world=world,
        )
        self.device = resolve_device(config.device)
        self.backend, self.backend_reason = resolve_backend(config.backend, index.codec_names, self.device)
        if config.decode != "auto" and self.backend != "av":
            raise ConfigError(
                f"decode={config.decode!r} with backend {self.backend}: DALI decides by itself which frames it skips; "
                "leave decode at auto, or use backend=av"
            )
        self.stats = LoaderStats()
        self._quarantine = Quarantine(
            len(index),
            config.max_bad_fraction,
            file=None if config.quarantine is None else Path(config.quarantine),
            index=index.digest,
        )
        self.stats.bad = self._quarantine.reasons
        self._ahead = batches_ahead(config, all(store.is_local for store in index.stores))
        self._accesses = accesses_of(index.stores)
        self._retries_before = self._count_retries()
        self._next = (0, 0)  # (epoch, step) of the batch that is yielded next
        self._planned = (0, 0)  # of the batch that is submitted next
        self._in_flight: deque[tuple[int, int]] = deque()
        self._decoder: BatchDecoder | None = None
        self._read_ahead: ReadAhead | None = None
        self._floats = Floats(self.device, config.pixel_mean, config.pixel_std)
        self._started: float | None = None

    def __enter__(self) -> ClipLoader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __iter__(self) -> Iterator[ClipBatch]:
        while True:
            yield self._take()

    def close(self) -> None:
        """Stop decoding; end processes and free memory. The place is kept: iterating again goes on from there."""
        for part in (self._decoder, self._read_ahead):
            if part is not None:
                part.close()
        self._decoder = self._read_ahead = None
        self._in_flight.clear()
        self._planned = self._next

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: the place of the next batch, and the settings that must not change."""
        epoch, step = self._next
        return {
            "epoch": epoch,
            "step": step,
            "index": self.index.digest,
            **self.config.sequence_facts(self.world),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. ConfigError where the index or the sequence of samples is another."""
        facts = {"index": self.index.digest, **self.config.sequence_facts(self.world)}
        if state.get("index") != self.index.digest:
            raise ConfigError(
                f"the checkpoint was made on another index: {state.get('index')}, this one is {self.index.digest} "
                f"({self.index}); resume with the dataset, selection and weights it was made on, or start a new run"
            )
        changed = [f"{k}: {state.get(k)!r} → {v!r}" for k, v in facts.items() if state.get(k) != v]
        if changed:
            raise ConfigError(
                "the checkpoint's sequence of samples cannot be continued with other settings "
                f"({'; '.join(changed)}); set them back, or start a new run"
            )
        self.close()
        self._next = self._planned = (int(state["epoch"]), int(state["step"]))

    def _take(self) -> ClipBatch:
        """The next batch; measures how long the consumer waits here."""
        entered = time.perf_counter()
        if self._started is None:
            self._started = entered
        if self._decoder is None:
            self._read_ahead = self._make_read_ahead()  # first, since it may refuse the cache
            self._decoder = self._make_decoder()
        while len(self._in_flight) < self._ahead:
            self._submit()
        decoded = self._decoder.collect()
        place = self._in_flight.popleft()
        try:
            batch = self._batch(decoded, *place)
        finally:
            decoded.release()
        self._submit()  # its slot is free: the decoder stays as many batches ahead
        self._next = self._in_flight[0]
        self._count(decoded)
        now = time.perf_counter()
        self.stats.wait_s += now - entered
        self.stats.seconds = now - self._started
        return batch

    def _submit(self) -> None:
        """Plan the next batch and give it to the decoder."""
        assert self._decoder is not None
        epoch, step = self._planned
        positions = epochs.rank_positions(
            step=step, batch_videos=self.config.batch_videos, rank=self.rank, world=self.world
        )
        played = self._epoch(epoch)
        clips, passes = played.clips_at(positions), played.passes_at(positions)
        if self._read_ahead is not None:
            self._read_ahead.advance(epoch, step)
        self._decoder.submit([self._task(int(c), int(p)) for c, p in zip(clips, passes, strict=True)])
        self._in_flight.append((epoch, step))
        self._planned = (epoch, step + 1) if step + 1 < self.steps_per_epoch else (epoch + 1, 0)

    def _make_epoch(self, epoch: int) -> epochs.Epoch:
        index, config = self.index, self.config
        return epochs.Epoch(index.shard_start, index.parts, seed=config.seed, epoch=epoch, lanes=config.lanes)

    def _task(self, planned: int, epoch: int, attempt: int = 0) -> ClipTask:
        """The work for one place of the order: the planned clip, or the first replacement not known to be bad.

        `epoch` is the pass through the clip's dataset (see order/epochs.py).
        """
        index, clip = self.index, planned
        if attempt:
            rows = index.rows_beside(planned)
            clip = replacement(planned, attempt, rows=rows, seed=self.config.seed, epoch=epoch)
        if clip in self._quarantine.clips:
            self._quarantine.check_attempt(attempt + 1)
            return self._task(planned, epoch, attempt + 1)
        self._quarantine.tried += 1
        facts, seed = index.facts(clip), self.config.seed
        draws = tuple(
            draw(self.config.sample, seed=seed, epoch=epoch, clip=clip, repeat=repeat, **facts)
            for repeat in range(self.config.repeats)
        )
        return clip_task(index, clip, draws, planned=planned, epoch=epoch, attempt=attempt)

    def _on_bad(self, task: ClipTask, bad: BadClipError) -> ClipTask:
        """Quarantine the clip, and return the task that replaces it. Called from the decoder's thread."""
        self._quarantine.add(task.clip, bad)
        return self._task(task.planned, task.epoch, task.attempt)

    def _batch(self, decoded: Decoded, epoch: int, step: int) -> ClipBatch:
        config = self.config
        draws = [d for task in decoded.tasks for d in task.draws]
        clip_B = np.repeat(np.array([task.clip for task in decoded.tasks], dtype=np.int64), config.repeats)
        seeds = [d.mask_seed for d in draws]
        began = time.perf_counter()
        clips_BCTHW = self._floats(decoded.clips_BCTHW)
        self.stats.copy_s += time.perf_counter() - began
        return ClipBatch(
            clips_BCTHW=clips_BCTHW,
            ids_keep_BK=batch_ids_keep(config.mask, seeds, config.grid_THW, self.device),
            ids_decode_BQ=batch_ids_decode(config.decoder_mask, seeds, config.grid_THW, self.device),
            clip_B=clip_B,
            repeat_B=np.tile(np.arange(config.repeats, dtype=np.int64), len(decoded.tasks)),
            label_B=torch.from_numpy(self.index.label_id[clip_B].astype(np.int64)).to(self.device),
            draws=draws,
            epoch=epoch,
            step=step,
        )

    def _cache(self) -> CacheSettings | None:
        if self.config.cache is None or all(store.is_local for store in self.index.stores):
            return None
        return CacheSettings(self.config.cache, int(self.config.cache_gb * 1e9))

    def _make_read_ahead(self) -> ReadAhead | None:
        cache = self._cache()
        if cache is None:
            return None

        def stays(epoch: int) -> list[Stay]:
            return shard_stays(
                self._epoch(epoch).shards_at,
                steps=self.steps_per_epoch,
                batch_videos=self.config.batch_videos,
                rank=self.rank,
                world=self.world,
            )

        return ReadAhead(
            ShardCache(cache),
            replace(self.index, stores=stores_to_stop(self.index.stores)),  # they are stopped when it is closed
            stays,
            steps=self.steps_per_epoch,
            budget_bytes=cache.max_bytes // self.ranks_on_node,
            in_flight=self._ahead + 1,
        )

    def _make_decoder(self) -> BatchDecoder:
        config, sample = self.config, self.config.sample
        return make_decoder(
            self.backend,
            self.index.stores,
            (config.batch_videos, config.repeats, 3, sample.frames, sample.size, sample.size),
            on_bad=self._on_bad,
            workers=config.workers,
            slots=self._ahead + 1,  # one more than are in flight: the next is submitted once the oldest is released
            timeout_s=config.clip_timeout_s,
            policy=config.decode,
            device=self.device,
            pipelines=config.pipelines,
            cache=self._cache(),
        )

    def _count(self, decoded: Decoded) -> None:
        stats, videos = self.stats, len(decoded.tasks)
        stats.batches += 1
        stats.videos += videos
        stats.clips += videos * self.config.repeats
        stats.frames_used += videos * self.config.repeats * self.config.sample.frames
        stats.frames_decoded += decoded.cost.frames_decoded
        stats.bytes_read += decoded.cost.bytes_read
        stats.fetch_s += decoded.cost.fetch_s
        stats.decode_s += decoded.cost.decode_s
        stats.resize_s += decoded.cost.resize_s
        stats.retries = dict(self._count_retries() - self._retries_before)
        if isinstance(self._decoder, AvPool):
            stats.worker_restarts = self._decoder.restarts

    def _count_retries(self) -> Counter[str]:
        """By cause, since the index was opened."""
        return sum((Counter(access.retries.counts()) for access in self._accesses), Counter())


def batches_ahead(config: LoaderConfig, is_local: bool) -> int:
    """How many batches are prepared ahead of the one in use.

    At least `prefetch`. Where a store is remote, as many as hide its latency (CLIPS_IN_FLIGHT clips), if their pixels
    take no more than AHEAD_BYTES.
    """
    if is_local:
        return config.prefetch
    sample = config.sample
    batch_bytes = config.batch_videos * config.repeats * 3 * sample.frames * sample.size**2
    hiding = -(-CLIPS_IN_FLIGHT // config.batch_videos)
    return max(config.prefetch, min(hiding, AHEAD_BYTES // batch_bytes))
