"""Counter-based random numbers: a pure function of their purpose, independent of what was drawn before.

Philox is keyed by (seed, stream) and positioned by three words, so any number can be drawn without those before it: on
any worker, rank or restart. Only `random_raw` is used. Its bits are fixed by the algorithm, while numpy may change the
streams of `Generator` methods between versions.
"""

from __future__ import annotations

import numpy as np

# one stream per purpose, so that no two purposes share bits
STREAM_ORDER = 1
STREAM_DRAW = 2
STREAM_MASK = 3
STREAM_REPLACE = 4

_TO_UNIT = 2.0**-53


def raw_bits(n: int, *, seed: int, stream: int, words: tuple[int, int, int] = (0, 0, 0)) -> np.ndarray:
    """`n` independent uint64, the same on every machine for the same (seed, stream, words); `seed` >= 0."""
    key = np.array([seed, stream], dtype=np.uint64)
    # the lowest counter word is the generator's own block number
    counter = np.array([0, *words], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(n)


def unit_floats(bits: np.ndarray) -> np.ndarray:
    """uint64 bits to float64 in [0, 1)."""
    return (bits >> np.uint64(11)) * _TO_UNIT


def below(bits: int, n: int) -> int:
    """One raw number to an integer in [0, n) by multiply and shift; its bias is negligible for n << 2**64."""
    return (int(bits) * n) >> 64
