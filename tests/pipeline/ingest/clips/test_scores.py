"""The scores of small frames say what a person would: still, dark, blank, boxed in; and the hash is imagehash's."""

import numpy as np
import pytest

from reelmae.pipeline.ingest.clips.scores import BLACK, SIDE, phash, score_clip


def _noise(T: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(40, 216, (T, SIDE, SIDE), dtype=np.uint8)


def _scene(T: int, seed: int = 0) -> np.ndarray:
    """Smooth random pictures, as a camera gives: waves of all directions, one set per frame."""
    rng = np.random.default_rng(seed)
    y_HW, x_HW = np.mgrid[:SIDE, :SIDE] / SIDE
    frames = []
    for _ in range(T):
        waves = [
            rng.normal() * np.cos(2 * np.pi * (rng.uniform(0, 4) * x_HW + rng.uniform(0, 4) * y_HW + rng.uniform()))
            for _ in range(12)
        ]
        frames.append(np.clip(128 + 24 * np.sum(waves, axis=0), 0, 255).astype(np.uint8))
    return np.stack(frames)


def _flat(T: int, level: int) -> np.ndarray:
    return np.full((T, SIDE, SIDE), level, np.uint8)


def test_a_still_picture_has_no_motion() -> None:
    assert score_clip(np.repeat(_noise(1), 40, axis=0)).motion == 0


def test_motion_is_in_levels_either_way() -> None:
    down_up_THW = np.stack([_flat(1, 100 + 7 * (t % 2))[0] for t in range(9)])
    assert score_clip(down_up_THW).motion == 7


def test_one_cut_or_flash_makes_no_motion() -> None:
    cut_THW = np.concatenate([np.repeat(_noise(1, 1), 20, axis=0), np.repeat(_noise(1, 2), 20, axis=0)])
    flash_THW = np.repeat(_noise(1), 40, axis=0)
    flash_THW[11] = 255
    assert score_clip(cut_THW).motion == 0
    assert score_clip(flash_THW).motion == 0


def test_a_slideshow_of_two_seconds_a_picture_is_still() -> None:
    assert score_clip(np.repeat(_scene(5), 8, axis=0)).motion == 0


def test_a_clip_that_moves_for_a_third_of_its_time_is_not_still() -> None:
    shot_THW = np.repeat(_noise(1), 40, axis=0)
    for t in range(14):
        shot_THW[t] = np.roll(shot_THW[-1], t + 1, axis=1)
    assert score_clip(shot_THW).motion > 20


def test_a_single_frame_is_scored() -> None:
    found = score_clip(_noise(1))
    assert found.motion == 0
    assert found.phash is not None
    assert found.phash[:8] * 4 == found.phash


def test_luma_is_the_mean_and_contrast_that_of_a_frame() -> None:
    # frames of one level each: the clip varies, but no picture shows anything
    found = score_clip(np.concatenate([_flat(3, 10), _flat(1, 50)]))
    assert found.luma == 20
    assert found.contrast == 0
    halves_THW = _flat(4, 100)
    halves_THW[:, :, 32:] = 140
    assert score_clip(halves_THW).contrast == 20


@pytest.mark.parametrize(
    ("top", "bottom", "left", "right", "share"),
    [
        (0, 0, 0, 0, 0),
        (8, 8, 0, 0, 0.25),
        (0, 0, 16, 16, 0.5),
        (16, 16, 16, 16, 0.75),
        (12, 0, 0, 0, 12 / 64),
        (0, 0, 0, 4, 4 / 64),
    ],
)
def test_border_is_the_share_of_black_rows_and_columns(
    top: int, bottom: int, left: int, right: int, share: float
) -> None:
    boxed_THW = _flat(6, BLACK - 1)
    boxed_THW[:, top : SIDE - bottom, left : SIDE - right] = _noise(1)[0][top : SIDE - bottom, left : SIDE - right]
    assert score_clip(boxed_THW).border == pytest.approx(share)


def test_a_row_that_is_lit_once_is_no_border() -> None:
    boxed_THW = _noise(6)
    boxed_THW[:, :16] = 0
    assert score_clip(boxed_THW).border == 0.25
    boxed_THW[3, 4, 20] = BLACK
    assert score_clip(boxed_THW).border == 4 / 64


def test_black_inside_the_picture_is_no_border() -> None:
    barred_THW = _noise(6)
    barred_THW[:, 20:40] = 0
    assert score_clip(barred_THW).border == 0


def test_a_black_clip_is_all_border() -> None:
    found = score_clip(_flat(5, 0))
    assert (found.border, found.luma, found.contrast, found.phash) == (1, 0, 0, None)


@pytest.mark.parametrize("make", [_scene, _noise])
@pytest.mark.parametrize("T", [1, 3, 4, 40, 57])
def test_the_hash_has_the_bits_of_imagehash(make, T: int) -> None:
    imagehash = pytest.importorskip("imagehash")
    from PIL import Image

    for seed in range(20):
        gray_THW = make(T, seed)
        wanted = b""
        for i in range(4):
            frame_HW = gray_THW[int((i + 0.5) / 4 * T)].astype(np.float64)
            means_PP = frame_HW.reshape(32, 2, 32, 2).mean(axis=(1, 3))
            picture = Image.fromarray(np.floor(means_PP + 0.5).astype(np.uint8))
            wanted += bytes.fromhex(str(imagehash.phash(picture, hash_size=8, highfreq_factor=4)))
        assert phash(gray_THW) == wanted


def test_ties_are_no_noise() -> None:
    # a picture of columns has 56 coefficients that are 0 but for rounding; none of their bits may be set
    columns_HW = np.tile(_scene(1)[0, 0], (SIDE, 1))
    bits_44 = np.unpackbits(np.frombuffer(phash(columns_HW[None]) or b"", np.uint8)).reshape(4, 8, 8)
    assert bits_44[:, 0].any()
    assert not bits_44[:, 1:].any()


def test_the_hash_bears_a_little_noise_and_tells_scenes_apart() -> None:
    one_THW, other_THW = _scene(40, 1), _scene(40, 2)
    noisy_THW = one_THW + np.random.default_rng(0).integers(0, 4, one_THW.shape, dtype=np.uint8)
    noisy_THW = np.where(noisy_THW < one_THW, 255, noisy_THW).astype(np.uint8)

    def differ(a_THW: np.ndarray, b_THW: np.ndarray) -> int:
        a, b = phash(a_THW), phash(b_THW)
        assert a is not None
        assert b is not None
        return (int.from_bytes(a) ^ int.from_bytes(b)).bit_count()

    assert differ(one_THW, noisy_THW) <= 8
    assert differ(one_THW, other_THW) > 80


def test_one_flat_frame_of_the_four_leaves_no_hash() -> None:
    gray_THW = _scene(40)
    assert phash(gray_THW) is not None
    gray_THW[15] = 90
    assert phash(gray_THW) is None
    gray_THW[15, :, 32:] = 93  # 1.5 levels each side
    assert phash(gray_THW) is None
    gray_THW[15, :, 32:] = 94
    assert phash(gray_THW) is not None


@pytest.mark.parametrize(
    "wrong", [_flat(0, 0), _flat(2, 0)[0], _flat(2, 0).astype(np.float32), np.zeros((2, 32, 32), np.uint8)]
)
def test_other_arrays_are_refused(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError):
        score_clip(wrong)
