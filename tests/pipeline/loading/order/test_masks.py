import numpy as np
import pytest

from reelmae.pipeline.errors import ConfigError
from reelmae.pipeline.loading.order.masks import DecoderMaskPolicy, MaskPolicy, ids_decode, ids_keep, n_keep

GRID = (8, 14, 14)
KINDS = ["random", "tube", "frame", "block"]


def kept(kind: str, seed: int, ratio: float = 0.9) -> np.ndarray:
    """bool [T, H, W]"""
    mask = np.zeros(8 * 14 * 14, bool)
    mask[ids_keep(MaskPolicy(kind, ratio), seed, GRID)] = True  # type: ignore[arg-type]
    return mask.reshape(GRID)


@pytest.mark.parametrize(
    ("kind", "ratio", "count"),
    [
        ("random", 0.9, 156),
        ("tube", 0.9, 160),
        ("block", 0.9, 156),
        ("frame", 0.75, 392),
        ("block", 0.75, 392),
        ("random", 0.0, 1568),
        ("tube", 0.0, 1568),
        ("frame", 0.0, 1568),
        ("block", 0.0, 1568),
        ("block", 0.99, 15),
    ],
)
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


# ---- what the decoder predicts


def predicted(seed: int, ratio: float = 0.5) -> np.ndarray:
    """bool [T, H, W]"""
    mask = np.zeros(8 * 14 * 14, bool)
    mask[ids_decode(DecoderMaskPolicy("cells", ratio), seed, GRID)] = True
    return mask.reshape(GRID)


@pytest.mark.parametrize(("ratio", "count"), [(0.25, 1176), (0.5, 784), (0.75, 392)])
def test_running_cells_leave_out_the_stated_share_of_every_cell(ratio: float, count: int) -> None:
    for seed in range(8):
        mask = predicted(seed, ratio)
        assert mask.sum() == count
        cells = mask.reshape(8, 7, 2, 7, 2).sum(axis=(2, 4))
        assert (cells == count // (8 * 49)).all()


def test_running_cells_are_those_of_the_docstring() -> None:
    left_out = ~predicted(0)[:4, :2, :2]
    assert left_out.reshape(4, 4).astype(int).tolist() == [
        [1, 1, 0, 0],
        [1, 0, 0, 1],
        [0, 0, 1, 1],
        [0, 1, 1, 0],
    ]


def test_within_four_times_every_place_is_predicted_equally_often() -> None:
    assert (predicted(3, 0.75)[:4].sum(axis=0) == 1).all()


def test_four_seeds_in_a_row_give_the_four_phases() -> None:
    assert len({predicted(seed).tobytes() for seed in range(4)}) == 4
    assert (predicted(0) == predicted(4)).all()


def test_without_a_decoder_mask_all_tokens_are_predicted() -> None:
    assert (ids_decode(DecoderMaskPolicy(), 0, GRID) == np.arange(1568)).all()


def test_an_odd_grid_has_no_cells() -> None:
    with pytest.raises(ConfigError, match="8×7×7 cannot be cut into cells"):
        ids_decode(DecoderMaskPolicy("cells"), 0, (8, 7, 7))


@pytest.mark.parametrize("wrong", [{"ratio": 0.3}, {"kind": "rings"}])
def test_a_decoder_mask_that_cannot_be_is_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=rf"decoder_mask\.{next(iter(wrong))}"):
        DecoderMaskPolicy(**wrong)  # type: ignore[arg-type]
