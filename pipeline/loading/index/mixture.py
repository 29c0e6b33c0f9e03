"""Several datasets played as one index.

Properties that hold:
- without weights, an epoch plays every clip of every dataset once, as if all had been sharded together;
- with weights, each dataset has its share of every stretch of the order, whatever its size (see order/epochs.py);
- labels are joined by name: numbers are the first dataset's, new names of the others follow in order;
- the digest names the datasets' digests, their order, and the weights.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence

import numpy as np

from reelmae.pipeline.errors import ConfigError, InputError
from reelmae.pipeline.loading.index.blocks import BlockChecks
from reelmae.pipeline.loading.index.clips import ClipIndex, freeze
from reelmae.pipeline.loading.index.columns import NUMBERS
from reelmae.pipeline.loading.order.epochs import ShardRange

_SAME = ("source_id", "ordinal", "check", *(name for name in NUMBERS if name != "label_id"))


def mix(datasets: Sequence[tuple[ClipIndex, float | None]]) -> ClipIndex:
    """One index of all datasets, in this order. Either each has a weight, or none has.

    Raises ConfigError where only some have a weight or one is not above 0, InputError where a dataset is empty.
    """
    indices = [index for index, _ in datasets]
    weights = _shares(datasets)
    if len(datasets) == 1:
        return indices[0]
    ends = np.cumsum([len(index.shard_names) for index in indices]).tolist()
    parts: tuple[ShardRange, ...] = (ShardRange(0, ends[-1]),)
    if weights:
        parts = tuple(ShardRange(a, b, w) for a, b, w in zip([0, *ends[:-1]], ends, weights, strict=True))
    labels = _unite_labels(index.labels for index in indices)
    codecs = sorted({name for index in indices for name in index.codec_names})
    stores = tuple(store for index in indices for store in index.stores)
    firsts = np.cumsum([0, *(len(index.stores) for index in indices)])
    clips = np.cumsum([0, *(len(index) for index in indices)])
    facts = {"datasets": [index.digest for index in indices], "weights": weights}
    return ClipIndex(
        stores=stores,
        parts=parts,
        digest=hashlib.sha256(json.dumps(facts).encode()).hexdigest(),
        shard_names=[name for index in indices for name in index.shard_names],
        shard_start=_concatenate(
            [*(i.shard_start[:-1] + n for i, n in zip(indices, clips[:-1], strict=True)), clips[-1:]]
        ),
        shard_bytes=_concatenate([index.shard_bytes for index in indices]),
        dataset_of_shard=_concatenate(
            [index.dataset_of_shard + np.int32(n) for index, n in zip(indices, firsts[:-1], strict=True)]
        ),
        codec_names=codecs,
        codec_of_clip=_concatenate(
            [np.array([codecs.index(c) for c in i.codec_names], np.int8)[i.codec_of_clip] for i in indices]
        ),
        label_id=_concatenate([_renumber_labels(index, labels) for index in indices]),
        left_out=sum(index.left_out for index in indices),
        unselected=sum(index.unselected for index in indices),
        labels=labels,
        blocks=BlockChecks.join([i.blocks.shifted(int(n)) for i, n in zip(indices, clips[:-1], strict=True)]),
        **{name: _concatenate([getattr(index, name) for index in indices]) for name in _SAME},
    )


def _shares(datasets: Sequence[tuple[ClipIndex, float | None]]) -> list[float] | None:
    """The weights, scaled to a sum of 1; None where there are none."""
    if not datasets:
        raise ConfigError("no dataset to play; give at least one")
    weights = [weight for _, weight in datasets if weight is not None]
    urls = ["+".join(store.url() for store in index.stores) for index, _ in datasets]
    for url, (index, weight) in zip(urls, datasets, strict=True):
        if weight is None and weights:
            raise ConfigError(f"{url} has no weight, others have; give each dataset a weight, or none")
        if weight is not None and not (weight > 0 and math.isfinite(weight)):
            raise ConfigError(f"weight={weight} of {url}: must be above 0; leave the dataset out to not play it")
        if not len(index):
            raise InputError(f"{url}: has no clips to mix; leave it out")
        if len(index.parts) > 1:
            raise ConfigError(f"{url}: is mixed by weights already; mix all the datasets at once")
    return [weight / sum(weights) for weight in weights] if weights else None


def _unite_labels(labels: Iterable[dict[str, int]]) -> dict[str, int]:
    """Names to numbers: the first dataset's as they are, then the new names of each further dataset, in its order."""
    united: dict[str, int] = {}
    for names in labels:
        after = max(united.values(), default=-1) + 1
        if not united:
            united = dict(names)
            continue
        new = sorted((n for n in names if n not in united), key=names.__getitem__)
        united |= {name: after + i for i, name in enumerate(new)}
    return united


def _renumber_labels(index: ClipIndex, labels: dict[str, int]) -> np.ndarray:
    """int32 [N]: the clips' labels, as numbers of the united `labels`."""
    if all(labels[name] == number for name, number in index.labels.items()):
        return index.label_id
    number = np.full(max(index.labels.values()) + 2, -1, np.int32)  # the last stands for -1
    for name, old in index.labels.items():
        number[old] = labels[name]
    return number[index.label_id]


def _concatenate(columns: list[np.ndarray]) -> np.ndarray:
    return freeze(np.concatenate(columns))
