from dataclasses import replace

import numpy as np
import pytest

from reelmae.pipeline.errors import ConfigError
from reelmae.pipeline.loading.order.draws import Draw, SamplePolicy, draw, frame_indices

POLICY = SamplePolicy()
CLIP = {"frames": 300, "fps": 30.0, "height": 256, "width": 340}


def draws(policy: SamplePolicy = POLICY, n: int = 400, **clip: float) -> list[Draw]:
    return [draw(policy, seed=1, epoch=0, clip=i, repeat=0, **{**CLIP, **clip}) for i in range(n)]  # type: ignore[arg-type]


def test_a_draw_is_a_function_of_its_arguments() -> None:
    assert draws() == draws()


def test_seed_epoch_clip_and_repeat_each_change_the_draw() -> None:
    base = {"seed": 0, "epoch": 0, "clip": 0, "repeat": 0}
    seen = {draw(POLICY, **{**base, name: 1}, **CLIP) for name in base} | {draw(POLICY, **base, **CLIP)}  # type: ignore[arg-type]
    assert len(seen) == 5
    assert len({d.mask_seed for d in seen}) == 5


def test_window_and_box_lie_within_the_clip() -> None:
    for d in draws():
        assert 0 <= d.start <= 300 - 15 * d.stride - 1
        assert 0 <= d.top < d.top + d.height <= 256
        assert 0 <= d.left < d.left + d.width <= 340


def test_boxes_lie_on_even_pixels_also_of_pictures_with_odd_sides() -> None:
    for d in (*draws(), *draws(height=255, width=341), *draws(height=15, width=141)):
        assert not any(n % 2 for n in (d.top, d.left, d.height, d.width))
        assert min(d.height, d.width) > 0
    assert {d.top for d in draws(replace(POLICY, scale=(0.6, 0.6)))} >= set(range(0, 20, 2))


def test_starts_reach_both_ends_and_the_middle_evenly() -> None:
    starts = np.array([d.start for d in draws(n=4000)])
    assert (starts.min(), starts.max()) == (0, 239)
    counts = np.histogram(starts, bins=4, range=(0, 240))[0]
    assert (np.abs(counts - 1000) < 120).all()


def test_crops_cover_the_area_range_and_aspects_stay_allowed() -> None:
    area = np.array([d.height * d.width / (256 * 340) for d in draws()])
    aspect = np.array([d.width / d.height for d in draws()])
    assert area.min() < 0.55
    assert area.max() > 0.9
    assert ((area > 0.49) & (area <= 1)).all()
    assert ((aspect > 0.74) & (aspect < 1.35)).all()


def test_half_the_samples_are_flipped_and_none_where_flip_is_off() -> None:
    assert 150 < sum(d.flip for d in draws()) < 250
    assert not any(d.flip for d in draws(replace(POLICY, flip=False)))


def test_turning_the_flip_off_leaves_all_else_as_it_was() -> None:
    assert [replace(d, flip=False) for d in draws()] == draws(replace(POLICY, flip=False))


def test_a_crop_that_never_fits_falls_back_to_the_centre() -> None:
    [d] = draws(replace(POLICY, scale=(1.0, 1.0)), n=1, height=64, width=640)
    assert (d.top, d.left, d.height, d.width) == (0, (640 - 84) // 2, 64, 84)  # 85 wide, made even


@pytest.mark.parametrize(("fps", "stride"), [(30, 4), (25, 3), (24, 3), (60, 8), (7.5, 1), (5, 1), (29.97, 4)])
def test_stride_follows_from_the_frame_rate(fps: float, stride: int) -> None:
    assert POLICY.stride_for(fps) == stride
    assert SamplePolicy(stride=2).stride_for(fps) == 2


def test_a_short_clip_starts_at_its_first_frame_and_repeats_its_last() -> None:
    [d] = draws(n=1, frames=10)
    assert frame_indices(d, 16, 10).tolist() == [0, 4, 8, *[9] * 13]


def test_a_clip_of_exactly_the_window_has_one_start() -> None:
    assert {d.start for d in draws(frames=61)} == {0}
    assert {d.start for d in draws(frames=62)} == {0, 1}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"stride": 4, "fps": 7.5}, "give one of the two"),
        ({"stride": 0}, "stride=0"),
        ({"fps": -1.0}, "fps=-1"),
        ({"size": 0}, "size=0"),
        ({"scale": (0.5, 1.5)}, "scale"),
        ({"ratio": (2.0, 1.0)}, "ratio"),
    ],
)
def test_a_policy_out_of_range_is_refused_by_name(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplePolicy(**wrong)  # type: ignore[arg-type]
