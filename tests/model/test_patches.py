"""Patches: the order of tokens and of the values inside them, and the way back."""

from __future__ import annotations

import pytest
import torch

from reelmae.model.patches import gather_patches, patchify, unpatchify

SIZES = [
    ((2, 3, 8, 32, 32), 2, 8),
    ((1, 3, 16, 48, 48), 2, 16),
    ((3, 3, 4, 12, 12), 1, 4),
    ((1, 1, 6, 8, 8), 3, 2),
]


@pytest.mark.parametrize(("shape", "t_patch", "patch"), SIZES)
def test_unpatchify_inverts_patchify(shape: tuple[int, ...], t_patch: int, patch: int) -> None:
    clips = torch.randn(shape)
    grid = (shape[2] // t_patch, shape[3] // patch, shape[4] // patch)
    assert torch.equal(unpatchify(patchify(clips, t_patch, patch), grid, t_patch, patch), clips)


def test_tokens_are_t_major_and_values_frame_row_column_channel() -> None:
    clips = torch.randn(2, 3, 4, 12, 8)  # grid 2 × 3 × 2 at t_patch 2, patch 4
    patches = patchify(clips, 2, 4)
    assert patches.shape == (2, 12, 2 * 4 * 4 * 3)
    for t, h, w in [(0, 0, 0), (0, 2, 1), (1, 1, 0), (1, 2, 1)]:
        cube = clips[1, :, t * 2 : t * 2 + 2, h * 4 : h * 4 + 4, w * 4 : w * 4 + 4]
        values = [cube[c, u, p, q] for u in range(2) for p in range(4) for q in range(4) for c in range(3)]
        assert torch.equal(patches[1, (t * 3 + h) * 2 + w], torch.stack(values))


@pytest.mark.parametrize(("shape", "t_patch", "patch"), SIZES)
def test_gathered_patches_are_those_of_patchify(shape: tuple[int, ...], t_patch: int, patch: int) -> None:
    clips = torch.randn(shape)
    patches = patchify(clips, t_patch, patch)
    ids = torch.stack([torch.randperm(patches.shape[1])[:3] for _ in range(shape[0])])
    expected = patches.gather(1, ids[..., None].expand(-1, -1, patches.shape[2]))
    assert torch.equal(gather_patches(clips, ids, t_patch, patch), expected)


def test_patches_of_some_frames_are_those_of_the_clip_of_these_frames() -> None:
    clips = torch.randn(2, 3, 8, 12, 8)
    index = torch.tensor([0, 3, 4, 7])
    ids = torch.tensor([[11, 0, 5], [3, 9, 1]])
    expected = gather_patches(clips[:, :, index], ids, 2, 4)
    assert torch.equal(gather_patches(clips, ids, 2, 4, index), expected)
