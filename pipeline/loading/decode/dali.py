"""Batches of bytes and draws → samples, with DALI: NVDEC on a GPU, or VP8, VP9 and MJPEG on the CPU.

Properties that hold:
- DALI gets bytes, frame numbers and crop boxes, and draws nothing itself: its pipeline has no state worth saving, and
  can be thrown away and built again;
- a clip is decoded once for all its samples: the decoder gets the sorted union of their frames, and each sample picks
  its own. Frame numbers are exact, so strides may differ from clip to clip;
- one bad clip makes DALI's whole batch fail. Then the batch is decoded clip by clip, with a new pipeline after each
  failure, and only the bad clip is replaced (`on_bad` names the task that replaces it);
- a frame number beyond the clip is an error (`pad_mode="none"`): short clips are padded by repeating frame numbers;
- batches come out in the order in which they went in, whichever of several pipelines made them.

Each pipeline runs in its own thread, on its own stream, so that decoding overlaps with what the consumer computes. More
threads fetch ahead of it. DALI does not say how many frames it decoded, so `frames_decoded` of its cost is 0; crop and
resize are part of its `decode_s`.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types

from reelmae.pipeline.errors import BadClipError
from reelmae.pipeline.loading.fetch.clip import ClipSource, SourceSettings
from reelmae.pipeline.loading.fetch.readers import CLIPS_IN_FLIGHT, Readers
from reelmae.pipeline.loading.order.draws import frame_indices
from reelmae.pipeline.loading.tasks import ClipTask, Cost, Decoded, OnBad

FETCH_LOCAL, FETCH_REMOTE = 8, CLIPS_IN_FLIGHT  # threads
GPU_THREADS = 8  # NVDEC is fed by these; an H100 has 7 decoders

_Fetched = Future[tuple[bytes, float]]  # the bytes, and the seconds it took


class DaliDecoder:
    """A BatchDecoder (see tasks). `shape` is (videos, R, 3, T, H, W); `device` None decodes on the CPU."""

    def __init__(
        self,
        source: SourceSettings,
        shape: tuple[int, ...],
        *,
        device: torch.device | None,
        threads: int,
        pipelines: int,
        on_bad: OnBad,
    ) -> None:
        self._source = ClipSource(source)
        is_local = all(store.is_local for store in source.stores)
        self._fetchers = Readers(FETCH_LOCAL if is_local else FETCH_REMOTE, "reelmae-fetch")
        if device is not None and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self._device = device
        self._on_bad = on_bad
        self._work: queue.SimpleQueue[tuple[list[ClipTask], list[_Fetched], Future[Decoded]] | None] = (
            queue.SimpleQueue()
        )
        self._order: deque[Future[Decoded]] = deque()
        self._closing = False
        threads = threads if device is None else max(threads, GPU_THREADS)
        each = max(1, threads // pipelines)
        self._threads = [
            threading.Thread(
                target=self._run, args=(_Graph(shape, device, each),), name=f"reelmae-dali-{i}", daemon=True
            )
            for i in range(pipelines)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, tasks: list[ClipTask]) -> None:
        """Queue a batch and start fetching it."""
        done: Future[Decoded] = Future()
        self._order.append(done)
        self._work.put((list(tasks), [self._fetchers.submit(self._fetch, task) for task in tasks], done))

    def collect(self) -> Decoded:
        """Wait for the oldest batch."""
        decoded = self._order[0].result()  # a failed batch stays, so that every later call fails in the same way
        self._order.popleft()
        if self._device is not None:  # the memory must not be used again before the consumer's work on it is done
            decoded.clips_BCTHW.record_stream(torch.cuda.current_stream(self._device))
        return decoded

    def close(self) -> None:
        """End the threads once the batches in work are done; no store is waited for."""
        if self._closing:
            return
        self._closing = True
        self._source.stop()
        for _ in self._threads:
            self._work.put(None)
        self._fetchers.close()
        for thread in self._threads:
            thread.join()

    def _fetch(self, task: ClipTask) -> tuple[bytes, float]:
        began = time.perf_counter()
        return self._source.fetch(task), time.perf_counter() - began

    def _run(self, graph: _Graph) -> None:
        """A thread: decode batches, one after the other."""
        while (work := self._work.get()) is not None and not self._closing:
            tasks, fetched, done = work
            try:
                done.set_result(self._batch(graph, tasks, fetched))
            except BaseException as e:  # noqa: BLE001  raised again in the consumer's thread
                done.set_exception(e)

    def _batch(self, graph: _Graph, tasks: list[ClipTask], fetched: list[_Fetched]) -> Decoded:
        cost = Cost()
        data: list[bytes] = []
        for at, future in enumerate(fetched):
            try:
                clip, seconds = future.result()
                cost.fetch_s += seconds
            except BadClipError as e:
                tasks[at], clip = self._next_readable(self._on_bad(tasks[at], e))
            data.append(clip)
        began = time.perf_counter()
        try:
            clips = graph.run(tasks, data)
        except RuntimeError:
            clips = self._one_by_one(graph, tasks, data)
        cost.decode_s = time.perf_counter() - began
        cost.bytes_read = sum(map(len, data))
        return Decoded(tasks, clips, lambda: None, cost)

    def _next_readable(self, task: ClipTask) -> tuple[ClipTask, bytes]:
        """The task and its bytes, or those of its replacement."""
        while True:
            try:
                return task, self._fetch(task)[0]
            except BadClipError as e:
                task = self._on_bad(task, e)

    def _one_by_one(self, graph: _Graph, tasks: list[ClipTask], data: list[bytes]) -> torch.Tensor:
        """Decode each clip by itself, and replace those that fail; `tasks` is changed in place."""
        parts = []
        for at in range(len(tasks)):
            while True:
                try:
                    parts.append(graph.run([tasks[at]], [data[at]]))
                    break
                except RuntimeError as e:
                    bad = BadClipError(tasks[at].key, f"does not decode: {_first_line(e)}")
                    tasks[at], data[at] = self._next_readable(self._on_bad(tasks[at], bad))
        return torch.cat(parts)


class _Graph:
    """One DALI pipeline and its stream: bytes → wanted frames → each sample's frames, cropped, resized and mirrored.

    It is built when it is first run, and again after an error.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device | None, threads: int) -> None:
        self._shape = shape
        self._device = device
        self._n_threads = threads
        # its own stream: waiting for it must not wait for the trainer's work
        self._stream = None if device is None else torch.cuda.Stream(device)
        self._pipeline: Pipeline | None = None

    def run(self, tasks: list[ClipTask], data: list[bytes]) -> torch.Tensor:
        """uint8 [V * R, 3, T, H, W], a copy. RuntimeError where one of the clips is bad."""
        if self._pipeline is None:
            self._pipeline = _build(self._shape, self._device, self._n_threads)
        try:
            for name, samples in _feed(tasks, data, n_frames=self._shape[3]).items():
                self._pipeline.feed_input(name, samples)
            outputs = self._pipeline.run()
        except RuntimeError:
            self._pipeline = None  # DALI: "Current pipeline object is no longer valid"
            raise
        with torch.cuda.stream(self._stream):  # does nothing where it is None
            clips = torch.empty((len(tasks), *self._shape[1:]), dtype=torch.uint8, device=self._device or "cpu")
            for r, output in enumerate(outputs):
                clips[:, r] = torch.from_dlpack(output.as_tensor()).permute(0, 4, 1, 2, 3)
        if self._stream is not None:  # the next run overwrites DALI's buffers
            self._stream.synchronize()
        return clips.flatten(0, 1)


def _feed(tasks: list[ClipTask], data: list[bytes], n_frames: int) -> dict[str, list[np.ndarray]]:
    """The pipeline's inputs by name, one array for each clip."""
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
    return feed


def _build(shape: tuple[int, ...], device: torch.device | None, threads: int) -> Pipeline:
    videos, repeats, _, _, size, _ = shape
    device_id = None if device is None else device.index
    # depth 1: a thread feeds and runs one batch at a time; how far ahead, the loader decides
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
    """The first line of DALI's message that says what is wrong; lines with positions in its source are skipped."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("[")]
    return next(
        (line for line in lines if "rror" in line and not line.endswith(":")),
        lines[0] if lines else repr(error),
    )
