"""Batches of bytes and draws → samples, with DALI: NVDEC on a GPU, or VP8, VP9 and MJPEG on the CPU.

Properties that hold:
- DALI is given everything (bytes, frame numbers, crop boxes) and draws nothing: its pipeline has no state worth
  saving, and can be thrown away and built again;
- a clip is decoded once for all its samples: the decoder gets the sorted union of their frames, each sample
  picks its own from it. Frame numbers are exact, so strides may differ from clip to clip;
- one bad clip fails DALI's whole batch. Then the batch is decoded clip by clip, each failure with a new
  pipeline, and only the bad clip is replaced (by what `on_bad` says);
- a frame number beyond the clip is an error (`pad_mode="none"`): the padding of short clips is in the numbers.

A thread runs the pipeline, so that decoding overlaps with what the consumer computes; fetching runs ahead of it
in a few more. How many frames the decoder went through is not known, so its cost counts none.
"""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types

from reelmae.pipeline.errors import BadClipError
from reelmae.pipeline.loading.draws import frame_indices
from reelmae.pipeline.loading.fetch import fetch
from reelmae.pipeline.loading.tasks import ClipTask, Cost, Decoded, OnBad
from reelmae.pipeline.storage import Store

FETCH_THREADS = 8
GPU_THREADS = 8  # NVDEC is fed by these; an H100 has 7 decoders


class DaliDecoder:
    """A Decoder (see tasks). `shape` is (videos, R, T, H, W, 3); `device` None decodes on the CPU."""

    def __init__(
        self,
        store: Store,
        shape: tuple[int, ...],
        *,
        device: torch.device | None,
        threads: int,
        on_bad: OnBad,
    ) -> None:
        self._store = store
        self._shape = shape
        if device is not None and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self._device = device
        # a stream of its own: waiting for it must not mean waiting for the trainer's work
        self._stream = None if device is None else torch.cuda.Stream(device)
        self._threads = threads if device is None else max(threads, GPU_THREADS)
        self._on_bad = on_bad
        self._pipeline: Pipeline | None = None
        self._fetchers = ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix="reelmae-fetch")
        self._work: queue.Queue[tuple[list[ClipTask], list[Future[bytes]]] | None] = queue.Queue()
        self._done: queue.Queue[Decoded | BaseException] = queue.Queue()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="reelmae-dali", daemon=True)
        self._thread.start()

    def submit(self, tasks: list[ClipTask]) -> None:
        """Queue a batch and start fetching it."""
        self._work.put((list(tasks), [self._fetchers.submit(self._fetch, task) for task in tasks]))

    def collect(self) -> Decoded:
        """Wait for the oldest batch."""
        done = self._done.get()
        if isinstance(done, BaseException):
            self._done.put(done)  # every later call fails alike
            raise done
        if self._device is not None:  # the memory may be used again only after what the consumer queues on it
            done.frames.record_stream(torch.cuda.current_stream(self._device))
        return done

    def close(self) -> None:
        """End the threads once the batch in work is done."""
        if self._closing:
            return
        self._closing = True
        self._work.put(None)
        self._thread.join()
        self._fetchers.shutdown(cancel_futures=True)
        self._pipeline = None

    def _fetch(self, task: ClipTask) -> bytes:
        return fetch(self._store, key=task.key, shard=task.shard, offset=task.offset, size=task.size)

    def _run(self) -> None:
        """The thread."""
        try:
            while (work := self._work.get()) is not None and not self._closing:
                self._done.put(self._batch(*work))
        except BaseException as e:  # noqa: BLE001  raised again in the consumer's thread
            self._done.put(e)

    def _batch(self, tasks: list[ClipTask], fetched: list[Future[bytes]]) -> Decoded:
        started = time.perf_counter()
        data: list[bytes] = []
        for at, future in enumerate(fetched):
            try:
                data.append(future.result())
            except BadClipError as e:
                tasks[at], replaced = self._next_readable(self._on_bad(tasks[at], e))
                data.append(replaced)
        try:
            frames = self._decode(tasks, data)
        except RuntimeError:
            self._pipeline = None  # DALI: "Current pipeline object is no longer valid"
            frames = self._one_by_one(tasks, data)
        size = sum(map(len, data))
        cost = Cost(bytes_read=size, decode_s=time.perf_counter() - started)
        return Decoded(tasks, frames, lambda: None, cost)

    def _next_readable(self, task: ClipTask) -> tuple[ClipTask, bytes]:
        """The task and its bytes, or those of its replacement."""
        while True:
            try:
                return task, self._fetch(task)
            except BadClipError as e:
                task = self._on_bad(task, e)

    def _one_by_one(self, tasks: list[ClipTask], data: list[bytes]) -> torch.Tensor:
        """Decode each clip by itself, replacing those that fail; `tasks` is changed in place."""
        parts = []
        for at in range(len(tasks)):
            while True:
                try:
                    parts.append(self._decode([tasks[at]], [data[at]]))
                    break
                except RuntimeError as e:
                    self._pipeline = None
                    bad = BadClipError(tasks[at].key, f"does not decode: {_first_line(e)}")
                    tasks[at], data[at] = self._next_readable(self._on_bad(tasks[at], bad))
        return torch.cat(parts)

    def _decode(self, tasks: list[ClipTask], data: list[bytes]) -> torch.Tensor:
        """uint8 [V * R, T, H, W, 3] in memory of its own. RuntimeError where one of the clips is bad."""
        _, repeats, n_frames, *picture = self._shape
        if self._pipeline is None:
            self._pipeline = _build(self._shape, self._device, self._threads)
        feed: dict[str, list[np.ndarray]] = {name: [] for name in ("data", "frames")}
        for task, clip in zip(tasks, data, strict=True):
            wanted = np.stack([frame_indices(draw, n_frames, task.frames) for draw in task.draws])
            union, picks = np.unique(wanted, return_inverse=True)
            feed["data"].append(np.frombuffer(clip, np.uint8))
            feed["frames"].append(union.astype(np.int32))
            for r, draw in enumerate(task.draws):
                left, right = draw.left, draw.left + draw.width
                if draw.flip:  # a region that ends left of its start is mirrored
                    left, right = right, left
                feed.setdefault(f"pick{r}", []).append(picks.reshape(wanted.shape)[r].astype(np.int32))
                feed.setdefault(f"start{r}", []).append(np.array([draw.top, left], np.float32))
                feed.setdefault(f"end{r}", []).append(np.array([draw.top + draw.height, right], np.float32))
        for name, samples in feed.items():
            self._pipeline.feed_input(name, samples)
        outputs = self._pipeline.run()
        with torch.cuda.stream(self._stream):  # does nothing where it is None
            frames = torch.empty(
                (len(tasks), repeats, n_frames, *picture), dtype=torch.uint8, device=self._device or "cpu"
            )
            for r, output in enumerate(outputs):
                frames[:, r] = torch.from_dlpack(output.as_tensor())
        if self._stream is not None:  # DALI's buffers are written again by the next run
            self._stream.synchronize()
        return frames.flatten(0, 1)


def _build(shape: tuple[int, ...], device: torch.device | None, threads: int) -> Pipeline:
    """The graph: bytes → wanted frames → per sample: its frames, its region resized, mirrored where asked."""
    videos, repeats, _, size, _, _ = shape
    device_id = None if device is None else device.index
    # depth 1: the thread feeds and runs one batch at a time, and the loader decides how far ahead that is
    pipeline = Pipeline(batch_size=videos, num_threads=threads, device_id=device_id, prefetch_queue_depth=1)
    with pipeline:
        numbers = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
        data = fn.external_source(name="data", dtype=types.UINT8, ndim=1)
        where: dict[str, Any] = {"device": "cpu"} if device is None else {"device": "mixed", "affine": False}
        video = fn.decoders.video(data, frames=numbers, pad_mode="none", **where)
        samples = []
        for r in range(repeats):
            pick = fn.external_source(name=f"pick{r}", dtype=types.INT32, ndim=1)
            start = fn.external_source(name=f"start{r}", dtype=types.FLOAT, ndim=1)
            end = fn.external_source(name=f"end{r}", dtype=types.FLOAT, ndim=1)
            sample = fn.sequence_rearrange(video, new_order=pick)
            samples.append(
                fn.resize(
                    sample,
                    size=[size, size],
                    roi_start=start,
                    roi_end=end,
                    interp_type=types.INTERP_LINEAR,
                    antialias=True,
                )
            )
        pipeline.set_outputs(*samples)
    pipeline.build()
    return pipeline


def _first_line(error: BaseException) -> str:
    """What DALI says first that is not its own position in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("[")]
    return next(
        (line for line in lines if "rror" in line and not line.endswith(":")),
        lines[0] if lines else repr(error),
    )
