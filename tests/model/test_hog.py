"""Histograms of gradients: edges worked out by hand, what they must not see, and where values lie in a patch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from reelmae.model.config import MAEConfig
from reelmae.model.hog import hog_patches

R = math.sqrt(0.5)
VERTICAL = [
    R,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    R,
]  # gradient along x, 0°: between the middles of the first and the last orientation
HORIZONTAL = [0, 0, 0, 0, 1, 0, 0, 0, 0]  # along y, 90°
# 45° lies a quarter of the way from 50° (k = 2) to 30° (k = 1): 0.75 and 0.25, to length 1
FALLING = [0, 0.25 / math.hypot(0.75, 0.25), 0.75 / math.hypot(0.75, 0.25), 0, 0, 0, 0, 0, 0]
RISING = FALLING[::-1]  # 135°


def ramp(dx: float, dy: float, size: int = 8) -> Tensor:
    """[1, 3, 1, size, size]: brightness dx · x + dy · y."""
    y, x = torch.meshgrid(torch.arange(float(size)), torch.arange(float(size)), indexing="ij")
    return (dx * x + dy * y).expand(1, 3, 1, size, size)


def middle(frames: Tensor) -> Tensor:
    """[3, 9]: the histograms of the middle one of 3 × 3 cells, whose gradients no border touches."""
    return hog_patches(frames, 1, 8)[0, 4].reshape(3, 9)


@pytest.mark.parametrize(
    ("dx", "dy", "expected"),
    [(1, 0, VERTICAL), (0, 1, HORIZONTAL), (1, 1, FALLING), (1, -1, RISING)],
    ids=["vertical", "horizontal", "falling", "rising"],
)
@pytest.mark.parametrize("sign", [1, -1], ids=["light", "dark"])
def test_an_edge_falls_into_its_orientation_whichever_side_is_bright(
    dx: float, dy: float, expected: list[float], sign: int
) -> None:
    histograms = middle(ramp(sign * dx, sign * dy, 24))
    for of_one_colour in histograms:
        assert of_one_colour.tolist() == pytest.approx(expected, abs=1e-5)


def test_orientations_are_twenty_degrees_apart() -> None:
    for k in range(9):
        angle = math.radians(20 * k + 10)
        histogram = middle(ramp(math.cos(angle), math.sin(angle), 24))[0]
        assert histogram.tolist() == pytest.approx([float(k == j) for j in range(9)], abs=1e-5)


def test_longer_gradients_weigh_more() -> None:
    """A step of 3 to the right in columns 3 | 4 of a cell, and one of 4 downwards in rows 3 | 4.

    Each step is seen from both its sides, so 2 columns × 8 rows vote along x with 3, 2 rows × 8 columns along y with 4,
    but the 4 pixels that see both vote once, with 5 at atan2(4, 3) = 53.13°: 0.8435 of it for 50° and 0.1565 for 70°.
    """
    frame = torch.zeros(1, 1, 1, 8, 8)
    frame[..., 4:] += 3
    frame[..., 4:, :] += 4
    at70 = (math.degrees(math.atan2(4, 3)) - 50) / 20
    votes = torch.tensor([12 * 1.5, 0, 20 * (1 - at70), 20 * at70, 12 * 4.0, 0, 0, 0, 12 * 1.5])
    expected = votes / votes.norm()
    assert torch.allclose(hog_patches(frame, 1, 8)[0, 0], expected, atol=1e-5)


def test_colours_are_apart() -> None:
    frames = torch.cat((ramp(1, 0, 24)[:, :1], ramp(0, 1, 24)[:, :1], torch.zeros(1, 1, 1, 24, 24)), dim=1)
    red, green, blue = middle(frames).tolist()
    assert red == pytest.approx(VERTICAL, abs=1e-5) and green == pytest.approx(HORIZONTAL, abs=1e-5)
    assert blue == [0] * 9


def test_brightness_and_contrast_change_nothing() -> None:
    frames = torch.rand(2, 3, 2, 16, 16)
    expected = hog_patches(frames, 1, 16)
    assert torch.allclose(hog_patches(frames + 3, 1, 16), expected, atol=1e-4)
    assert torch.allclose(hog_patches(frames * 0.01, 1, 16), expected, atol=1e-5)
    mean, std = torch.tensor([0.45, 0.4, 0.5]), torch.tensor([0.225, 0.2, 0.3])
    normalised = (frames - mean[:, None, None, None]) / std[:, None, None, None]
    assert torch.allclose(hog_patches(normalised, 1, 16), expected, atol=1e-4)


def test_each_histogram_has_length_one() -> None:
    hog = hog_patches(torch.rand(2, 3, 4, 16, 16), 2, 16)
    assert torch.allclose(hog.reshape(-1, 9).norm(dim=1), torch.tensor(1.0), atol=1e-5)


def test_a_patch_without_edges_is_zero_and_rounding_is_no_edge() -> None:
    flat = hog_patches(torch.full((1, 3, 2, 16, 16), 0.45), 2, 8)
    assert flat.count_nonzero() == 0
    hog = hog_patches(torch.full((1, 3, 2, 16, 16), 0.45) + 1e-8 * torch.randn(1, 3, 2, 16, 16), 2, 8)
    assert hog.isfinite().all() and hog.abs().max() < 0.2


def test_tokens_are_t_major_and_values_frame_cell_channel_orientation() -> None:
    """One cell of one colour of one frame has an edge; everything else is flat."""
    for t, row, column, channel in [(0, 0, 0, 0), (1, 3, 2, 1), (3, 1, 3, 2), (2, 2, 1, 0)]:
        frames = torch.zeros(2, 3, 4, 32, 32)
        inside = slice(row * 8 + 3, row * 8 + 5), slice(column * 8, column * 8 + 8)
        frames[1, channel, t, inside[0], inside[1]] = torch.arange(8.0)
        hog = hog_patches(frames, 2, 16)  # 2 × 2 × 2 tokens of 2 frames × 2 × 2 cells
        assert hog.shape == (2, 8, 2 * 4 * 27) and hog[0].count_nonzero() == 0
        token = (t // 2 * 2 + row // 2) * 2 + column // 2
        values = hog[1, token].reshape(2, 2, 2, 3, 9)
        assert values[t % 2, row % 2, column % 2, channel].norm() == pytest.approx(1)
        other = hog[1].clone()
        other[token].reshape(2, 2, 2, 3, 9)[t % 2, row % 2, column % 2, channel] = 0
        # the ramp's bright end is an edge of the next cell too
        assert other.reshape(-1, 9).norm(dim=1).count_nonzero() == (1 if column < 3 else 0)


def test_a_border_of_a_patch_is_no_edge_and_neither_is_the_frames() -> None:
    hog = hog_patches(ramp(1, 0, 32), 1, 16).reshape(-1, 9)
    assert torch.allclose(hog, torch.tensor(VERTICAL).expand_as(hog), atol=1e-5)


@pytest.mark.parametrize(
    ("t_patch", "patch", "values"), [(1, 16, 108), (2, 16, 216), (1, 8, 27), (2, 4, 54), (1, 32, 432)]
)
def test_a_patch_has_as_many_values_as_is_said(t_patch: int, patch: int, values: int) -> None:
    hog = hog_patches(torch.rand(1, 3, 4, 32, 32).bfloat16(), t_patch, patch)
    assert hog.shape == (1, 4 // t_patch * (32 // patch) ** 2, values) and hog.dtype == torch.float32
    config = MAEConfig(frames=4 * t_patch, size=32, patch=patch, t_patch=4, pred_t_dim=t_patch * t_patch, target="hog")
    assert config.target_values == values // t_patch * config.target_t_patch


@pytest.mark.parametrize("patch", [0, 12, 14])
def test_a_patch_that_cells_do_not_fill_is_named(patch: int) -> None:
    with pytest.raises(ValueError, match=rf"hog patch={patch}: give a multiple of 8, or 1 … 7"):
        hog_patches(torch.zeros(1, 3, 1, 24, 24), 1, patch)


def test_equal_frames_give_equal_bits_and_it_compiles_whole() -> None:
    frames = torch.rand(2, 3, 2, 16, 16)
    compiled = torch.compile(hog_patches, fullgraph=True, backend="aot_eager")
    assert torch.equal(hog_patches(frames, 2, 8), hog_patches(frames.clone(), 2, 8))
    assert torch.allclose(compiled(frames, 2, 8), hog_patches(frames, 2, 8), atol=1e-6)
