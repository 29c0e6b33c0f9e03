"""Positions for another grid."""

from __future__ import annotations

import torch

from reelmae.model.weights.interpolate import resize_joint, resize_spatial, resize_temporal


def test_the_same_grid_changes_nothing() -> None:
    table = torch.rand(1, 12, 5)
    assert resize_spatial(table, (3, 4), (3, 4)) is table
    assert resize_temporal(table, 12) is table
    assert torch.equal(resize_joint(table, (3, 2, 2), (3, 2, 2)), table)


def test_time_is_linear_at_the_centres_of_the_new_cells() -> None:
    table = torch.tensor([[[0.0], [4.0]]])
    assert resize_temporal(table, 4)[0, :, 0].tolist() == [0, 1, 3, 4]
    assert resize_temporal(torch.arange(8.0).reshape(1, 8, 1), 4)[0, :, 0].tolist() == [0.5, 2.5, 4.5, 6.5]


def test_a_constant_stays_the_constant() -> None:
    assert torch.allclose(resize_spatial(torch.full((1, 9, 2), 3.0), (3, 3), (5, 5)), torch.tensor(3.0))
    wider = resize_joint(torch.full((1, 18, 2), 3.0), (2, 3, 3), (4, 2, 2))
    assert wider.shape == (1, 16, 2)
    assert torch.allclose(wider, torch.tensor(3.0))


def test_rows_stay_rows_and_columns_columns() -> None:
    rows = torch.arange(8.0)[:, None].expand(8, 8).reshape(1, 64, 1)
    wide = resize_spatial(rows, (8, 8), (16, 16)).reshape(16, 16)
    assert torch.allclose(wide, wide[:, :1].expand(16, 16), atol=1e-5)
    assert torch.allclose(wide[4:12, 0], torch.arange(1.75, 5.5, 0.5), atol=1e-5)  # the inside of a ramp


def test_a_joint_table_of_sums_is_resized_as_its_parts_are() -> None:
    spatial, temporal = torch.rand(1, 16, 3), torch.rand(1, 4, 3)
    joint = (temporal[:, :, None] + spatial[:, None]).flatten(1, 2)
    wide = resize_joint(joint, (4, 4, 4), (6, 7, 7))
    parts = resize_temporal(temporal, 6)[:, :, None] + resize_spatial(spatial, (4, 4), (7, 7))[:, None]
    assert torch.allclose(wide, parts.flatten(1, 2), atol=1e-5)


def test_the_dtype_is_kept() -> None:
    assert resize_spatial(torch.rand(1, 4, 2).bfloat16(), (2, 2), (3, 3)).dtype == torch.bfloat16
