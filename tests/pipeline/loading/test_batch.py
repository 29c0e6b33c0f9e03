"""What is computed where the batch is: floats as numpy computes them, masks as numpy draws them."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch

from reelmae.pipeline.loading.batch import Floats, batch_ids_decode, batch_ids_keep, ids_keep_on_device, philox_bits
from reelmae.pipeline.loading.config import PIXEL_MEAN, PIXEL_STD, LoaderConfig
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.loading.loader import ClipLoader
from reelmae.pipeline.loading.order.draws import SamplePolicy
from reelmae.pipeline.loading.order.masks import DecoderMaskPolicy, MaskPolicy, ids_decode, ids_keep
from reelmae.pipeline.loading.order.philox import raw_bits

GRID = (8, 14, 14)
CPU = torch.device("cpu")
IMAGENET = {"pixel_mean": (0.485, 0.456, 0.406), "pixel_std": (0.229, 0.224, 0.225)}
SEEDS = [0, 1, 2**63 - 1, *(int(bits) >> 1 for bits in raw_bits(20, seed=5, stream=9))]


# ---- floats


def bytes_of_shape(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def normalise(clips_BCTHW: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """In float64, by the definition."""
    channel = (1, 3, 1, 1, 1)
    return (clips_BCTHW / 255 - np.reshape(mean, channel)) / np.reshape(std, channel)


def test_alike_channels_are_computed_in_one_pass_bit_for_bit() -> None:
    """The arithmetic of every run so far: one multiply-add of a scalar shift and a scalar scale."""
    pixels = bytes_of_shape(3, 3, 4, 80, 80)  # several pieces, with a border of channels within a piece
    expected = torch.add(torch.tensor(-0.45 / 0.225), torch.from_numpy(pixels).float(), alpha=1 / (255 * 0.225))
    floats = Floats(CPU, PIXEL_MEAN, PIXEL_STD)(pixels)
    assert floats.dtype == torch.float32
    assert torch.equal(floats, expected)
    assert np.abs(floats.numpy() - normalise(pixels, PIXEL_MEAN, PIXEL_STD)).max() < 1e-6


@pytest.mark.parametrize("shape", [(2, 3, 4, 80, 80), (3, 3, 1, 5, 7)])
def test_channels_that_differ_are_computed_one_by_one(shape: tuple[int, ...]) -> None:
    mean, std = IMAGENET["pixel_mean"], IMAGENET["pixel_std"]
    pixels = bytes_of_shape(*shape)
    for wrong in ((mean, PIXEL_STD), (PIXEL_MEAN, std)):  # one of both alike is not enough for one pass
        assert np.abs(Floats(CPU, *wrong)(pixels).numpy() - normalise(pixels, *wrong)).max() < 1e-6
    floats = Floats(CPU, mean, std)
    kept, again = floats(pixels), floats(255 - pixels)
    assert kept.shape == shape
    assert np.abs(kept.numpy() - normalise(pixels, mean, std)).max() < 1e-6
    assert np.abs(again.numpy() - normalise(255 - pixels, mean, std)).max() < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize(("mean", "std"), [(PIXEL_MEAN, PIXEL_STD), tuple(IMAGENET.values())])
def test_a_gpu_computes_the_same_floats(mean: tuple[float, ...], std: tuple[float, ...], gpu: torch.device) -> None:
    pixels = bytes_of_shape(2, 3, 4, 80, 80)
    floats = Floats(gpu, mean, std)(torch.from_numpy(pixels))
    assert floats.is_cuda
    assert np.abs(floats.cpu().numpy() - normalise(pixels, mean, std)).max() < 1e-6


def test_a_loader_normalises_by_its_config(natural_index: ClipIndex) -> None:
    """A whole batch by ImageNet's statistics, from the bytes that the default batch was made of."""

    def play(**settings: tuple[float, ...]) -> np.ndarray:
        sample = SamplePolicy(frames=4, size=32, stride=4)
        config = LoaderConfig(
            backend="av", batch_videos=4, repeats=2, sample=sample, patch=(2, 8, 8), workers=0, device="cpu", **settings
        )  # type: ignore[arg-type]
        with ClipLoader(natural_index, config) as loader:
            state = loader.state_dict()
            assert "pixel_mean" not in state and "pixel_std" not in state
            [batch] = islice(loader, 1)
            return batch.clips_BCTHW.numpy()

    plain = play()
    pixels = np.rint((plain.astype(np.float64) * 0.225 + 0.45) * 255).astype(np.uint8)
    assert pixels.std() > 5
    assert np.abs(plain - normalise(pixels, PIXEL_MEAN, PIXEL_STD)).max() < 1e-6
    assert np.abs(play(**IMAGENET) - normalise(pixels, *IMAGENET.values())).max() < 1e-6


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pixel_mean", (0.5, 0.5)),
        ("pixel_mean", 0.5),
        ("pixel_mean", (0.5, float("nan"), 0.5)),
        ("pixel_std", (0.2, 0.2, 0.2, 0.2)),
        ("pixel_std", (0.2, float("inf"), 0.2)),
        ("pixel_std", (0.2, 0.0, 0.2)),
        ("pixel_std", (0.2, 0.2, -0.2)),
    ],
)
def test_statistics_that_are_not_three_numbers_are_refused_with_an_example(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{name}=.*give three .*such as \(0\."):
        LoaderConfig(**{name: value})  # type: ignore[arg-type]


# ---- masks


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
