"""A sweep gives every clip once, in order, with the same views each time; a bad one is left out and named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from reelmae.pipeline.errors import ConfigError, DatasetError
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.loading.order.draws import SamplePolicy
from reelmae.pipeline.loading.sweep import ClipSweep, view_draws

SAMPLE = SamplePolicy(frames=4, stride=2, size=48)


def play(index: ClipIndex, **settings: Any) -> tuple[list[int], np.ndarray, dict[str, str]]:
    """(rows, pixels uint8 [V, R, C, T, H, W], bad) of a whole sweep."""
    rows, pixels = [], []
    with ClipSweep(index, SAMPLE, **{"batch_videos": 4, "workers": 0, **settings}) as sweep:
        for batch in sweep:
            assert len(batch.clip_V) == len(batch.pixels_VRCTHW)
            rows += batch.clip_V.tolist()
            pixels.append(batch.pixels_VRCTHW.copy())
        return rows, np.concatenate(pixels), dict(sweep.bad)


def damage(index: ClipIndex, *clips: int) -> None:
    """Overwrite these clips' bytes."""
    for clip in clips:
        with index.store.local_path(index.shard(clip)).open("r+b") as f:
            f.seek(int(index.offset[clip]))
            f.write(b"\xa5" * int(index.size[clip]))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_videos", [1, 4, 22, 100])
def test_every_clip_comes_once_and_in_order(natural_index: ClipIndex, workers: int, batch_videos: int) -> None:
    rows, pixels, bad = play(natural_index, batch_videos=batch_videos, workers=workers)
    assert rows == list(range(22))
    assert pixels.shape == (22, 1, 3, 4, 48, 48)
    assert not bad


def test_views_are_the_same_for_any_number_of_workers_and_size_of_batch(natural_index: ClipIndex) -> None:
    _, pixels, _ = play(natural_index, views=3)
    _, again, _ = play(natural_index, views=3, batch_videos=5, workers=2)
    assert np.array_equal(pixels, again)
    assert not np.array_equal(pixels[:, 0], pixels[:, 2])


def test_views_show_the_frames_that_they_say(make_dataset: Callable, spec: type, read_numbers: Callable) -> None:
    index = make_dataset([spec(frames=40, numbered=True, height=96, width=96)])
    _, pixels, _ = play(index, views=3)
    shown = [read_numbers(view_CTHW.transpose(1, 2, 3, 0)) for view_CTHW in pixels[0]]
    assert shown == [[0, 2, 4, 6], [16, 18, 20, 22], [33, 35, 37, 39]]


def test_one_view_is_the_middle_and_several_reach_from_end_to_end() -> None:
    sample = SamplePolicy(frames=16, stride=4, size=224)
    clip = {"frames": 301, "fps": 30.0, "height": 256, "width": 342}
    assert [d.start for d in view_draws(sample, 1, **clip)] == [120]
    assert [d.start for d in view_draws(sample, 3, **clip)] == [0, 120, 240]
    assert [d.start for d in view_draws(sample, 5, **clip)] == [0, 60, 120, 180, 240]
    assert [d.start for d in view_draws(sample, 2, **{**clip, "frames": 60})] == [
        0,
        0,
    ]  # shorter than a window


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(256, 342, (0, 42, 256)), (342, 256, (42, 0, 256)), (96, 64, (16, 0, 64)), (50, 50, (0, 0, 50))],
)
def test_the_crop_is_the_largest_square_at_the_middle(height: int, width: int, box: tuple[int, int, int]) -> None:
    [d] = view_draws(SAMPLE, 1, frames=9, fps=30.0, height=height, width=width)
    assert (d.top, d.left, d.height, d.width) == (*box, box[2])
    assert not d.flip


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("spoiled", [(0,), (5,), (11,), (0, 1, 2, 3), (4, 9, 10, 11)])
def test_a_bad_clip_is_left_out_and_named(
    make_dataset: Callable, spec: type, workers: int, spoiled: tuple[int, ...]
) -> None:
    index = make_dataset([spec(frames=24, seed=s) for s in range(12)], clips_per_shard=5)
    whole_rows, whole, _ = play(index)
    damage(index, *spoiled)
    rows, pixels, bad = play(index, workers=workers)
    assert rows == [row for row in whole_rows if row not in spoiled]
    assert np.array_equal(pixels, whole[rows])
    assert set(bad) == {index.key(row) for row in spoiled}
    assert all("sha256" in reason for reason in bad.values())


def test_a_clip_that_was_given_is_not_called_bad_later(make_dataset: Callable, spec: type) -> None:
    index = make_dataset([spec(frames=24, seed=s) for s in range(5)])
    rows = []
    with ClipSweep(index, SAMPLE, batch_videos=1, workers=0) as sweep:
        for batch in sweep:
            rows += batch.clip_V.tolist()
            if rows == [0, 1]:
                damage(index, 1, 2)  # 1 would stand in for 2
    assert rows == [0, 1, 3, 4]
    assert list(sweep.bad) == [index.key(2)]


@pytest.mark.parametrize("workers", [0, 2])
def test_where_no_clip_is_left_it_says_so(make_dataset: Callable, spec: type, workers: int) -> None:
    index = make_dataset([spec(frames=24, seed=s) for s in range(5)])
    damage(index, *range(5))
    with pytest.raises(DatasetError, match=r"not one of 5 clips.*verify --deep"):
        play(index, workers=workers)


def test_a_clip_alone_that_is_bad_is_no_endless_loop(make_dataset: Callable, spec: type) -> None:
    index = make_dataset([spec(frames=24)])
    damage(index, 0)
    with pytest.raises(DatasetError, match="not one of 1 clips"):
        play(index)


@pytest.mark.parametrize("setting", [{"views": 0}, {"batch_videos": 0}, {"workers": -1}])
def test_a_setting_that_cannot_be_is_named(natural_index: ClipIndex, setting: dict[str, int]) -> None:
    [(name, value)] = setting.items()
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        ClipSweep(natural_index, SAMPLE, **setting)  # type: ignore[arg-type]
