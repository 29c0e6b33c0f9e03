"""The backends against each other and against clips that carry their own frame numbers."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from reelmae.pipeline.errors import ConfigError
from reelmae.pipeline.loading.batch import ClipBatch
from reelmae.pipeline.loading.config import PIXEL_MEAN, PIXEL_STD, LoaderConfig
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.loading.loader import ClipLoader
from reelmae.pipeline.loading.order.draws import SamplePolicy, frame_indices

# Mean absolute difference in levels of 255: av resizes Y, U and V, DALI RGB, and each rounds in its own places.
TOLERANCE = 0.25
WORST_PIXEL = 4
REAL_TOLERANCE = 0.4
WHOLE = SamplePolicy(frames=8, size=48, scale=(1, 1), ratio=(1, 1), flip=False, stride=4)
BACKENDS = [("av", "h264"), ("av", "vp9"), ("dali-cpu", "vp9")]


def take(index: ClipIndex, n: int, **config: object) -> tuple[list[ClipBatch], ClipLoader]:
    settings = {"batch_videos": 2, "workers": 1, "patch": (2, 16, 16), "device": "cpu", **config}
    with ClipLoader(index, LoaderConfig(**settings)) as loader:  # type: ignore[arg-type]
        return list(islice(loader, n)), loader


def levels(batch: ClipBatch) -> np.ndarray:
    """[B, T, H, W, C] in levels of 255."""
    return ((batch.clips_BCTHW * PIXEL_STD[0] + PIXEL_MEAN[0]) * 255).permute(0, 2, 3, 4, 1).cpu().numpy()


@pytest.mark.parametrize(("backend", "codec"), BACKENDS)
@pytest.mark.parametrize("repeats", [1, 3])
def test_frames_are_exactly_those_drawn(
    make_dataset: Callable, spec: type, read_numbers: Callable, backend: str, codec: str, repeats: int
) -> None:
    lengths = [100, 70, 29, 12, 3, 64]  # a window is 29 frames: the last but one are padded
    index = make_dataset([spec(frames=n, height=96, width=96, numbered=True, codec=codec) for n in lengths])
    batches, _ = take(index, 6, backend=backend, repeats=repeats, sample=WHOLE)
    for batch in batches:
        for clip, picture, d in zip(batch.clip_B, levels(batch), batch.draws, strict=True):
            assert read_numbers(picture) == frame_indices(d, 8, lengths[clip]).tolist()
    assert len({d.start for batch in batches for d in batch.draws}) > 3


@pytest.mark.parametrize("repeats", [1, 2])
def test_av_and_dali_give_the_same_clip_from_the_same_draws(make_dataset: Callable, spec: type, repeats: int) -> None:
    index = make_dataset(
        [spec(frames=n, height=160, width=208, codec="vp9", seed=n) for n in (70, 40, 20, 5)]  # 5 and 20 are padded
    )
    sample = SamplePolicy(frames=8, size=112, scale=(0.3, 1), stride=4)
    av, _ = take(index, 4, backend="av", repeats=repeats, sample=sample)
    dali, _ = take(index, 4, backend="dali-cpu", repeats=repeats, sample=sample)
    assert {d.flip for batch in av for d in batch.draws} == {True, False}
    for a, b in zip(av, dali, strict=True):
        assert a.draws == b.draws
        assert (a.clip_B == b.clip_B).all()
        assert torch.equal(a.ids_keep_BK, b.ids_keep_BK)
        difference = levels(a) - levels(b)
        assert np.abs(difference).mean(axis=(1, 2, 3, 4)).max() < TOLERANCE
        assert np.abs(difference).max() < WORST_PIXEL
        assert np.abs(difference.mean()) < 0.05  # no bias


def test_av_and_dali_give_the_same_clips_of_real_video(corpus: Path, make_dataset: Callable, spec: type) -> None:
    names = ["hitting_baseball/hitting_baseball.mp4", "using_segway/WUzgd7C1pWA.mp4", "yoga/yoga.mp4"]
    files = [str(corpus / "kinetics_style" / name) for name in names]
    index = make_dataset([spec(frames=40, height=256, width=336, codec="vp9", video=f) for f in files] * 2)
    sample = SamplePolicy(frames=8, size=224, stride=4)
    av, _ = take(index, 3, backend="av", repeats=2, sample=sample)
    dali, _ = take(index, 3, backend="dali-cpu", repeats=2, sample=sample)
    for a, b in zip(av, dali, strict=True):
        difference = levels(a) - levels(b)
        assert levels(a).std() > 20  # there is something to see
        assert np.abs(difference).mean(axis=(1, 2, 3, 4)).max() < REAL_TOLERANCE
        assert np.abs(difference.mean()) < 0.1


@pytest.mark.parametrize("policy", ["windows", "span"])
def test_decode_policies_give_equal_pixels_and_auto_decodes_least(
    make_dataset: Callable, spec: type, policy: str
) -> None:
    index = make_dataset([spec(frames=n, seed=n) for n in (300, 290, 60, 20)])
    sample = SamplePolicy(frames=8, size=48, stride=4)
    auto, a = take(index, 2, backend="av", repeats=3, sample=sample)
    other, b = take(index, 2, backend="av", repeats=3, sample=sample, decode=policy)
    assert all(torch.equal(x.clips_BCTHW, y.clips_BCTHW) for x, y in zip(auto, other, strict=True))
    assert a.stats.frames_decoded < b.stats.frames_decoded


def test_shards_of_the_sampled_rate_are_decoded_frame_for_frame(make_dataset: Callable, spec: type) -> None:
    """One recipe, 8 frames at 7.5 a second, plays shards of both rates: the same seconds, a quarter of the frames."""
    sample = SamplePolicy(frames=8, size=48, fps=7.5)
    full = make_dataset([spec(frames=160, fps=30)] * 4)
    sampled = make_dataset([spec(frames=40, fps=7.5)] * 4)
    a, of_full = take(full, 2, backend="av", sample=sample)
    b, of_sampled = take(sampled, 2, backend="av", sample=sample)
    assert {d.stride for batch in a for d in batch.draws} == {4}
    assert {d.stride for batch in b for d in batch.draws} == {1}
    assert of_sampled.stats.frames_decoded <= 4 * (8 + 15)
    assert of_full.stats.frames_decoded > 4 * 28


def test_several_pipelines_of_dali_give_what_one_gives_in_order(make_dataset: Callable, spec: type) -> None:
    index = make_dataset([spec(frames=40, codec="vp9", seed=s % 3) for s in range(8)])
    sample = SamplePolicy(frames=4, size=48, stride=4)
    one, _ = take(index, 8, backend="dali-cpu", sample=sample, prefetch=3)
    three, _ = take(index, 8, backend="dali-cpu", sample=sample, prefetch=3, pipelines=3)
    for a, b in zip(one, three, strict=True):
        assert (a.clip_B == b.clip_B).all()
        assert torch.equal(a.clips_BCTHW, b.clips_BCTHW)


@pytest.mark.parametrize(("backend", "codec"), BACKENDS)
def test_a_clip_that_does_not_decode_though_its_bytes_are_its_own_costs_one_clip(
    make_dataset: Callable, spec: type, backend: str, codec: str
) -> None:
    good = [spec(frames=30, codec=codec, seed=s) for s in range(7)]
    index = make_dataset([*good, spec(frames=30, codec=codec, spoiled="all")])
    batches, loader = take(index, 4, backend=backend, repeats=2, sample=SamplePolicy(frames=4, size=48))
    assert 7 not in {int(clip) for batch in batches for clip in batch.clip_B}
    assert list(loader.stats.bad) == [index.key(7)]


def test_damage_that_is_part_of_a_clip_is_noticed_and_not_concealed(make_dataset: Callable, spec: type) -> None:
    """FFmpeg would paint over it: such a clip is bad, though its bytes are those of the index."""
    good = [spec(frames=40, seed=s, width=192, height=192) for s in range(3)]
    index = make_dataset([*good, spec(frames=40, seed=3, width=192, height=192, spoiled="some")])
    _, loader = take(index, 2, backend="av", repeats=4, sample=SamplePolicy(frames=8, size=48, stride=4))
    assert list(loader.stats.bad) == [index.key(3)]
    assert "does not decode" in loader.stats.bad[index.key(3)]


@pytest.mark.parametrize("policy", ["auto", "windows"])
def test_frames_of_a_clip_with_b_frames_are_those_drawn(
    make_dataset: Callable, spec: type, read_numbers: Callable, policy: str
) -> None:
    """None that we make has them; in such a clip pictures do not come in the order in which they are shown."""
    index = make_dataset(
        [spec(frames=n, height=96, width=96, numbered=True, codec="h264 with B-frames") for n in (100, 70, 30, 64)]
    )
    batches, loader = take(index, 4, backend="av", repeats=3, sample=WHOLE, decode=policy)
    assert not loader.stats.bad
    lengths = [100, 70, 30, 64]
    for batch in batches:
        for clip, picture, d in zip(batch.clip_B, levels(batch), batch.draws, strict=True):
            assert read_numbers(picture) == frame_indices(d, 8, lengths[clip]).tolist()


def test_pixels_are_the_clips_own(make_dataset: Callable, spec: type) -> None:
    """Against plain PyAV: decode all, convert with to_ndarray, no resize."""
    import io

    import av

    index = make_dataset([spec(frames=20, height=96, width=96)] * 2)
    sample = SamplePolicy(frames=8, size=96, scale=(1, 1), ratio=(1, 1), flip=False, stride=2)
    [batch], _ = take(index, 1, backend="av", sample=sample)
    data = index.store.read_range(index.shard(0), int(index.offset[0]), int(index.size[0]))
    with av.open(io.BytesIO(data)) as container:
        plain = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)]).astype(float)
    expected = plain[frame_indices(batch.draws[0], 8, 20)]
    assert np.abs(levels(batch)[0] - expected).mean() < 1.5  # to_ndarray's quick conversion is a level too dark


def test_a_flipped_sample_is_the_mirror_of_the_plain_one(make_dataset: Callable, spec: type) -> None:
    index = make_dataset([spec(frames=8, seed=s, height=96, width=96) for s in range(8)])
    base = {"frames": 8, "size": 96, "scale": (1, 1), "ratio": (1, 1), "stride": 1}
    flipping, _ = take(index, 4, backend="av", sample=SamplePolicy(**base, flip=True))  # type: ignore[arg-type]
    plain, _ = take(index, 4, backend="av", sample=SamplePolicy(**base, flip=False))  # type: ignore[arg-type]
    seen = set()
    for a, b in zip(flipping, plain, strict=True):
        for d, x, y in zip(a.draws, a.clips_BCTHW, b.clips_BCTHW, strict=True):
            seen.add(d.flip)
            assert torch.equal(x, y.flip(-1) if d.flip else y)
    assert seen == {True, False}


def test_a_clip_is_decoded_once_for_all_its_repeats_and_only_from_a_keyframe(
    make_dataset: Callable, spec: type
) -> None:
    index = make_dataset([spec(frames=300)] * 4)
    sample = SamplePolicy(frames=8, size=48, stride=4)  # a window of 29 frames; a keyframe every 16
    _, one = take(index, 2, backend="av", repeats=1, sample=sample)
    _, four = take(index, 2, backend="av", repeats=4, sample=sample)
    assert one.stats.frames_decoded <= 4 * (29 + 15)
    assert four.stats.frames_decoded <= 4 * 4 * (29 + 15)
    assert four.stats.bytes_read == one.stats.bytes_read
    _, many = take(index, 2, backend="av", repeats=40, sample=sample)
    assert many.stats.frames_decoded <= 4 * 300  # 40 windows of 29 frames, yet no frame twice
    assert (many.stats.videos, many.stats.clips, many.stats.frames_used) == (4, 160, 1280)


def test_dali_cpu_refuses_h264_with_a_remedy(natural_index: ClipIndex) -> None:
    with pytest.raises(ConfigError, match=r"dali-cpu.*cannot decode h264.*backend=av.*--profile vp9"):
        take(natural_index, 1, backend="dali-cpu")


def test_dali_refuses_a_decode_policy_that_it_cannot_follow(make_dataset: Callable, spec: type) -> None:
    index = make_dataset([spec(frames=20, codec="vp9")] * 4)
    with pytest.raises(ConfigError, match=r"decode='span' with backend dali-cpu.*backend=av"):
        take(index, 1, backend="dali-cpu", decode="span", sample=WHOLE)


def test_dali_gpu_on_a_cpu_is_refused_with_a_remedy(natural_index: ClipIndex) -> None:
    with pytest.raises(ConfigError, match=r"dali-gpu.*needs an NVIDIA GPU.*backend=av"):
        take(natural_index, 1, backend="dali-gpu")


def test_auto_on_a_cpu_is_av_and_says_why(natural_index: ClipIndex) -> None:
    with ClipLoader(natural_index, LoaderConfig(backend="auto", device="cpu")) as loader:
        assert loader.backend == "av"
        assert "CPU" in loader.backend_reason


@pytest.mark.gpu
@pytest.mark.parametrize("codec", ["h264", "vp9"])
def test_dali_gpu_gives_the_same_clips_as_av(make_dataset: Callable, spec: type, codec: str, gpu: torch.device) -> None:
    index = make_dataset([spec(frames=n, height=160, width=208, codec=codec, seed=n) for n in (70, 40, 20, 5)])
    sample = SamplePolicy(frames=8, size=112, scale=(0.3, 1), stride=4)
    av, _ = take(index, 4, backend="av", repeats=2, sample=sample)
    dali, _ = take(index, 4, backend="dali-gpu", device=str(gpu), repeats=2, sample=sample)
    for a, b in zip(av, dali, strict=True):
        assert a.draws == b.draws
        assert b.clips_BCTHW.is_cuda
        assert np.abs(levels(a) - levels(b)).mean(axis=(1, 2, 3, 4)).max() < 1.5
