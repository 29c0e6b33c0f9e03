"""The masks of a whole batch, drawn where the batch is: the same tokens as `masks` gives, bit for bit.

Only the samples' seeds travel to the device. There the same counter-based generator (Philox 4x64, 10 rounds: Salmon et
al., "Parallel random numbers: as easy as 1, 2, 3", 2011) is run in 64-bit integer arithmetic on tensors, so a mask is
a function of its seed and nothing else, on any device. Cuboids (`block`) are removed one after the other, which no
device is good at: they are drawn on the host.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from reelmae.pipeline.loading.order.masks import (
    DecoderMaskPolicy,
    GridTHW,
    MaskPolicy,
    ids_decode,
    ids_keep,
    n_keep,
)
from reelmae.pipeline.loading.order.philox import STREAM_MASK

_ROUNDS = 10
_LOW = 0xFFFFFFFF
_SIGN = -(1 << 63)


def _signed(word: int) -> int:
    """A 64-bit word as torch's int64 has it."""
    return word - (1 << 64) if word >> 63 else word


_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)


def batch_ids_keep(policy: MaskPolicy, mask_seeds: list[int], grid_THW: GridTHW, device: torch.device) -> Tensor:
    """int64 [B, K] on `device`: for each seed (below 2**63) what `masks.ids_keep` gives."""
    if device.type == "cpu" or policy.kind == "block":  # numpy is quicker there
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

    There are four running cells: they are made once and looked up.
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
        k0, k1 = k0 + _signed(_WEYL[0]), _signed((k1 + _WEYL[1]) % (1 << 64))
    return torch.stack([c0, c1, c2, c3], dim=-1).flatten(1)[:, :n]


def _multiply(words: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """(high, low) 64 bits of the unsigned products; int64 arithmetic wraps, shifts are made logical by a mask."""
    a0, a1 = words & _LOW, (words >> 32) & _LOW
    b0, b1 = by & _LOW, by >> 32
    p00, p01, p10 = a0 * b0, a0 * b1, a1 * b0
    middle = ((p00 >> 32) & _LOW) + (p01 & _LOW) + (p10 & _LOW)
    high = a1 * b1 + ((p01 >> 32) & _LOW) + ((p10 >> 32) & _LOW) + (middle >> 32)
    return high, words * _signed(by)
