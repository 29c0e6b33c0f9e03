"""Positions: spatial plus temporal, t-major."""

from __future__ import annotations

import torch

from reelmae.model.positions import SeparablePositions


def test_a_position_is_spatial_plus_temporal_t_major() -> None:
    pos = SeparablePositions((3, 2, 4), 5)
    tokens = pos.tokens()
    assert tokens.shape == (1, 24, 5)
    for t, h, w in [(0, 0, 0), (0, 1, 3), (2, 0, 1), (1, 1, 2)]:
        expected = pos.spatial[0, h * 4 + w] + pos.temporal[0, t]
        assert torch.equal(tokens[0, (t * 2 + h) * 4 + w], expected)


def test_positions_of_some_tokens_follow_the_order_of_the_ids() -> None:
    pos = SeparablePositions((2, 3, 3), 4)
    ids = torch.tensor([[17, 0, 5], [3, 9, 1]])
    assert torch.equal(pos.at(ids), pos.tokens()[0][ids])
