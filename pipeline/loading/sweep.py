"""Every clip of an index once, in its order, with views that no chance decides: for features and evaluation.

    index ── rows in order ── windows spread over each clip ── fetch, decode (as in training) ── pixels_VRCTHW

Training uses an endless, shuffled stream of full batches, in which a bad clip is replaced. A sweep is complete:
- each clip comes exactly once, in the order of the index; the last batch may be incomplete;
- a clip that cannot be read or decoded is left out, and listed in `bad` with the reason. None replaces it;
- views depend on the clip and the policy alone: they are the same in every run, for any number of workers;
- clips are decoded by the training loader's own workers (PyAV): a clip that hangs or kills a worker costs itself only;
- from a remote store, clips that lie side by side in a shard are read by one request: they are sent to one worker
  together, up to eight or 2 MB (av_pool.py).

Legend: V clip (video), R view of it, C channel, T frame, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from reelmae.pipeline.cores import usable_cores
from reelmae.pipeline.errors import BadClipError, ConfigError, DatasetError
from reelmae.pipeline.loading.config import CLIP_TIMEOUT_S
from reelmae.pipeline.loading.decode.backends import make_decoder
from reelmae.pipeline.loading.fetch.readers import CLIPS_IN_FLIGHT
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.loading.order.draws import Draw, SamplePolicy
from reelmae.pipeline.loading.tasks import BatchDecoder, ClipTask, Decoded, clip_task

CLIPS_AHEAD = 2  # for each worker: the one in work, and one whose bytes are fetched meanwhile
AHEAD_BYTES = 256 << 20  # of pixels: where a store is remote, more clips are in flight, to hide its latency


def view_draws(
    sample: SamplePolicy, views: int, *, frames: int, fps: float, height: int, width: int
) -> tuple[Draw, ...]:
    """Where the views of a clip lie; `frames`, `fps`, `height`, `width` are the stored clip's.

    Only frames, size and stride (or fps) of `sample` matter: crops are the largest square at the middle, and nothing is
    flipped. One view is the window at the middle. Several are spread evenly from the first window that fits to the
    last, both included. A clip with fewer different windows gives some of them twice; one shorter than a window begins
    at 0. Example: 16 frames, stride 4, a clip of 301 frames: 240 is the last start, 3 views begin at 0, 120, 240.
    """
    stride = sample.stride_for(fps)
    last = max(0, frames - 1 - (sample.frames - 1) * stride)
    starts = [last // 2] if views == 1 else [view * last // (views - 1) for view in range(views)]
    side = min(height, width) // 2 * 2  # boxes lie on even pixels
    top, left = (height - side) // 4 * 2, (width - side) // 4 * 2
    return tuple(Draw(start, stride, top, left, side, side, False, 0) for start in starts)


@dataclass(frozen=True, eq=False)
class SweepBatch:
    """Some clips with all their views. The pixels are valid until the next batch: their memory is used again."""

    pixels_VRCTHW: np.ndarray
    """uint8, RGB."""
    clip_V: np.ndarray
    """int64, rows of the index."""
    stop: int
    """All rows of the index before this one have come, or are bad."""


class ClipSweep:
    """One pass over an index, or over some of its rows after others (`batches`). Close it, or use it as a context manager.

    `workers` processes decode (None: one per core, 0: in the caller's thread), `batch_videos` clips at a time.
    `bad` maps key to reason; it grows while the sweep is iterated. Raises ConfigError for a setting out of range; while
    iterating StorageError where the storage fails, DatasetError where no clip can be decoded.
    """

    def __init__(
        self,
        index: ClipIndex,
        sample: SamplePolicy,
        *,
        views: int = 1,
        batch_videos: int = 8,
        workers: int | None = None,
    ) -> None:
        for name, value, least in (("views", views, 1), ("batch_videos", batch_videos, 1), ("workers", workers, 0)):
            if value is not None and value < least:
                raise ConfigError(f"{name}={value}: must be at least {least}")
        self.index, self.sample, self.views = index, sample, views
        self.bad: dict[str, str] = {}
        self._bad_rows: set[int] = set()
        self._good: int | None = None  # a row that can be decoded
        self._batch_videos = batch_videos
        workers = min(usable_cores() if workers is None else workers, len(index))
        # batches in flight: enough to keep the workers busy, and the one that the caller uses
        self._ahead = 1 + max(1, -(-CLIPS_AHEAD * workers // batch_videos))
        if not all(store.is_local for store in index.stores):
            batch_bytes = batch_videos * views * 3 * sample.frames * sample.size**2
            self._ahead = max(self._ahead, min(1 + -(-CLIPS_IN_FLIGHT // batch_videos), AHEAD_BYTES // batch_bytes))
        self._decoder: BatchDecoder = self._make_decoder(batch_videos, workers)

    def __enter__(self) -> ClipSweep:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop decoding; end processes and free memory."""
        self._decoder.close()

    def __iter__(self) -> Iterator[SweepBatch]:
        return self.batches(range(len(self.index)))

    def batches(self, rows: range) -> Iterator[SweepBatch]:
        """The batches of these rows of the index. Take all of them before you ask for other rows.

        They are those of the whole sweep where the rows begin at a multiple of `batch_videos`, and end at one or at the
        end of the index.
        """
        size = self._batch_videos
        cut = [range(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size)]
        for some in cut[: self._ahead]:
            self._submit(some)
        for at in range(len(cut)):
            decoded = self._decoder.collect()
            try:
                batch = self._batch(decoded)
                if len(batch.clip_V):
                    yield batch
            finally:
                decoded.release()
            if at + self._ahead < len(cut):
                self._submit(cut[at + self._ahead])

    def _batch(self, decoded: Decoded) -> SweepBatch:
        """The batch's good clips, without those that were decoded in place of bad ones."""
        tasks = decoded.tasks
        wanted = [at for at, task in enumerate(tasks) if task.clip == task.planned]
        shape = (-1, self.views, *decoded.clips_BCTHW.shape[1:])
        pixels_VRCTHW = decoded.clips_BCTHW.reshape(shape)[: len(tasks)]  # the last batch may be incomplete
        if len(wanted) < len(tasks):
            pixels_VRCTHW = pixels_VRCTHW[wanted]
        clip_V = np.array([tasks[at].clip for at in wanted], np.int64)
        if wanted:
            self._good = int(clip_V[-1])
        return SweepBatch(pixels_VRCTHW, clip_V, tasks[-1].planned + 1)

    def _submit(self, rows: range) -> None:
        self._decoder.submit([self._task(row, row) for row in rows])

    def _task(self, row: int, planned: int) -> ClipTask:
        draws = view_draws(self.sample, self.views, **self.index.facts(row))
        return clip_task(self.index, row, draws, planned=planned)

    def _on_bad(self, task: ClipTask, bad: BadClipError) -> ClipTask:
        """Note it. A decoder needs a clip for each place of a batch, so another is decoded there and ignored."""
        self._bad_rows.add(task.clip)
        if task.clip == task.planned:
            self.bad[bad.key] = bad.reason
        after = ((task.planned + step) % len(self.index) for step in range(1, len(self.index)))
        row = next((row for row in (self._good, *after) if row is not None and row not in self._bad_rows), None)
        if row is None:
            raise DatasetError(
                f"not one of {len(self.index)} clips can be decoded; the last: {bad}; "
                "run reelmae verify --deep on the dataset"
            )
        return self._task(row, task.planned)

    def _make_decoder(self, batch_videos: int, workers: int) -> BatchDecoder:
        sample = self.sample
        return make_decoder(
            "av",
            self.index.stores,
            (batch_videos, self.views, 3, sample.frames, sample.size, sample.size),
            on_bad=self._on_bad,
            workers=workers,
            slots=self._ahead,
            timeout_s=CLIP_TIMEOUT_S,
        )
