"""ClipBatch, what the loader yields, and what is computed where the batch is: floats from bytes, masks from seeds.

B = videos × repeats, video by video: sample `v * R + r` is repeat r of video v.
Shapes: B batch, C channel, T frame, H height, W width, K kept token, Q predicted token.

Masks: only the samples' seeds travel to the device. There the counter-based generator of `philox` (Philox 4x64,
10 rounds: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) runs in 64-bit integer arithmetic on
tensors and gives the same tokens as `masks`, bit for bit, on any device. Cuboids (`block`) are removed one after the
other, which is slow on a device: they are drawn on the host.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from reelmae.pipeline.loading.order.draws import Draw
from reelmae.pipeline.loading.order.masks import DecoderMaskPolicy, GridTHW, MaskPolicy, ids_decode, ids_keep, n_keep
from reelmae.pipeline.loading.order.philox import STREAM_MASK

# Numbers at a time on the CPU: they stay in its cache, and torch uses one thread for fewer than 32768. More threads
# would take the cores from the workers that decode
_PIECE = 32_000
# Philox 4x64
_ROUNDS = 10
_LOW = 0xFFFFFFFF
_SIGN = -(1 << 63)
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)


@dataclass(frozen=True, eq=False)
class ClipBatch:
    """One rank's part of a global batch. Its shapes are checked when it is made."""

    clips_BCTHW: Tensor
    """float32 on the device, (x / 255 - pixel_mean) / pixel_std of each channel."""
    ids_keep_BK: Tensor
    """int64 on the device, ascending: the tokens the encoder sees."""
    clip_B: np.ndarray
    """int64, rows of the ClipIndex."""
    repeat_B: np.ndarray
    """int64, 0 … R - 1."""
    label_B: Tensor
    """int64 on the device, -1 = unlabelled."""
    draws: list[Draw]
    """What was cut out of the clips, for each sample."""
    epoch: int
    """Counts from 0."""
    step: int
    """Global batch within the epoch, from 0."""
    ids_decode_BQ: Tensor | None = None
    """int64 on the device, ascending: the tokens to be predicted; None: all."""

    def __post_init__(self) -> None:
        sizes = {name: len(getattr(self, name)) for name in ("ids_keep_BK", "clip_B", "repeat_B", "label_B", "draws")}
        wrong = {name: n for name, n in sizes.items() if n != len(self.clips_BCTHW)}
        assert not wrong, f"a batch of {len(self.clips_BCTHW)} clips has {wrong}"
        assert self.clips_BCTHW.ndim == 5, tuple(self.clips_BCTHW.shape)
        assert self.clips_BCTHW.shape[1] == 3, tuple(self.clips_BCTHW.shape)
        assert self.ids_keep_BK.ndim == 2, tuple(self.ids_keep_BK.shape)
        if self.ids_decode_BQ is not None:
            assert self.ids_decode_BQ.ndim == 2, tuple(self.ids_decode_BQ.shape)
            assert len(self.ids_decode_BQ) == len(self), tuple(self.ids_decode_BQ.shape)

    def __len__(self) -> int:
        return len(self.clips_BCTHW)

    def __repr__(self) -> str:
        return (
            f"ClipBatch(epoch={self.epoch}, step={self.step}, clips_BCTHW={list(self.clips_BCTHW.shape)}, "
            f"ids_keep_BK={list(self.ids_keep_BK.shape)}, {self.clips_BCTHW.dtype} on {self.clips_BCTHW.device})"
        )


class Floats:
    """Bytes to normalised floats on a device: (x / 255 - mean) / std of each channel.

    On the CPU, memory is used again once a batch is gone. Fresh memory would cost more than the arithmetic, since the
    kernel clears each page when it is first touched.
    """

    def __init__(self, device: torch.device, mean: Sequence[float], std: Sequence[float]) -> None:
        self._device = device
        self._free: list[np.ndarray] = []
        # (shift, scale) of each channel; of all at once where they are alike
        channels = [(torch.tensor(-m / s), 1 / (255 * s)) for m, s in zip(mean, std, strict=True)]
        self._channels = channels if len(set(zip(mean, std, strict=True))) > 1 else channels[:1]

    def __call__(self, clips_BCTHW: Tensor | np.ndarray) -> Tensor:
        """uint8 to float32; the input may be used again at once."""
        pixels = torch.from_numpy(clips_BCTHW) if isinstance(clips_BCTHW, np.ndarray) else clips_BCTHW
        if self._device.type != "cpu":
            floats = pixels.to(self._device).to(torch.float32)  # bytes travel, not floats
            groups = [floats] if len(self._channels) == 1 else floats.unbind(1)
            for group, (shift, scale) in zip(groups, self._channels, strict=True):
                torch.add(shift, group, alpha=scale, out=group)
            return floats
        floats = self._memory(pixels.shape)
        rows = 1 if len(self._channels) == 1 else pixels.shape[0] * pixels.shape[1]
        for row, (bytes_row, floats_row) in enumerate(
            zip(pixels.reshape(rows, -1), floats.view(rows, -1), strict=True)
        ):
            shift, scale = self._channels[row % len(self._channels)]
            for some_bytes, some in zip(bytes_row.split(_PIECE), floats_row.split(_PIECE), strict=True):
                torch.add(shift, some.copy_(some_bytes), alpha=scale, out=some)
        return floats

    def _memory(self, shape: torch.Size) -> Tensor:
        """Floats that nobody holds. They are given back when the last tensor over them is gone."""
        memory = self._free.pop() if self._free else None
        if memory is None or memory.shape != shape:
            memory = np.empty(shape, np.float32)
        lent = memory.view()
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return torch.from_numpy(lent)


def batch_ids_keep(policy: MaskPolicy, mask_seeds: list[int], grid_THW: GridTHW, device: torch.device) -> Tensor:
    """int64 [B, K] on `device`: for each seed (below 2**63) what `masks.ids_keep` gives."""
    if device.type == "cpu" or policy.kind == "block":  # numpy is quicker
        return torch.from_numpy(np.stack([ids_keep(policy, s, grid_THW) for s in mask_seeds])).to(device)
    return ids_keep_on_device(policy, torch.tensor(mask_seeds, dtype=torch.int64, device=device), grid_THW)


def ids_keep_on_device(policy: MaskPolicy, seeds_B: Tensor, grid_THW: GridTHW) -> Tensor:
    """int64 [B, K] where the seeds are; any kind but `block`."""
    assert policy.kind != "block"
    t, h, w = grid_THW
    n = n_keep(policy.kind, policy.ratio, grid_THW)
    if policy.kind == "tube":
        places_BP = _choose(seeds_B, h * w, n // t)
        return (torch.arange(t, device=seeds_B.device)[:, None] * (h * w) + places_BP[:, None]).flatten(1)
    if policy.kind == "frame":
        times_BT = _choose(seeds_B, t, n // (h * w))
        return (times_BT[:, :, None] * (h * w) + torch.arange(h * w, device=seeds_B.device)).flatten(1)
    return _choose(seeds_B, t * h * w, n)


def batch_ids_decode(
    policy: DecoderMaskPolicy, mask_seeds: list[int], grid_THW: GridTHW, device: torch.device
) -> Tensor | None:
    """int64 [B, Q] on `device`: for each seed what `masks.ids_decode` gives; None where all tokens are predicted.

    A seed chooses one of the four phases of the running cell: all four are made, and looked up.
    """
    if policy.kind == "none":
        return None
    phases = torch.from_numpy(np.stack([ids_decode(policy, phase, grid_THW) for phase in range(4)]))
    return phases[torch.tensor([seed % 4 for seed in mask_seeds])].to(device)


def _choose(seeds_B: Tensor, n: int, k: int) -> Tensor:
    """int64 [B, k]: k of n, ascending; the smallest of n random words, as unsigned numbers."""
    noise_BN = philox_bits(seeds_B, STREAM_MASK, n) ^ _SIGN  # flipped, signed order is unsigned order
    return torch.argsort(noise_BN, dim=1, stable=True)[:, :k].sort(dim=1).values


def philox_bits(seeds_B: Tensor, stream: int, n: int) -> Tensor:
    """int64 [B, n]: the words of `philox.raw_bits(n, seed=…, stream=…)`, each in two's complement."""
    blocks = torch.arange(1, (n + 3) // 4 + 1, dtype=torch.int64, device=seeds_B.device)  # the first is 1, as in numpy
    c0 = blocks.expand(len(seeds_B), -1)
    c1 = c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seeds_B[:, None], stream
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _to_signed(_WEYL[0]), _to_signed((k1 + _WEYL[1]) % (1 << 64))
    return torch.stack([c0, c1, c2, c3], dim=-1).flatten(1)[:, :n]


def _multiply(words: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """(high, low) 64 bits of the unsigned products; int64 arithmetic wraps, shifts are made logical by a mask."""
    a0, a1 = words & _LOW, (words >> 32) & _LOW
    b0, b1 = by & _LOW, by >> 32
    p00, p01, p10 = a0 * b0, a0 * b1, a1 * b0
    middle = ((p00 >> 32) & _LOW) + (p01 & _LOW) + (p10 & _LOW)
    high = a1 * b1 + ((p01 >> 32) & _LOW) + ((p10 >> 32) & _LOW) + (middle >> 32)
    return high, words * _to_signed(by)


def _to_signed(word: int) -> int:
    """The int64 with the bits of this unsigned 64-bit word."""
    return word - (1 << 64) if word >> 63 else word
