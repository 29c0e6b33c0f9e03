"""The loader over what is not one local folder: object storage, a shard cache, selections, mixed datasets."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import fsspec
import pytest
import torch

from reelmae.pipeline.errors import ConfigError
from reelmae.pipeline.loading.batch import ClipBatch
from reelmae.pipeline.loading.config import LoaderConfig
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.loading.index.mixture import mix
from reelmae.pipeline.loading.index.selection import Selection
from reelmae.pipeline.loading.loader import ClipLoader
from reelmae.pipeline.loading.order.draws import SamplePolicy

SAMPLE = SamplePolicy(frames=4, size=32, stride=4)
HANGS_S = 120  # only what never ends takes so long, on any machine


def config(**settings: object) -> LoaderConfig:
    base = {"backend": "av", "workers": 0, "device": "cpu", "sample": SAMPLE, "patch": (2, 8, 8)}
    order = {"batch_videos": 4, "lanes": 4, "seed": 7}
    return LoaderConfig(**{**base, **order, **settings})  # type: ignore[arg-type]


def play(
    index: ClipIndex, n: int, *, state: dict | None = None, **settings: object
) -> tuple[list[ClipBatch], ClipLoader]:
    with ClipLoader(index, config(**settings)) as loader:
        if state is not None:
            loader.load_state_dict(state)
        return list(islice(loader, n)), loader


def same(a: list[ClipBatch], b: list[ClipBatch]) -> bool:
    return all(
        x.draws == y.draws and x.clip_B.tolist() == y.clip_B.tolist() and torch.equal(x.clips_BCTHW, y.clips_BCTHW)
        for x, y in zip(a, b, strict=True)
    )


@pytest.fixture
def remote_index(natural_index: ClipIndex, s3_server, tmp_path: Path) -> ClipIndex:
    """natural_index, 22 clips in 4 shards, in a bucket."""
    url = s3_server.url(f"loader/{tmp_path.name}")
    fs = fsspec.filesystem("s3")
    fs.put(natural_index.store.url() + "/", url + "/", recursive=True)
    return ClipIndex.open(url)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bucket_plays_what_the_folder_plays_with_and_without_a_cache(
    natural_index: ClipIndex, remote_index: ClipIndex, tmp_path: Path, workers: int
) -> None:
    local, _ = play(natural_index, 12)
    ranged, _ = play(remote_index, 12, workers=workers)
    cached, _ = play(remote_index, 12, workers=workers, cache=str(tmp_path / "cache"))
    assert remote_index.digest == natural_index.digest
    assert same(local, ranged)
    assert same(local, cached)


def shards_in(folder: Path) -> int:
    return len([p for p in folder.rglob("*.shard") if p.is_file()])


def test_a_cache_that_holds_all_shards_outlives_the_bucket_and_the_loader(
    natural_index: ClipIndex, remote_index: ClipIndex, tmp_path: Path
) -> None:
    whole, _ = play(natural_index, 10)
    cache = tmp_path / "cache"
    with ClipLoader(remote_index, config(cache=str(cache))) as loader:
        batches = iter(loader)
        first = [next(batches) for _ in range(5)]
        deadline = time.monotonic() + HANGS_S
        while shards_in(cache) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        state = loader.state_dict()
    assert same(first, whole[:5])
    fsspec.filesystem("s3").rm(remote_index.store.url("shards"), recursive=True)
    rest, loader = play(remote_index, 5, state=state, cache=str(cache))
    assert not loader.stats.bad
    assert same(rest, whole[5:])


def test_a_cache_smaller_than_a_shard_is_refused_with_the_remedy(remote_index: ClipIndex, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"shard shards/.*bytes.*cache"):
        play(remote_index, 1, cache=str(tmp_path / "cache"), cache_gb=1e-6)


def test_a_local_dataset_is_not_copied_into_a_cache(natural_index: ClipIndex, tmp_path: Path) -> None:
    play(natural_index, 6, cache=str(tmp_path / "cache"))
    assert shards_in(tmp_path) == 0


def test_a_selection_is_what_is_played_and_cannot_be_changed_in_mid_run(natural_index: ClipIndex) -> None:
    url = natural_index.store.url()
    chosen = ClipIndex.open(url, Selection(where="frames > 48 and label == 'a'"))
    assert len(chosen) == 8
    batches, loader = play(chosen, 4, batch_videos=2)
    for batch in batches:
        assert (chosen.frames[batch.clip_B] > 48).all()
        assert set(batch.label_B.tolist()) == {chosen.labels["a"]}
    state = json.loads(json.dumps(loader.state_dict()))
    with pytest.raises(ConfigError, match=r"made on another index.*selection"):
        play(natural_index, 1, batch_videos=2, state=state)


def test_datasets_mixed_by_weights_are_played_in_these_shares_and_resume(make_dataset: Callable, spec: type) -> None:
    few = make_dataset([spec(frames=20, seed=s, label="x") for s in range(8)])
    many = make_dataset([spec(frames=20, seed=s % 4, label="y") for s in range(24)])
    both = mix([(few, 0.75), (many, 0.25)])
    whole, _ = play(both, 16, batch_videos=4)
    shares = Counter(both.dataset(int(clip)) for batch in whole for clip in batch.clip_B)
    assert shares == {0: 48, 1: 16}
    x, y = both.labels["x"], both.labels["y"]
    label_of = [(int(clip), int(label)) for b in whole for clip, label in zip(b.clip_B, b.label_B, strict=True)]
    assert all(label == (x, y)[both.dataset(clip)] for clip, label in label_of)
    drawn = [d for batch in whole for d in batch.draws]
    assert len({d.mask_seed for d in drawn}) == len(drawn)  # a clip that comes again in an epoch is drawn anew
    _, first = play(both, 5, batch_videos=4)
    rest, _ = play(both, 11, batch_videos=4, state=first.state_dict())
    assert same(rest, whole[5:])


def test_a_bad_clip_of_a_mix_is_replaced_by_one_of_its_own_dataset(make_dataset: Callable, spec: type) -> None:
    few = make_dataset([*(spec(frames=20, seed=s) for s in range(7)), spec(frames=20, spoiled="all")])
    many = make_dataset([spec(frames=20, seed=s % 4) for s in range(24)])
    both = mix([(many, 0.5), (few, 0.5)])
    batches, loader = play(both, 8, batch_videos=4)
    assert list(loader.stats.bad) == [both.key(31)]
    shares = Counter(both.dataset(int(clip)) for batch in batches for clip in batch.clip_B)
    assert shares == {0: 16, 1: 16}
