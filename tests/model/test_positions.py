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


def test_sincos_positions_are_alike_among_neighbours_from_the_start() -> None:
    torch.manual_seed(0)
    t, h, w, dim = 8, 8, 8, 96
    tokens = SeparablePositions((t, h, w), dim, init="sincos").tokens()[0].reshape(t, h, w, dim)
    at = tokens[3, 3, 3]
    for one, two, far in [
        (tokens[4, 3, 3], tokens[5, 3, 3], tokens[7, 3, 3]),
        (tokens[3, 4, 3], tokens[3, 5, 3], tokens[3, 7, 3]),
        (tokens[3, 3, 4], tokens[3, 3, 5], tokens[3, 3, 7]),
    ]:
        near, further, furthest = ((at - other).norm() for other in (one, two, far))
        assert 0.1 < near < further < furthest
    distinct = torch.cdist(tokens.reshape(-1, dim), tokens.reshape(-1, dim)) + torch.eye(t * h * w) * 9
    assert distinct.min() > 0.1
