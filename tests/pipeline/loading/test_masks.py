import numpy as np
import pytest

from reelmae.pipeline.errors import ConfigError
from reelmae.pipeline.loading.masks import MaskPolicy, ids_keep, n_keep

GRID = (8, 14, 14)
KINDS = ["random", "tube", "frame", "block"]


def kept(kind: str, seed: int, ratio: float = 0.9) -> np.ndarray:
    """bool [T, H, W]"""
    mask = np.zeros(8 * 14 * 14, bool)
    mask[ids_keep(MaskPolicy(kind, ratio), seed, GRID)] = True  # type: ignore[arg-type]
    return mask.reshape(GRID)


@pytest.mark.parametrize(("kind", "ratio", "count"), [
    ("random", 0.9, 156), ("tube", 0.9, 160), ("block", 0.9, 156), ("frame", 0.75, 392), ("block", 0.75, 392),
    ("random", 0.0, 1568), ("tube", 0.0, 1568), ("frame", 0.0, 1568), ("block", 0.0, 1568), ("block", 0.99, 15),
])  # fmt: skip
def test_counts_are_the_references_whatever_the_seed(kind: str, ratio: float, count: int) -> None:
    assert n_keep(kind, ratio, GRID) == count  # type: ignore[arg-type]
    assert {len(ids_keep(MaskPolicy(kind, ratio), seed, GRID)) for seed in range(20)} == {count}  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_ascending_distinct_and_a_function_of_the_seed(kind: str) -> None:
    ids = ids_keep(MaskPolicy(kind), 5, GRID)  # type: ignore[arg-type]
    assert ids.dtype == np.int64
    assert (np.diff(ids) > 0).all()
    assert 0 <= ids[0] <= ids[-1] < 1568
    assert (ids == ids_keep(MaskPolicy(kind), 5, GRID)).all()  # type: ignore[arg-type]
    assert any((ids != ids_keep(MaskPolicy(kind), seed, GRID)).any() for seed in range(3))  # type: ignore[arg-type]


def test_tube_keeps_the_same_places_at_every_time() -> None:
    mask = kept("tube", 0)
    assert (mask == mask[:1]).all()
    assert mask[0].sum() == 20


def test_frame_keeps_whole_times() -> None:
    assert sorted(kept("frame", 0, 0.75).sum(axis=(1, 2))) == [0] * 6 + [196] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_is_kept_equally_often_or_nearly(kind: str) -> None:
    often = np.mean([kept(kind, seed) for seed in range(600)], axis=0)
    expected = n_keep(kind, 0.9, GRID) / 1568  # type: ignore[arg-type]
    assert abs(often.mean() - expected) < 1e-9
    if kind != "block":  # cuboids reach the middle more often than the border
        assert np.abs(often - expected).max() < 0.08


def test_block_removes_in_lumps() -> None:
    def edges(mask: np.ndarray) -> int:
        return sum(int((np.diff(mask, axis=axis) != 0).sum()) for axis in range(3))

    assert np.mean([edges(kept("block", s, 0.75)) for s in range(30)]) < 0.6 * np.mean(
        [edges(kept("random", s, 0.75)) for s in range(30)]
    )


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5])
def test_a_ratio_out_of_range_is_refused(ratio: float) -> None:
    with pytest.raises(ConfigError, match=r"mask\.ratio"):
        MaskPolicy("random", ratio)


def test_a_ratio_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="leaves no token of the grid 1×2×2"):
        n_keep("random", 0.9, (1, 2, 2))
