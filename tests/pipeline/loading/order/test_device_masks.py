"""The masks that tensors draw are those that numpy draws."""

import numpy as np
import pytest
import torch

from reelmae.pipeline.loading.order.device_masks import (
    batch_ids_decode,
    batch_ids_keep,
    ids_keep_on_device,
    philox_bits,
)
from reelmae.pipeline.loading.order.masks import DecoderMaskPolicy, MaskPolicy, ids_decode, ids_keep
from reelmae.pipeline.loading.order.philox import raw_bits

GRID = (8, 14, 14)
CPU = torch.device("cpu")
SEEDS = [0, 1, 2**63 - 1, *(int(bits) >> 1 for bits in raw_bits(20, seed=5, stream=9))]


@pytest.mark.parametrize("n", [1, 4, 1567])
def test_random_words_on_tensors_are_numpys_own(n: int) -> None:
    words = philox_bits(torch.tensor(SEEDS), 3, n).numpy().view(np.uint64)
    assert (words == np.stack([raw_bits(n, seed=seed, stream=3) for seed in SEEDS])).all()


@pytest.mark.parametrize(("kind", "ratio"), [("random", 0.9), ("tube", 0.9), ("frame", 0.75)])
def test_masks_drawn_on_a_device_are_those_drawn_by_numpy(kind: str, ratio: float) -> None:
    policy = MaskPolicy(kind, ratio)  # type: ignore[arg-type]
    ids = ids_keep_on_device(policy, torch.tensor(SEEDS), GRID)
    assert ids.dtype == torch.int64
    assert (ids.numpy() == np.stack([ids_keep(policy, seed, GRID) for seed in SEEDS])).all()


@pytest.mark.parametrize("kind", ["random", "tube", "frame", "block"])
def test_a_batch_of_masks_is_its_samples_masks(kind: str) -> None:
    policy = MaskPolicy(kind, 0.75)  # type: ignore[arg-type]
    ids = batch_ids_keep(policy, SEEDS, GRID, CPU)
    assert (ids.numpy() == np.stack([ids_keep(policy, seed, GRID) for seed in SEEDS])).all()


def test_decoder_masks_of_a_batch_are_its_samples() -> None:
    policy = DecoderMaskPolicy("cells", 0.5)
    ids = batch_ids_decode(policy, SEEDS, GRID, CPU)
    assert ids is not None
    assert (ids.numpy() == np.stack([ids_decode(policy, seed, GRID) for seed in SEEDS])).all()
    assert batch_ids_decode(DecoderMaskPolicy(), SEEDS, GRID, CPU) is None


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "ratio"), [("random", 0.9), ("tube", 0.9), ("frame", 0.75)])
def test_a_gpu_draws_the_same_masks(kind: str, ratio: float, gpu: torch.device) -> None:
    policy = MaskPolicy(kind, ratio)  # type: ignore[arg-type]
    ids = batch_ids_keep(policy, SEEDS, GRID, gpu)
    assert ids.is_cuda
    assert (ids.cpu().numpy() == np.stack([ids_keep(policy, seed, GRID) for seed in SEEDS])).all()
