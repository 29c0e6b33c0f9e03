"""Pure: digests and perceptual hashes of all clips → which clip repeats which.

Near hashes are found by bands. 256 bits are cut into 12 bands. Two hashes that differ in at most 11 bits have
at least one band in common, since 11 differences cannot touch 12 bands. So a hash is compared only with the
kept clips that share a band with it, never with all. Repeats are not kept, so a cluster of any size costs about
one comparison a clip. Many kept clips with one band in common cost a comparison a pair.

A million clips take about 20 s, and half a gigabyte beside the arrays of the caller.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

MAX_BITS = 11
# shift and bits of the bands of each of a hash's four 64-bit words
_WORD_BANDS = ((43, 21), (22, 21), (0, 22))
_BANDS = 4 * len(_WORD_BANDS)
_BLOCK = 1 << 16


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
    digest_N = _ids(_words(sha256_N32))
    if near_bits is None:
        first_N = _first(digest_N)[digest_N]
        return np.where(first_N < np.arange(N), first_N, -1)
    return _greedy(digest_N, np.flatnonzero(hashed_N), _words(phash_N32), near_bits)


def _greedy(digest_N: np.ndarray, hashed_M: np.ndarray, words_N4: np.ndarray, near_bits: int) -> np.ndarray:
    """As `find_repeats` with `near_bits`; `hashed_M` are the indices of the clips with a hash."""
    out_N = np.full(len(digest_N), -1, np.int64)
    place_N = np.full(len(digest_N), -1, np.int64)  # place of a clip among those with a hash
    place_N[hashed_M] = np.arange(len(hashed_M))
    kept = _Kept(words_N4[hashed_M], near_bits)
    kept_of_digest: dict[int, int] = {}
    for clip, (digest, place) in enumerate(zip(_each(digest_N), _each(place_N), strict=True)):
        same = kept_of_digest.get(digest)
        if same is not None:
            out_N[clip] = same
        elif place >= 0 and (near := kept.earliest(place)) is not None:
            out_N[clip] = hashed_M[near]
        else:
            kept_of_digest[digest] = clip
            if place >= 0:
                kept.add(place)
    return out_N


class _Kept:
    """The hashes of kept clips, found by any of their bands. All hashes, uint64 [M, 4], are known from the start.

    A bucket is one value of one band. It has room in `members`, from `start` on, for every hash with that value.
    """

    def __init__(self, words_M4: np.ndarray, near_bits: int) -> None:
        M = len(words_M4)
        self.words_M4, self.near_bits = words_M4, near_bits
        self.bucket_MB = np.empty((M, _BANDS), np.int32)
        sizes: list[np.ndarray] = []
        buckets = 0
        for band, value_M in enumerate(_bands(words_M4)):
            _, inverse_M, size = np.unique(value_M, return_inverse=True, return_counts=True)
            self.bucket_MB[:, band] = inverse_M + buckets
            sizes.append(size.astype(np.int32))
            buckets += len(size)
        size_K = np.concatenate(sizes)
        self.start_K = np.concatenate([[0], np.cumsum(size_K)[:-1]]).astype(np.int32)
        self.kept_K = np.zeros(buckets, np.int32)
        self.members = np.empty(M * _BANDS, np.int32)

    def earliest(self, place: int) -> int | None:
        """The first kept hash within `near_bits` of this one."""
        bucket_B = self.bucket_MB[place]
        kept_B = self.kept_K[bucket_B]
        live = kept_B.nonzero()[0]
        if len(live) == 0:
            return None
        starts, counts = self.start_K[bucket_B[live]].tolist(), kept_B[live].tolist()
        near = np.concatenate([self.members[a : a + n] for a, n in zip(starts, counts, strict=True)])
        near = near[_differ(self.words_M4.take(near, axis=0), self.words_M4[place]) <= self.near_bits]
        return int(near.min()) if len(near) else None

    def add(self, place: int) -> None:
        """Keep this hash; places come in rising order."""
        bucket_B = self.bucket_MB[place]
        self.members[self.start_K[bucket_B] + self.kept_K[bucket_B]] = place
        self.kept_K[bucket_B] += 1


def _differ(words_N4: np.ndarray, word_4: np.ndarray) -> np.ndarray:
    """For each row, the number of bits (of 256) in which it differs from `word_4`: uint16 [N]."""
    differ_N4 = np.bitwise_count(words_N4 ^ word_4)
    # column by column: a sum along an axis of four is several times slower
    half_N, other_N = differ_N4[:, 0] + differ_N4[:, 1], differ_N4[:, 2] + differ_N4[:, 3]
    return half_N.astype(np.uint16) + other_N


def _bands(words_M4: np.ndarray) -> Iterator[np.ndarray]:
    """The values of each of the 12 bands in turn: uint32 [M]."""
    for word in range(4):
        for shift, bits in _WORD_BANDS:
            yield ((words_M4[:, word] >> np.uint64(shift)) & np.uint64((1 << bits) - 1)).astype(np.uint32)


def _words(bytes_N32: np.ndarray) -> np.ndarray:
    """Rows of 32 bytes as uint64 [N, 4], the first bit the highest."""
    return np.ascontiguousarray(bytes_N32, np.uint8).view(">u8").astype(np.uint64)


def _ids(words_N4: np.ndarray) -> np.ndarray:
    """A number for each row, from 0; equal rows get the same one: int64 [N]."""
    order_N = np.lexsort(words_N4.T)
    sorted_N4 = words_N4[order_N]
    new_N = np.zeros(len(words_N4), np.int64)
    new_N[1:] = (sorted_N4[1:] != sorted_N4[:-1]).any(axis=1)
    ids_N = np.empty_like(new_N)
    ids_N[order_N] = new_N.cumsum()
    return ids_N


def _first(ids_N: np.ndarray) -> np.ndarray:
    """For each number, the first index at which it stands; the numbers are 0, 1, 2 and so on."""
    return np.unique(ids_N, return_index=True)[1]


def _each(values_N: np.ndarray) -> Iterator[int]:
    """The values as Python integers, converted in blocks."""
    for start in range(0, len(values_N), _BLOCK):
        yield from values_N[start : start + _BLOCK].tolist()
