"""Pure: digests and perceptual hashes of all clips → which clip repeats which.

Near hashes are found by bands. 256 bits are cut into 12 bands. Two hashes that differ in at most 11 bits have
at least one band in common, since 11 differences cannot touch 12 bands. So a hash is compared only with the
kept clips that share a bucket of a band with it, never with all. Repeats are not kept, so a cluster of any size
costs about one comparison a clip. Many kept clips with one band in common cost a comparison a pair.

Clips are taken block by block: each block is held against the kept clips before it, then against itself. Only clips
that are near another of their own block, or have the bytes of another clip, are looked at one by one.

Ten million clips take about a minute and 1 GB beside the arrays of the caller.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

MAX_BITS = 11
# word, shift and bits of each of a hash's bands
_BANDS = [(word, shift, bits) for word in range(4) for shift, bits in ((43, 21), (22, 21), (0, 22))]
_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd: spreads the values of a band over its buckets
_BUCKET_BITS = 21  # at most 2^21 buckets for each band
_BLOCK_BITS = 10
_BLOCK = 1 << _BLOCK_BITS  # clips; where all are near each other, a block is compared in all its pairs
_PAIRS = 1 << 15  # compared at once
_ROWS = 1 << 20  # hashes whose buckets are counted at once


def find_repeats(
    sha256_N32: np.ndarray, phash_N32: np.ndarray, hashed_N: np.ndarray, *, near_bits: int | None
) -> np.ndarray:
    """For each clip, the index of the earlier clip that it repeats, int64 [N]; -1 = none.

    The clips are taken in order. A clip repeats the earliest kept clip with the same sha256. Where there is none,
    and `near_bits` is given, it repeats the earliest kept clip whose hash differs in at most `near_bits` (0 to 11)
    of 256 bits. A clip that repeats none is kept. `sha256_N32` and `phash_N32` are uint8 and may be memory-mapped;
    a row of `phash_N32` counts where bool `hashed_N` is True.
    """
    N = len(sha256_N32)
    if sha256_N32.shape != (N, 32) or phash_N32.shape != (N, 32) or hashed_N.shape != (N,):
        raise ValueError(f"digests {sha256_N32.shape}, hashes {phash_N32.shape} and flags {hashed_N.shape} differ")
    if near_bits is not None and not 0 <= near_bits <= MAX_BITS:
        raise ValueError(f"near_bits {near_bits} is not from 0 to {MAX_BITS}")
    twin_T, digest_T = _find_twins(_words(sha256_N32))
    if near_bits is None:
        out_N = np.full(N, -1, np.int64)
        first_T = twin_T[np.unique(digest_T, return_index=True)[1]][digest_T]
        out_N[twin_T] = np.where(first_T < twin_T, first_T, -1)
        return out_N
    return _greedy(twin_T, digest_T, hashed_N, _words(phash_N32), near_bits)


def _greedy(
    twin_T: np.ndarray, digest_T: np.ndarray, hashed_N: np.ndarray, words_N4: np.ndarray, near_bits: int
) -> np.ndarray:
    """As `find_repeats` with `near_bits`; `twin_T` and `digest_T` as `_find_twins` gives them."""
    N = len(hashed_N)
    out_N = np.full(N, -1, np.int64)
    kept = _Kept(words_N4, hashed_N, near_bits)
    kept_of_digest: dict[int, int] = {}
    for start in range(0, N, _BLOCK):
        clip_U = start + np.flatnonzero(hashed_N[start : start + _BLOCK])
        out_N[clip_U] = kept.earliest(clip_U)
        block = _Block(words_N4, clip_U[out_N[clip_U] < 0], kept.bucket_bits)
        near_of = block.near_of(near_bits)
        first, last = np.searchsorted(twin_T, (start, start + _BLOCK))
        digest_of = dict(zip(twin_T[first:last].tolist(), digest_T[first:last].tolist(), strict=True))
        for clip in sorted(digest_of.keys() | near_of.keys()):
            digest = digest_of.get(clip)
            same = None if digest is None else kept_of_digest.get(digest)
            if same is not None:
                out_N[clip] = same
            elif out_N[clip] < 0:
                out_N[clip] = next((near for near in near_of.get(clip, ()) if out_N[near] < 0), -1)
            if digest is not None and out_N[clip] < 0:
                kept_of_digest[digest] = clip
        kept.add(block, out_N[block.clip_U] < 0)
    return out_N


class _Kept:
    """The hashes of kept clips, found by any of their bands. All hashes, uint64 [N, 4], are known from the start.

    A bucket is a value of a band, or several values. It has room in `members`, from `start` on, for every hash in it.
    """

    def __init__(self, words_N4: np.ndarray, hashed_N: np.ndarray, near_bits: int) -> None:
        N = len(words_N4)
        self.words_N4, self.near_bits = words_N4, near_bits
        self.bucket_bits = min(_BUCKET_BITS, N.bit_length())
        size_K = np.zeros(len(_BANDS) << self.bucket_bits, np.int64)
        for row in range(0, N, _ROWS):
            bucket_UB = _buckets(words_N4[row : row + _ROWS][hashed_N[row : row + _ROWS]], self.bucket_bits)
            size_K += np.bincount(bucket_UB.ravel(), minlength=len(size_K))
        self.start_K = size_K.cumsum() - size_K
        self.members = np.empty(int(size_K.sum()), np.int32 if N < 1 << 31 else np.int64)
        self.count_K = np.zeros(len(size_K), np.int32)

    def earliest(self, clip_U: np.ndarray) -> np.ndarray:
        """For each clip the first kept one within `near_bits` of it, int64 [U]; -1 = none."""
        words_U4 = self.words_N4[clip_U]
        bucket_UB = _buckets(words_U4, self.bucket_bits)
        count_UB = self.count_K[bucket_UB]
        pairs_U = count_UB.sum(axis=1, dtype=np.int64)
        first_U = np.full(len(clip_U), len(self.words_N4))
        piece_U = pairs_U.cumsum() // _PAIRS
        edges = [0, *(np.flatnonzero(np.diff(piece_U)) + 1).tolist(), len(clip_U)]
        for here in map(slice, edges, edges[1:]):
            place_P = _ranges(self.start_K[bucket_UB[here]].ravel(), count_UB[here].ravel())
            near_P = self.members[place_P].astype(np.int64)
            clip_P = np.arange(here.start, here.stop).repeat(pairs_U[here])
            close = _close(self.words_N4, near_P, words_U4, clip_P, self.near_bits)
            np.minimum.at(first_U, clip_P[close], near_P[close])
        return np.where(first_U < len(self.words_N4), first_U, -1)

    def add(self, block: _Block, which_U: np.ndarray) -> None:
        """Keep those of a block's hashes for which bool `which_U` is True; blocks come in rising order."""
        mine = which_U[block.member_S]
        bucket_S, clip_S = block.bucket_S[mine], block.clip_U[block.member_S[mine]]
        new_S = np.ones(len(bucket_S), bool)
        new_S[1:] = bucket_S[1:] != bucket_S[:-1]
        at_S = np.arange(len(bucket_S))
        rank_S = at_S - np.maximum.accumulate(np.where(new_S, at_S, 0))
        self.members[self.start_K[bucket_S] + self.count_K[bucket_S] + rank_S] = clip_S
        last = np.flatnonzero(np.append(new_S[1:], True)[: len(new_S)])
        self.count_K[bucket_S[last]] += rank_S[last].astype(np.int32) + 1


class _Block:
    """The clips `clip_U` (int64, rising) of a block, each in its buckets: sorted by bucket, then by clip."""

    def __init__(self, words_N4: np.ndarray, clip_U: np.ndarray, bucket_bits: int) -> None:
        self.clip_U, self.words_U4 = clip_U, words_N4[clip_U]
        bucket_UB = _buckets(self.words_U4, bucket_bits)
        both_S = ((bucket_UB << _BLOCK_BITS) | np.arange(len(clip_U))[:, None]).ravel()
        both_S.sort()
        self.bucket_S, self.member_S = both_S >> _BLOCK_BITS, both_S & (_BLOCK - 1)

    def near_of(self, near_bits: int) -> dict[int, list[int]]:
        """clip → the earlier clips of the block within `near_bits` of it, in rising order; only where there are any."""
        U = len(self.clip_U)
        pairs: list[np.ndarray] = []
        at = np.arange(len(self.bucket_S))
        for step in range(1, U):  # a run of one bucket: each with the next, with the one after it, and so on
            at = at[: np.searchsorted(at, len(self.bucket_S) - step)]
            at = at[self.bucket_S[at] == self.bucket_S[at + step]]
            if len(at) == 0:
                break
            earlier, later = self.member_S[at], self.member_S[at + step]
            close = _close(self.words_U4, earlier, self.words_U4, later, near_bits)
            pairs.append(later[close] * U + earlier[close])
        near_of: dict[int, list[int]] = defaultdict(list)
        if pairs:
            later, earlier = np.divmod(np.unique(np.concatenate(pairs)), U)
            for clip, near in zip(self.clip_U[later].tolist(), self.clip_U[earlier].tolist(), strict=True):
                near_of[clip].append(near)
        return dict(near_of)


def _buckets(words_U4: np.ndarray, bucket_bits: int) -> np.ndarray:
    """The bucket of each hash in each band, int64 [U, 12]; those of a band lie side by side."""
    bucket_UB = np.empty((len(words_U4), len(_BANDS)), np.int64)
    for band, (word, shift, bits) in enumerate(_BANDS):
        value_U = (words_U4[:, word] >> np.uint64(shift)) & np.uint64((1 << bits) - 1)
        bucket_UB[:, band] = (value_U * _MIX) >> np.uint64(64 - bucket_bits)
        bucket_UB[:, band] += band << bucket_bits
    return bucket_UB


def _ranges(start_R: np.ndarray, count_R: np.ndarray) -> np.ndarray:
    """start, start + 1, … of each range, `count` long, one range after the other: int64 [sum of counts]."""
    end_R = count_R.cumsum(dtype=np.int64)
    total = int(end_R[-1]) if len(end_R) else 0
    return (start_R - end_R + count_R).repeat(count_R) + np.arange(total)


def _close(words_A4: np.ndarray, a_P: np.ndarray, words_B4: np.ndarray, b_P: np.ndarray, near_bits: int) -> np.ndarray:
    """Which of these pairs of rows differ in at most `near_bits` (of 256): indices of pairs."""
    one_P = words_A4.reshape(-1).take(a_P * 4) ^ words_B4.reshape(-1).take(b_P * 4)
    at = np.flatnonzero(np.bitwise_count(one_P) <= near_bits)  # most differ in more bits of the first word alone
    differ_C4 = np.bitwise_count(words_A4.take(a_P[at], axis=0) ^ words_B4.take(b_P[at], axis=0))
    # column by column: a sum along an axis of four is several times slower
    half_C, other_C = differ_C4[:, 0] + differ_C4[:, 1], differ_C4[:, 2] + differ_C4[:, 3]
    return at[half_C.astype(np.uint16) + other_C <= near_bits]


def _words(bytes_N32: np.ndarray) -> np.ndarray:
    """Rows of 32 bytes as uint64 [N, 4], without a copy where they lie one after the other."""
    return np.ascontiguousarray(bytes_N32, np.uint8).view(np.uint64)


def _find_twins(words_N4: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every row that has an equal one, and some that have none, rising; and a number, the same for equal rows."""
    order_N = np.argsort(words_N4[:, 0])
    sorted_N = words_N4[order_N, 0]
    same = sorted_N[1:] == sorted_N[:-1]
    twin = np.zeros(len(order_N), bool)
    twin[1:] |= same
    twin[:-1] |= same
    twin_T = np.sort(order_N[twin])
    words_T4 = words_N4[twin_T]
    order_T = np.lexsort(words_T4.T)
    sorted_T4 = words_T4[order_T]
    new_T = np.zeros(len(twin_T), np.int64)
    new_T[1:] = (sorted_T4[1:] != sorted_T4[:-1]).any(axis=1)
    digest_T = np.empty_like(new_T)
    digest_T[order_T] = new_T.cumsum()
    return twin_T, digest_T
