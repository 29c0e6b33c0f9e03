"""Which blocks of a clip are read, and what is made of them."""

from __future__ import annotations

import random

import pytest

from reelmae.pipeline import schema
from reelmae.pipeline.loading.fetch import blocks
from reelmae.pipeline.loading.fetch.blocks import ClipParts, Need, blocks_of, is_worth_it, join, piece_of
from reelmae.pipeline.loading.fetch.clip import DATASET_JSON
from reelmae.pipeline.loading.tasks import ClipTask

BLOCK = blocks.BLOCK


def test_what_workers_know_of_the_format_is_what_the_schema_says() -> None:
    assert (blocks.BLOCK, blocks.CHECK, DATASET_JSON) == (schema.BLOCK, schema.BLOCK_CHECK, schema.DATASET_JSON)


def test_the_example_of_the_docstring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 4)
    monkeypatch.setattr(blocks, "GAP", 0)
    need = Need(3, ((3, 7), (17, 20)))
    assert blocks_of(need, 22) == [0, 1, 4]
    monkeypatch.setattr(blocks, "GAP", 2)
    assert blocks_of(need, 22) == [0, 1, 2, 3, 4]


def test_every_needed_byte_is_in_a_block_and_no_hole_is_longer_than_it_must_be() -> None:
    rng = random.Random(0)
    for _ in range(300):
        size = rng.randrange(1, 40 * BLOCK)
        starts = [rng.randrange(size) for _ in range(rng.randrange(4))]
        ranges = tuple((a, min(size, a + rng.randrange(1, 3 * BLOCK))) for a in starts)
        head = rng.randrange(1, min(size, BLOCK) + 1)
        chosen = blocks_of(Need(head, ranges), size)
        assert chosen == sorted(set(chosen)) and chosen[0] >= 0 and chosen[-1] <= (size - 1) // BLOCK
        asked = {byte // BLOCK for a, b in ((0, head), *ranges) for byte in (a, *range(a, b, BLOCK), b - 1)}
        assert asked <= set(chosen)
        between = [b for b in chosen if b not in asked]
        assert all(any(a in asked for a in range(b - blocks.GAP, b)) for b in between)
    assert blocks_of(Need(1, ((6 * BLOCK, 6 * BLOCK + 1), (12 * BLOCK, 12 * BLOCK + 1))), 20 * BLOCK) == [0, 6, 12]
    assert blocks_of(Need(1, ((3 * BLOCK - 1, 3 * BLOCK + 1),)), 20 * BLOCK) == [0, 1, 2, 3]


def test_a_part_is_read_where_it_is_less_than_half() -> None:
    assert is_worth_it(range(9), 20 * BLOCK) and not is_worth_it(range(10), 20 * BLOCK)


def test_blocks_lie_where_the_index_says_and_the_last_may_be_shorter() -> None:
    data = random.Random(0).randbytes(2 * BLOCK + 100)
    task = ClipTask(0, "key", 0, "a.tar", 512, len(data), 0, 16, (), 0, 0, 0, schema.block_checks(data))
    shard = bytes(512) + data
    for block in range(3):
        piece = piece_of(task, block)
        part = shard[piece.offset : piece.offset + piece.size]
        assert part == data[block * BLOCK : (block + 1) * BLOCK]
        assert piece.check == int.from_bytes(schema.block_checks(part), "big")
    assert piece_of(task, 2).size == 100


def test_parts_give_their_bytes_and_nothing_of_a_hole() -> None:
    data = random.Random(1).randbytes(6 * BLOCK + 10)
    cut = {b: data[b * BLOCK : (b + 1) * BLOCK] for b in (4, 0, 1, 6)}
    parts = join(cut, len(data))
    assert isinstance(parts, ClipParts) and (parts.starts, parts.n_read) == ([0, 4 * BLOCK, 6 * BLOCK], 3 * BLOCK + 10)
    assert bytes(parts.take(BLOCK - 5, 10)) == data[BLOCK - 5 : BLOCK + 5]
    assert bytes(parts.take(4 * BLOCK, BLOCK)) == cut[4]
    assert bytes(parts.take(6 * BLOCK, 10)) == cut[6]
    for offset, size in ((2 * BLOCK - 1, 2), (3 * BLOCK, 1), (5 * BLOCK - 3, 4), (6 * BLOCK, 11)):
        with pytest.raises(ValueError, match=f"bytes {offset} to {offset + size} were not read"):
            parts.take(offset, size)
