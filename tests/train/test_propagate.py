"""Masks carried along by frozen features, on cases that can be worked out by hand; J and F of DAVIS likewise.

Legend as in the file: T frame, H × W patches, Y × X pixels, D width, N label.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reelmae.model.config import ViTConfig
from reelmae.model.vit import Encoder
from reelmae.train.propagate import (
    JF,
    boundary,
    boundary_f,
    j_and_f,
    propagate,
    region_similarity,
    video_features,
    vote,
)

PATCH = 4


def squares(frames: int, side: int, size: int, step: int, objects: int = 1) -> Tensor:
    """Numbers int64 [T, size, size]: objects 1, 2, … of side × side, one below the other, moving right by `step`."""
    masks = torch.zeros(frames, size, size, dtype=torch.int64)
    for t in range(frames):
        for n in range(objects):
            masks[t, 1 + n * (side + 1) : 1 + n * (side + 1) + side, 1 + step * t : 1 + step * t + side] = n + 1
    return masks


def pixels(masks_THW: Tensor) -> Tensor:
    """Each patch as PATCH × PATCH pixels."""
    return masks_THW.repeat_interleave(PATCH, -1).repeat_interleave(PATCH, -2)


def test_a_moving_square_is_tracked_by_one_hot_features() -> None:
    truth = squares(5, side=3, size=10, step=1)
    masks = propagate(F.one_hot(truth).float(), pixels(truth)[0], topk=1)
    assert torch.equal(masks[0], pixels(truth)[0])
    for t in range(1, 5):  # at the middles of patches, where nothing is interpolated across an edge by more than half
        assert torch.equal(masks[t, PATCH // 2 :: PATCH, PATCH // 2 :: PATCH], truth[t])
    assert region_similarity(masks == 1, pixels(truth) == 1).min() > 0.8


def test_several_objects_keep_their_numbers() -> None:
    truth = squares(4, side=2, size=8, step=1, objects=2)
    numbers = torch.tensor([0, 7, 3])  # neither consecutive nor in order
    masks = propagate(F.one_hot(truth).float(), numbers[pixels(truth)[0]], topk=1)
    assert set(masks.unique().tolist()) == {0, 3, 7}
    assert torch.equal(masks[3, 2::PATCH, 2::PATCH], numbers[truth[3]])


def test_the_first_mask_comes_back_as_it_was_given() -> None:
    mask = torch.randint(0, 3, (13, 9), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    masks = propagate(torch.randn(2, 3, 2, 4), mask)
    assert masks.dtype == torch.int64
    assert torch.equal(masks[0], mask.long())
    assert masks.shape == (2, 13, 9)


def path(*positions: int) -> Tensor:
    """Features [T, 1, 12, 2] of a row of patches: one is (0, 1), at another place in each frame, all others (1, 0)."""
    return F.one_hot(torch.stack([(torch.arange(12) == p).long() for p in positions])).float()[:, None]


def found(masks_TYX: Tensor) -> list[list[int]]:
    """In which patches of the row the object is, frame by frame."""
    return [mask[0].nonzero().flatten().tolist() for mask in masks_TYX]


def test_what_moves_farther_than_the_radius_is_lost() -> None:
    features, mask = path(2, 5), (torch.arange(12) == 2).long()[None]
    assert found(propagate(features, mask, topk=1, radius=3)) == [[2], [5]]
    assert found(propagate(features, mask, topk=1, radius=2)) == [[2], []]


def test_the_radius_holds_up_and_down_too() -> None:
    for here, there in ((2, 5), (5, 2)):
        features, mask = path(here, there).transpose(1, 2), (torch.arange(12) == here).long()[:, None]
        assert propagate(features, mask, topk=1, radius=3)[1].flatten().nonzero().tolist() == [[there]]
        assert propagate(features, mask, topk=1, radius=2)[1].sum() == 0


def test_a_patch_begins_with_the_label_at_its_middle() -> None:
    features = F.one_hot(torch.tensor([[[0, 1]], [[1, 0]]])).float()  # two patches, changing places
    mask = torch.tensor([[1, 1, 0, 1, 1, 0, 0, 1, 0, 0]])  # 0 at the first one's middle, 1 at the other's
    assert propagate(features, mask, topk=1)[1].tolist() == [[1] * 5 + [0] * 5]


def test_labels_go_on_soft() -> None:
    # frame 1's first patch is a little more like background than like the object: 0.4 of an object, which frame 2, where
    # it looks the same, still has; rounded on the way it would be none
    thing, ground, other = torch.eye(3)
    mixed = thing + 1.05 * ground
    features = torch.stack(
        [torch.stack(row) for row in ((thing, ground, other, other), *2 * ((mixed, other, other, other),))]
    )[:, None]
    mask = torch.tensor([[1, 0, 0, 0]])
    assert found(propagate(features, mask, topk=2, context=1)) == [[0], [0], [0]]


def test_the_last_frames_are_context_and_older_ones_are_not() -> None:
    features, mask = path(0, 3, 6, 9), (torch.arange(12) == 0).long()[None]
    # by steps of 3, within the radius from frame to frame; from the first frame alone only one step can be seen
    assert found(propagate(features, mask, topk=1, radius=3, context=1)) == [[0], [3], [6], [9]]
    assert found(propagate(features, mask, topk=1, radius=3, context=0)) == [[0], [3], [], []]
    # hidden for two frames: found again where the frame before them is still context
    features, mask = path(0, 3, -1, -1, 6), (torch.arange(12) == 0).long()[None]
    features[2:4] = torch.tensor([1.0, 0.0])
    assert found(propagate(features, mask, topk=1, radius=3, context=3))[4] == [6]
    assert found(propagate(features, mask, topk=1, radius=3, context=2))[4] == []


def test_the_first_frame_is_always_context() -> None:
    features, mask = path(4, -1, -1, -1, 4), (torch.arange(12) == 4).long()[None]
    features[1:4] = torch.tensor([1.0, 0.0])
    assert found(propagate(features, mask, topk=1, context=1))[4] == [4]


def test_votes_are_weighted_by_the_cosine_over_the_temperature() -> None:
    # cosines 1, 0.6 and 0 with patches of labels 1, 0 and 0, of which the last has no vote
    target = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]])
    source = torch.tensor([[[[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]]])
    labels = torch.tensor([[[[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]]])
    for temperature in (0.1, 1.0):
        soft = vote(target, source, labels, topk=2, radius=12, temperature=temperature)
        weight = 1 / (1 + math.exp((0.6 - 1) / temperature))
        assert soft[0, 0].tolist() == pytest.approx([1 - weight, weight], abs=1e-6)


def test_the_length_of_a_feature_does_not_count() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 4, 5, 6, generator=generator)
    mask = (torch.arange(20).reshape(4, 5) % 3).long()
    lengths = 0.1 + 9 * torch.rand(3, 4, 5, 1, generator=generator)
    assert torch.equal(propagate(features, mask), propagate(features * lengths, mask))


def test_only_the_nearest_vote() -> None:
    # frame 1's patches are most like the object's one, and nearly as like the five others, which together win
    features = torch.zeros(2, 1, 6, 2)
    features[..., 0] = 1
    features[0, 0, 1:, 1] = 0.1
    mask = torch.tensor([[1, 0, 0, 0, 0, 0]])
    assert propagate(features, mask, topk=1)[1].tolist() == [[1] * 6]
    assert propagate(features, mask, topk=6)[1].tolist() == [[0] * 6]


def test_each_label_is_stretched_over_its_frame_before_the_largest_wins() -> None:
    # where the object is likest its share is a fifth only; stretched to 1 it wins there, and nowhere else
    features = torch.zeros(2, 1, 10, 2)
    features[..., 0] = 1
    features[0, 0, 4:, :] = torch.tensor([0.0, 1.0])
    features[1, 0, 4:, :] = torch.tensor([0.0, 1.0])
    mask = torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0, 0, 0]])
    assert found(propagate(features, mask, topk=4, radius=12))[1] == [0, 1, 2, 3]


def test_an_object_that_is_lost_leaves_background_and_no_nan() -> None:
    features = torch.ones(3, 2, 2, 3)
    mask = torch.zeros(8, 8, dtype=torch.int64)
    mask[0, 0] = 1  # no patch's middle: smaller than a patch
    assert propagate(features, mask)[1:].sum() == 0


def test_rows_of_patches_do_not_see_over_the_edge() -> None:
    """A row's end is not beside the next row's beginning."""
    features = torch.zeros(2, 2, 6, 2)
    features[..., 0] = 1
    features[0, 0, 5] = features[1, 1, 0] = torch.tensor([0.0, 1.0])
    mask = torch.zeros(2, 6, dtype=torch.int64)
    mask[0, 5] = 1
    assert propagate(features, mask, topk=1, radius=2)[1].sum() == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"topk": 0}, "topk=0"),
        ({"context": -1}, "context=-1"),
        ({"radius": -1}, "radius=-1"),
        ({"temperature": 0.0}, r"temperature=0\.0"),
    ],
)
def test_a_setting_that_cannot_be_is_named(change: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        propagate(torch.ones(2, 2, 2, 3), torch.zeros(4, 4, dtype=torch.int64), **change)  # type: ignore[arg-type]


def test_tensors_of_a_wrong_shape_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(2, 2, 3\)"):
        propagate(torch.ones(2, 2, 3), torch.zeros(4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"float32 \(4, 4\)"):
        propagate(torch.ones(2, 2, 2, 3), torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"\(3, 4, 4\).*\(2, 4, 4\)"):
        j_and_f(torch.zeros(3, 4, 4, dtype=torch.int64), torch.zeros(2, 4, 4, dtype=torch.int64))


# --- features of a video's frames


def tiny_encoder(**changes: object) -> Encoder:
    torch.manual_seed(0)
    sizes = {"frames": 4, "size": 16, "patch": 8, "t_patch": 2, "dim": 8, "depth": 1, "heads": 2, **changes}
    return Encoder(ViTConfig(**sizes)).eval()  # type: ignore[arg-type]


def test_a_tubes_feature_serves_its_frames() -> None:
    encoder, frames = tiny_encoder(), torch.randn(4, 3, 16, 16)
    features = video_features(encoder, frames, step=4)
    with torch.no_grad():
        tokens = encoder(frames.transpose(0, 1)[None])[0, 1:].reshape(2, 2, 2, 8)
    assert features.shape == (4, 2, 2, 8)
    for t in range(4):
        assert torch.allclose(features[t], tokens[t // 2], atol=1e-6)


def test_frames_of_several_clips_take_their_mean_and_the_last_clip_ends_with_the_video() -> None:
    encoder, frames = tiny_encoder(cls_token=False), torch.randn(7, 3, 16, 16)
    features = video_features(encoder, frames, batch=2)  # clips begin at 0, 2 and, as 4 would run over, 3
    with torch.no_grad():
        clip = {s: encoder(frames[s : s + 4].transpose(0, 1)[None])[0].reshape(2, 2, 2, 8) for s in (0, 2, 3)}
    assert torch.allclose(features[0], clip[0][0], atol=1e-6)
    assert torch.allclose(features[2], (clip[0][1] + clip[2][0]) / 2, atol=1e-6)
    assert torch.allclose(features[3], (clip[0][1] + clip[2][0] + clip[3][0]) / 3, atol=1e-6)
    assert torch.allclose(features[6], clip[3][1], atol=1e-6)


def test_a_video_shorter_than_a_clip_is_lengthened_by_its_last_frame() -> None:
    encoder, frames = tiny_encoder(), torch.randn(3, 3, 16, 16)
    features = video_features(encoder, frames)
    assert features.shape == (3, 2, 2, 8)
    longer = video_features(encoder, torch.cat((frames, frames[-1:])))
    assert torch.allclose(features, longer[:3], atol=1e-6)


def test_frames_that_do_not_fit_the_encoder_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(4, 3, 8, 8\).*16, 16"):
        video_features(tiny_encoder(), torch.zeros(4, 3, 8, 8))
    with pytest.raises(ValueError, match="step=5"):
        video_features(tiny_encoder(), torch.zeros(4, 3, 16, 16), step=5)


# --- measures


def box(top: int, left: int, height: int, width: int, size: tuple[int, int] = (40, 30)) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[top : top + height, left : left + width] = True
    return mask


def test_j_is_intersection_over_union() -> None:
    a, b = box(0, 0, 4, 6), box(2, 3, 4, 6)  # 24 pixels each, 2 × 3 in common
    assert region_similarity(a, b).item() == pytest.approx(6 / 42)
    assert region_similarity(a, a).item() == 1
    assert region_similarity(a, box(20, 20, 3, 3)).item() == 0
    assert region_similarity(box(0, 0, 0, 0), box(0, 0, 0, 0)).item() == 1
    assert region_similarity(a, box(0, 0, 0, 0)).item() == 0
    assert region_similarity(torch.stack((a, a)), torch.stack((a, b))).tolist() == pytest.approx([1, 6 / 42])


def test_a_boundary_is_one_pixel_wide_and_lies_before_and_on_the_edge() -> None:
    # rows 1 and 2, columns 2 and 3 of 5 × 6: on the left and above the pixel before, on the right and below the last
    drawn = boundary(box(1, 2, 2, 2, size=(5, 6))).int().tolist()
    assert drawn == [
        [0, 1, 1, 1, 0, 0],
        [0, 1, 0, 1, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    assert boundary(box(0, 0, 5, 6, size=(5, 6))).sum() == 0  # the picture's rim is none


def test_f_is_1_for_equal_and_0_for_far_masks() -> None:
    a = box(4, 4, 8, 8)
    assert boundary_f(a, a).item() == 1
    assert boundary_f(a, box(30, 20, 5, 5)).item() == 0
    nothing = box(0, 0, 0, 0)
    assert boundary_f(nothing, nothing).item() == 1
    assert boundary_f(a, nothing).item() == 0
    assert boundary_f(nothing, a).item() == 0


def test_a_shift_within_the_tolerance_costs_f_nothing_and_beyond_it_something() -> None:
    a = box(4, 4, 8, 8)  # a diagonal of 50 pixels: the tolerance of 0.4 is rounded up to 1
    assert boundary_f(a, box(4, 5, 8, 8)).item() == 1
    assert boundary_f(a, box(4, 6, 8, 8)).item() < 1
    assert boundary_f(a, box(4, 6, 8, 8), tolerance=2 / 50).item() == 1
    assert region_similarity(a, box(4, 5, 8, 8)).item() == pytest.approx(56 / 72)


def test_the_tolerance_is_a_disk() -> None:
    a, b = (torch.zeros(300, 400, dtype=torch.bool) for _ in range(2))  # diagonal 500: tolerance 4
    a[100:, 100:] = True
    b[103:, 103:] = True  # at the corner 3 and 3 away: farther than 4; elsewhere 3
    assert boundary_f(a, b).item() < 1
    b = torch.zeros(300, 400, dtype=torch.bool)
    b[102:, 102:] = True
    assert boundary_f(a, b).item() == 1


def test_f_by_hand() -> None:
    # true: a line's two sides, 20 boundary pixels each; predicted: one of them and one far away
    true, pred = torch.zeros(20, 60, dtype=torch.bool), torch.zeros(20, 60, dtype=torch.bool)
    true[:, 10:20] = True  # boundaries in columns 9 and 19
    pred[:, 10:40] = True  # in columns 9 and 39
    assert boundary_f(pred, true).item() == pytest.approx(0.5)  # precision and recall are a half
    pred[:, 45:50] = True  # two more, in columns 44 and 49: precision 1/4, recall 1/2
    assert boundary_f(pred, true).item() == pytest.approx(2 * 0.25 * 0.5 / 0.75)


def test_the_first_and_the_last_frame_do_not_count_and_objects_weigh_alike() -> None:
    true = torch.zeros(4, 40, 30, dtype=torch.int64)
    true[:, 4:12, 4:12] = 1
    true[:, 20:24, 4:8] = 4
    pred = true.clone()
    pred[0] = pred[3] = 0  # would cost J and F
    assert j_and_f(pred, true).mean == 1
    pred[2][pred[2] == 4] = 0  # the small object is missed in one of two frames that count
    found = j_and_f(pred, true)
    assert isinstance(found, JF)
    assert found.objects == [1, 4]
    assert found.j_N.tolist() == [1, 0.5]
    assert found.f_N.tolist() == [1, 0.5]
    assert found.mean == pytest.approx(0.75)


def test_what_cannot_be_measured_is_said() -> None:
    true = torch.zeros(4, 8, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match="no object"):
        j_and_f(true, true)
    true[:, 2:4, 2:4] = 1
    with pytest.raises(ValueError, match=r"objects \[5\]"):
        j_and_f(true + 4 * true, true)
    with pytest.raises(ValueError, match="at least 3 frames"):
        j_and_f(true[:2], true[:2])


def test_a_tracked_square_scores_by_j_and_f() -> None:
    truth = pixels(squares(6, side=4, size=12, step=1))
    small = truth[:, ::PATCH, ::PATCH]
    good = j_and_f(propagate(F.one_hot(small).float(), truth[0], topk=1), truth).mean
    still = j_and_f(truth[:1].expand(6, -1, -1), truth).mean
    assert good > 0.9
    assert still < 0.6
