"""`repeats` is its definition: the same as comparing every clip with every earlier one."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from reelmae.pipeline.ingest.shards import duplicates
from reelmae.pipeline.ingest.shards.duplicates import find_repeats


def _all_pairs(sha256_N32: np.ndarray, phash_N32: np.ndarray, hashed_N: np.ndarray, near_bits: int | None) -> list[int]:
    """The definition, word by word."""
    out: list[int] = []
    for i in range(len(sha256_N32)):
        kept = [j for j in range(i) if out[j] == -1]
        same = [j for j in kept if (sha256_N32[j] == sha256_N32[i]).all()]
        near = [
            j
            for j in kept
            if near_bits is not None
            and hashed_N[i]
            and hashed_N[j]
            and np.unpackbits(phash_N32[i] ^ phash_N32[j]).sum() <= near_bits
        ]
        out.append((same or near or [-1])[0])
    return out


def _random(N: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return (
        rng.integers(0, 256, (N, 32), dtype=np.uint8),
        rng.integers(0, 256, (N, 32), dtype=np.uint8),
        np.ones(N, bool),
    )


def _flipped(row: np.ndarray, bits: np.ndarray) -> np.ndarray:
    flat = np.unpackbits(row)
    flat[bits] ^= 1
    return np.packbits(flat)


@pytest.mark.parametrize("near_bits", [None, 0, 1, 5, 11])
@pytest.mark.parametrize("seed", range(6))
def test_the_same_as_all_pairs(seed: int, near_bits: int | None) -> None:
    rng = np.random.default_rng(seed)
    N = 300
    sha256_N32, phash_N32, hashed_N = _random(N, seed)
    for i in rng.permutation(N)[:200]:  # neighbours of others, and of neighbours, at every distance to 15
        phash_N32[i] = _flipped(phash_N32[rng.integers(N)], rng.permutation(256)[: rng.integers(16)])
    for i in rng.permutation(N)[:60]:
        sha256_N32[i] = sha256_N32[rng.integers(N)]
    hashed_N[rng.permutation(N)[:40]] = False
    wanted = _all_pairs(sha256_N32, phash_N32, hashed_N, near_bits)
    found_N = find_repeats(sha256_N32, phash_N32, hashed_N, near_bits=near_bits)
    assert found_N.dtype == np.int64
    assert found_N.tolist() == wanted
    assert 20 < (found_N >= 0).sum() < N


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 clips, and few pairs and rows at a time."""
    for name, value in (("_BLOCK_BITS", 4), ("_BLOCK", 16), ("_PAIRS", 5), ("_ROWS", 7)):
        monkeypatch.setattr(duplicates, name, value)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("near_bits", [None, 0, 5, 11])
@pytest.mark.parametrize("seed", range(4))
def test_blocks_change_nothing(seed: int, near_bits: int | None) -> None:
    """Neighbours, twins and chains of them, within a block and across blocks, and twins that do not look alike."""
    rng = np.random.default_rng(100 + seed)
    N = 250
    sha256_N32, phash_N32, hashed_N = _random(N, seed)
    for i in range(1, N):
        earlier = int(rng.integers(i)) if rng.random() < 0.5 else max(0, i - int(rng.integers(1, 6)))
        if rng.random() < 0.6:
            phash_N32[i] = _flipped(phash_N32[earlier], rng.permutation(256)[: rng.integers(14)])
        if rng.random() < 0.25:
            sha256_N32[i] = sha256_N32[int(rng.integers(i))]
    hashed_N[rng.random(N) < 0.1] = False
    found_N = find_repeats(sha256_N32, phash_N32, hashed_N, near_bits=near_bits)
    assert found_N.tolist() == _all_pairs(sha256_N32, phash_N32, hashed_N, near_bits)
    assert (found_N >= 0).sum() > 30


def test_a_block_of_look_alikes_repeats_its_first() -> None:
    sha256_N32, phash_N32, hashed_N = _random(4000, 0)
    for i in range(501, 3600):
        phash_N32[i] = _flipped(phash_N32[500], np.array([i % 256]))
    found_N = find_repeats(sha256_N32, phash_N32, hashed_N, near_bits=11)
    assert (found_N[501:3600] == 500).all()
    assert (found_N[:501] == -1).all() and (found_N[3600:] == -1).all()


def test_twins_in_a_block_come_before_an_earlier_look_alike() -> None:
    """The look-alike is in an earlier block, the twin in the clip's own."""
    sha256_N32, phash_N32, hashed_N = _random(2000, 0)
    sha256_N32[1950], phash_N32[1950] = sha256_N32[1900], phash_N32[3]
    assert find_repeats(sha256_N32, phash_N32, hashed_N, near_bits=11)[1950] == 1900
    phash_N32[1900] = phash_N32[4]  # no longer kept, so it is no twin to repeat
    assert find_repeats(sha256_N32, phash_N32, hashed_N, near_bits=11)[[1900, 1950]].tolist() == [4, 3]


@pytest.mark.parametrize("distance", range(16))
def test_a_neighbour_is_found_wherever_its_bits_lie(distance: int) -> None:
    rng = np.random.default_rng(distance)
    sha256_N32, phash_N32, hashed_N = _random(400, 0)
    for i in range(0, 400, 2):
        # spread evenly, so that as few bands as can be are left whole
        bits = (np.arange(distance) * 256 // max(distance, 1) + rng.integers(256)) % 256
        phash_N32[i + 1] = _flipped(phash_N32[i], bits)
    found_N = find_repeats(sha256_N32, phash_N32, hashed_N, near_bits=11)
    assert (found_N[::2] == -1).all()
    assert (found_N[1::2] == (np.arange(0, 400, 2) if distance <= 11 else -1)).all()


def test_in_a_chain_the_far_end_is_kept() -> None:
    sha256_N32, phash_N32, hashed_N = _random(4, 0)
    bits = np.random.default_rng(1).permutation(256)
    phash_N32[1] = _flipped(phash_N32[0], bits[:10])
    phash_N32[2] = _flipped(phash_N32[0], bits[:20])  # near 1, which is a repeat; too far from 0
    phash_N32[3] = _flipped(phash_N32[0], bits[:29])  # near 2
    assert find_repeats(sha256_N32, phash_N32, hashed_N, near_bits=11).tolist() == [-1, 0, -1, 2]


def test_the_earliest_of_several_counts() -> None:
    sha256_N32, phash_N32, hashed_N = _random(3, 0)
    phash_N32[1] = _flipped(phash_N32[0], np.arange(0, 40, 2))  # 20 bits
    phash_N32[2] = _flipped(phash_N32[0], np.arange(0, 22, 2))  # 11 from 0, 9 from 1
    assert find_repeats(sha256_N32, phash_N32, hashed_N, near_bits=11).tolist() == [-1, -1, 0]


def test_equal_bytes_come_before_an_earlier_look_alike() -> None:
    sha256_N32, phash_N32, hashed_N = _random(3, 0)
    phash_N32[1] = _flipped(phash_N32[0], np.arange(0, 40, 2))
    phash_N32[2] = phash_N32[0]
    sha256_N32[2] = sha256_N32[1]
    assert find_repeats(sha256_N32, phash_N32, hashed_N, near_bits=11).tolist() == [-1, -1, 1]


def test_without_a_hash_only_bytes_count() -> None:
    sha256_N32, phash_N32, _ = _random(4, 0)
    phash_N32[:] = 0
    sha256_N32[3] = sha256_N32[1]
    assert find_repeats(sha256_N32, phash_N32, np.zeros(4, bool), near_bits=11).tolist() == [-1, -1, -1, 1]
    assert find_repeats(sha256_N32, phash_N32, np.array([1, 0, 1, 0], bool), near_bits=11).tolist() == [
        -1,
        -1,
        0,
        1,
    ]


def test_exact_leaves_look_alikes_alone() -> None:
    sha256_N32, phash_N32, hashed_N = _random(5, 0)
    phash_N32[:] = phash_N32[0]
    sha256_N32[[2, 4]] = sha256_N32[0]
    assert find_repeats(sha256_N32, phash_N32, hashed_N, near_bits=None).tolist() == [-1, -1, 0, -1, 0]


def test_digests_that_differ_in_one_byte_are_different() -> None:
    sha256_N32 = np.zeros((33, 32), np.uint8)
    sha256_N32[np.arange(32), np.arange(32)] = 1
    nothing_N32, hashed_N = np.zeros((33, 32), np.uint8), np.zeros(33, bool)
    assert (find_repeats(sha256_N32, nothing_N32, hashed_N, near_bits=None) == -1).all()


def test_hashes_that_all_share_a_band_are_told_apart() -> None:
    sha256_N32, phash_N32, hashed_N = _random(3000, 0)
    phash_N32[:, 16:24] = 9
    phash_N32[2999] = _flipped(phash_N32[1234], np.arange(11))
    found_N = find_repeats(sha256_N32, phash_N32, hashed_N, near_bits=11)
    assert found_N[2999] == 1234
    assert (found_N[:2999] == -1).all()


@pytest.mark.parametrize("whole", range(12))
def test_one_band_left_whole_is_enough_in_any_company(whole: int) -> None:
    starts = [64 * word + bit for word in range(4) for bit in (0, 21, 42)] + [256]
    sha256_N32, phash_N32, hashed_N = _random(200, whole)
    bits_NB = np.unpackbits(phash_N32, axis=1)
    band = slice(starts[whole], starts[whole + 1])
    bits_NB[:, band] = bits_NB[0, band]
    phash_N32 = np.packbits(bits_NB, axis=1)
    elsewhere = np.array([start for n, start in enumerate(starts[:-1]) if n != whole])
    for i in range(100):
        phash_N32[100 + i] = _flipped(phash_N32[i], elsewhere)
    found_N = find_repeats(sha256_N32, phash_N32, hashed_N, near_bits=11)
    assert found_N.tolist() == [-1] * 100 + list(range(100))


def test_memory_mapped_files_will_do(tmp_path: Path) -> None:
    sha256_N32, phash_N32, hashed_N = _random(100, 0)
    phash_N32[60] = _flipped(phash_N32[7], np.arange(5))
    maps = []
    for name, rows_N32 in (("sha256", sha256_N32), ("phash", phash_N32)):
        rows_N32.tofile(tmp_path / name)
        maps.append(np.memmap(tmp_path / name, np.uint8, "r", shape=(100, 32)))
    assert find_repeats(maps[0], maps[1], hashed_N, near_bits=11)[60] == 7


@pytest.mark.parametrize("near_bits", [None, 11])
def test_nothing_and_one(near_bits: int | None) -> None:
    for N in (0, 1):
        assert find_repeats(*_random(N, 0), near_bits=near_bits).tolist() == [-1] * N


def test_wrong_arguments_are_refused() -> None:
    good = _random(5, 0)
    for near_bits in (-1, 12):
        with pytest.raises(ValueError):
            find_repeats(*good, near_bits=near_bits)
    for a, b in pairwise((4, 5, 6)):
        with pytest.raises(ValueError):
            find_repeats(_random(a, 0)[0], good[1][:b], good[2][:4], near_bits=11)
