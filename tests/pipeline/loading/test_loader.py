import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from reelmae.pipeline.errors import ConfigError, TooManyBadClipsError
from reelmae.pipeline.loading.batch import ClipBatch
from reelmae.pipeline.loading.config import LoaderConfig
from reelmae.pipeline.loading.decode.av_pool import AvPool
from reelmae.pipeline.loading.index.clips import ClipIndex
from reelmae.pipeline.loading.loader import ClipLoader
from reelmae.pipeline.loading.order.draws import SamplePolicy
from reelmae.pipeline.loading.order.masks import DecoderMaskPolicy, MaskPolicy, ids_decode

SAMPLE = SamplePolicy(frames=4, size=32, stride=4)
HANGS_S = 120  # only what never ends takes so long, on any machine


def config(**settings: object) -> LoaderConfig:
    base = {
        "backend": "av",
        "batch_videos": 4,
        "sample": SAMPLE,
        "patch": (2, 8, 8),
        "workers": 1,
        "device": "cpu",
        "seed": 7,
    }
    return LoaderConfig(**{**base, **settings})  # type: ignore[arg-type]


def play(index: ClipIndex, n: int, *, rank: int = 0, world: int = 1, state: dict | None = None, **settings: object):
    with ClipLoader(index, config(**settings), rank=rank, world=world) as loader:
        if state is not None:
            loader.load_state_dict(state)
        return list(islice(loader, n)), loader


def same(a: ClipBatch, b: ClipBatch) -> bool:
    return (
        (a.epoch, a.step, a.draws) == (b.epoch, b.step, b.draws)
        and a.clip_B.tolist() == b.clip_B.tolist()
        and torch.equal(a.clips_BCTHW, b.clips_BCTHW)
        and torch.equal(a.ids_keep_BK, b.ids_keep_BK)
        and torch.equal(a.label_B, b.label_B)
    )


def test_a_batch_has_the_stated_shapes_order_and_labels(natural_index: ClipIndex) -> None:
    [batch], loader = play(natural_index, 1, repeats=3)
    assert batch.clips_BCTHW.shape == (12, 3, 4, 32, 32)
    assert batch.clips_BCTHW.dtype == torch.float32
    assert batch.ids_keep_BK.shape == (12, 3)  # int(2·4·4 · 0.1)
    assert batch.repeat_B.tolist() == [0, 1, 2] * 4
    assert [len(set(batch.clip_B[i : i + 3])) for i in range(0, 12, 3)] == [1] * 4
    assert batch.label_B.tolist() == natural_index.label_id[batch.clip_B].tolist()
    assert len({d.mask_seed for d in batch.draws}) == 12
    assert -2 <= batch.clips_BCTHW.min() <= batch.clips_BCTHW.max() <= (1 - 0.45) / 0.225
    assert "clips_BCTHW=[12, 3, 4, 32, 32]" in repr(batch)
    assert loader.steps_per_epoch == 5


def test_a_decoder_mask_comes_with_the_batch(natural_index: ClipIndex) -> None:
    [plain], _ = play(natural_index, 1, workers=0, repeats=2)
    [masked], _ = play(natural_index, 1, workers=0, repeats=2, decoder_mask=DecoderMaskPolicy("cells", 0.75))
    assert plain.ids_decode_BQ is None
    assert masked.ids_decode_BQ is not None
    assert masked.ids_decode_BQ.shape == (8, 8)  # a quarter of 2·4·4
    policy, grid = DecoderMaskPolicy("cells", 0.75), (2, 4, 4)
    assert masked.ids_decode_BQ.tolist() == [ids_decode(policy, d.mask_seed, grid).tolist() for d in masked.draws]
    assert torch.equal(plain.ids_keep_BK, masked.ids_keep_BK)


def test_a_batch_that_is_kept_is_not_written_over(natural_index: ClipIndex) -> None:
    """Memory is used again, but only once nobody holds anything of it."""
    with ClipLoader(natural_index, config(workers=0)) as loader:
        batches = iter(loader)
        kept = next(batches).clips_BCTHW[1:2, :, 0]
        before = kept.clone()
        places = {next(batches).clips_BCTHW.data_ptr() for _ in range(6)}
        assert torch.equal(kept, before)
        assert len(places) <= 2


def test_an_epoch_plays_the_order_and_the_next_epoch_another(
    natural_index: ClipIndex, global_batches: Callable
) -> None:
    batches, _ = play(natural_index, 12, workers=0)
    for epoch in range(2):
        expected = global_batches(natural_index, seed=7, epoch=epoch, global_batch=4)
        played = [b.clip_B.tolist() for b in batches if b.epoch == epoch]
        assert played == expected.tolist()
    assert (batches[10].epoch, batches[10].step) == (2, 0)


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_counts_give_equal_batches(natural_index: ClipIndex, workers: int) -> None:
    alone, _ = play(natural_index, 7, workers=0, repeats=2)
    pooled, _ = play(natural_index, 7, workers=workers, repeats=2, prefetch=3)
    assert all(same(a, b) for a, b in zip(alone, pooled, strict=True))


@pytest.mark.parametrize("done", [1, 4, 5, 8])
def test_resume_yields_the_same_clips(natural_index: ClipIndex, done: int) -> None:
    whole, _ = play(natural_index, 10, workers=0)
    _, first = play(natural_index, done, workers=1)
    state = json.loads(json.dumps(first.state_dict()))
    rest, _ = play(natural_index, 10 - done, workers=2, prefetch=1, state=state)
    assert all(same(a, b) for a, b in zip(whole[done:], rest, strict=True))


def test_resume_with_another_world_plays_the_same_global_batches(natural_index: ClipIndex) -> None:
    whole, _ = play(natural_index, 7, workers=0)
    _, first = play(natural_index, 3, workers=0)
    parts = [
        play(natural_index, 4, workers=0, rank=r, world=2, batch_videos=2, state=first.state_dict())[0]
        for r in range(2)
    ]
    for expected, *ranks in zip(whole[3:], *parts, strict=True):
        draws = {c: d for rank in ranks for c, d in zip(rank.clip_B.tolist(), rank.draws, strict=True)}
        assert draws == dict(zip(expected.clip_B.tolist(), expected.draws, strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_worlds_and_restarts_at_random_steps_play_one_sequence(natural_index: ClipIndex, seed: int) -> None:
    """A run of 9 global batches of 8, cut at random; each piece with a world, workers and prefetch of its own."""

    def played(batches: list[list[ClipBatch]]) -> list[list[tuple]]:
        """Per step, the samples in the order of the global batch, from those of each rank."""
        steps = []
        for ranks in zip(*batches, strict=True):
            samples = [
                list(zip(b.clip_B.tolist(), b.repeat_B.tolist(), b.draws, b.ids_keep_BK.tolist(), strict=True))
                for b in ranks
            ]
            videos = [[s[i : i + 2] for i in range(0, len(s), 2)] for s in samples]  # two repeats
            steps.append([video for row in zip(*videos, strict=True) for video in row])
        return steps

    whole = played([play(natural_index, 9, workers=0, batch_videos=8, repeats=2)[0]])
    random = np.random.default_rng(seed)
    got: list[list[tuple]] = []
    state = None
    while len(got) < 9:
        world, n = int(random.choice([1, 2, 4, 8])), min(9 - len(got), int(random.integers(1, 5)))
        settings = {
            "workers": int(random.integers(0, 2)) if world < 4 else 0,
            "prefetch": int(random.integers(1, 4)),
        }
        ranks = [
            play(
                natural_index,
                n,
                rank=r,
                world=world,
                batch_videos=8 // world,
                repeats=2,
                state=state,
                **settings,
            )
            for r in range(world)
        ]
        got += played([batches for batches, _ in ranks])
        states = [json.dumps(loader.state_dict(), sort_keys=True) for _, loader in ranks]
        assert len(set(states)) == 1
        state = json.loads(states[0])
    assert got == whole


def test_a_closed_loader_goes_on_where_it_was(natural_index: ClipIndex) -> None:
    whole, _ = play(natural_index, 4, workers=0)
    loader = ClipLoader(natural_index, config(workers=0))
    first = list(islice(loader, 2))
    loader.close()
    second = list(islice(loader, 2))
    loader.close()
    assert all(same(a, b) for a, b in zip(whole, first + second, strict=True))


def test_a_changed_index_is_refused_naming_both_digests(natural_index: ClipIndex) -> None:
    _, loader = play(natural_index, 1, workers=0)
    state = loader.state_dict()
    other = replace(natural_index, digest="0" * 64)
    with pytest.raises(ConfigError, match=f"{natural_index.digest}.*{'0' * 64}"):
        play(other, 1, state=state)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 8},
        {"batch_videos": 2},
        {"repeats": 2},
        {"mask": MaskPolicy("tube")},
        {"decoder_mask": DecoderMaskPolicy("cells")},
    ],
)
def test_a_changed_sequence_is_refused_naming_what_changed(natural_index: ClipIndex, change: dict) -> None:
    _, loader = play(natural_index, 1, workers=0)
    name = "global_batch" if "batch_videos" in change else next(iter(change))
    with pytest.raises(ConfigError, match=f"{name}: "):
        play(natural_index, 1, state=loader.state_dict(), **change)


def test_fewer_clips_than_a_batch_is_refused(natural_index: ClipIndex) -> None:
    with pytest.raises(ConfigError, match="22 clips, fewer than one global batch of 32"):
        ClipLoader(natural_index, config(batch_videos=32))


def test_a_patch_that_does_not_divide_the_clip_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sample\.size=32 is not a multiple of 5"):
        config(patch=(2, 5, 5))


def test_a_typo_in_a_nested_key_is_refused() -> None:
    with pytest.raises(ValueError, match="strid"):
        config(sample={"strid": 4})


# ---- what goes wrong at run time


def damage(index: ClipIndex, clip: int, *, at: float = 0.3, n: int = 400) -> None:
    """Overwrite bytes in the middle of a clip."""
    start = int(index.offset[clip] + index.size[clip] * at)
    with index.store.local_path(index.shard(clip)).open("r+b") as f:
        f.seek(start)
        f.write(b"\xa5" * n)


@pytest.fixture
def damaged_index(make_dataset: Callable, spec: type, request: pytest.FixtureRequest) -> ClipIndex:
    codec = getattr(request, "param", "h264")
    index = make_dataset([spec(frames=40, seed=s % 4, codec=codec) for s in range(12)], clips_per_shard=5)
    damage(index, 5, at=0.0, n=int(index.size[5]))
    return index


@pytest.mark.parametrize(
    ("damaged_index", "settings"),
    [("h264", {"workers": 0}), ("h264", {"workers": 2}), ("vp9", {"backend": "dali-cpu"})],
    indirect=["damaged_index"],
)
def test_a_corrupt_clip_costs_one_clip(damaged_index: ClipIndex, settings: dict, global_batches: Callable) -> None:
    batches, loader = play(damaged_index, 3, **settings)
    played = np.concatenate([b.clip_B for b in batches])
    assert 5 not in played
    assert sorted(set(range(12)) - {5}) == sorted(set(played.tolist()))  # 11 good ones and one of them again
    assert list(loader.stats.bad) == [damaged_index.key(5)]
    planned = global_batches(damaged_index, seed=7, epoch=0, global_batch=4).reshape(-1)
    assert (planned != played).sum() == 1


def test_the_replacement_is_the_same_whether_or_not_the_clip_was_known_to_be_bad(
    damaged_index: ClipIndex,
) -> None:
    whole, _ = play(damaged_index, 9, workers=2)
    _, first = play(damaged_index, 3, workers=0)
    rest, _ = play(damaged_index, 6, workers=0, state=first.state_dict())
    assert all(same(a, b) for a, b in zip(whole[3:], rest, strict=True))


def test_a_run_that_goes_on_knows_the_bad_clips_of_before(damaged_index: ClipIndex, tmp_path: Path) -> None:
    file = str(tmp_path / "bad.jsonl")
    whole, _ = play(damaged_index, 9, workers=0)
    _, first = play(damaged_index, 3, workers=0, quarantine=file)
    rest, second = play(damaged_index, 6, workers=0, quarantine=file, state=first.state_dict())
    assert all(same(a, b) for a, b in zip(whole[3:], rest, strict=True))
    assert list(second.stats.bad) == [damaged_index.key(5)]
    [line] = Path(file).read_text().splitlines()
    assert json.loads(line)["index"] == damaged_index.digest


def test_a_flipped_bit_that_any_decoder_would_take_is_noticed(make_dataset: Callable, spec: type) -> None:
    """Each clip is held against the hash that was taken when it was made."""
    index = make_dataset([spec(frames=40, seed=s) for s in range(4)])
    shard = index.store.local_path(index.shard(2))
    data = bytearray(shard.read_bytes())
    data[int(index.offset[2] + index.size[2]) - 3] ^= 1
    shard.write_bytes(data)
    _, loader = play(index, 1, workers=0)
    assert list(loader.stats.bad) == [index.key(2)]
    assert "not those of the index" in loader.stats.bad[index.key(2)]


def test_damage_in_the_middle_of_a_stream_is_noticed(make_dataset: Callable, spec: type) -> None:
    index = make_dataset([spec(frames=40, seed=s, width=192, height=192) for s in range(4)])
    damage(index, 2)
    _, loader = play(index, 1, repeats=4, workers=0)
    assert list(loader.stats.bad) == [index.key(2)]


def test_a_missing_shard_is_named(make_dataset: Callable, spec: type) -> None:
    index = make_dataset([spec(frames=20)] * 12, clips_per_shard=11)
    index.store.local_path(index.shard(11)).unlink()
    _, loader = play(index, 3)
    assert "000001-00.tar is missing" in loader.stats.bad[index.key(11)]


@pytest.mark.parametrize("workers", [0, 1])
def test_rotten_data_stops_the_run(make_dataset: Callable, spec: type, workers: int) -> None:
    index = make_dataset([spec(frames=20)] * 40, clips_per_shard=40)
    for clip in range(0, 40, 2):
        damage(index, clip, at=0, n=int(index.size[clip]))
    with pytest.raises(TooManyBadClipsError, match=r"11 bad clips of .*max_bad_fraction=0\.01"):
        play(index, 10, workers=workers)


def test_one_bad_clip_stops_a_run_that_tolerates_none(damaged_index: ClipIndex) -> None:
    with pytest.raises(TooManyBadClipsError, match="max_bad_fraction=0"):
        play(damaged_index, 3, max_bad_fraction=0.0)


def test_a_dataset_with_no_good_clip_ends(make_dataset: Callable, spec: type) -> None:
    index = make_dataset([spec(frames=20)] * 4)
    for clip in range(4):
        damage(index, clip, at=0, n=int(index.size[clip]))
    with pytest.raises(TooManyBadClipsError, match="4 of 4 clips"):
        play(index, 1, workers=0)


def test_a_killed_worker_costs_nothing(natural_index: ClipIndex) -> None:
    expected, _ = play(natural_index, 8, workers=0)
    got = []
    with ClipLoader(natural_index, config(workers=2)) as loader:
        for batch in islice(loader, 8):
            got.append(batch)
            if len(got) in (2, 4):
                assert isinstance(loader._decoder, AvPool)
                os.kill(loader._decoder.pids[0], signal.SIGKILL)
        assert loader.stats.worker_restarts == 2
        assert not loader.stats.bad
    assert all(same(a, b) for a, b in zip(expected, got, strict=True))


def test_a_worker_that_hangs_is_replaced(natural_index: ClipIndex) -> None:
    expected, _ = play(natural_index, 8, workers=0)
    with ClipLoader(natural_index, config(workers=1, clip_timeout_s=3.0, prefetch=1)) as loader:
        got = list(islice(loader, 2))
        assert isinstance(loader._decoder, AvPool)
        os.kill(loader._decoder.pids[0], signal.SIGSTOP)
        got += islice(loader, 6)
        assert loader.stats.worker_restarts == 1
    assert all(same(a, b) for a, b in zip(expected, got, strict=True))


def test_a_loader_works_without_assertions(natural_index: ClipIndex) -> None:
    """`python -O` removes assert statements: nothing that the loader needs may happen in one."""
    program = (
        "import sys, zlib\n"
        "from itertools import islice\n"
        "from reelmae.pipeline.loading import ClipIndex, ClipLoader, LoaderConfig, SamplePolicy\n"
        "config = LoaderConfig(backend='av', workers=1, device='cpu', batch_videos=4, patch=(2, 8, 8), seed=7,\n"
        "                      sample=SamplePolicy(frames=4, size=32, stride=4))\n"
        "with ClipLoader(ClipIndex.open(sys.argv[1]), config) as loader:\n"
        "    for batch in islice(loader, 7):\n"
        "        print(batch.epoch, batch.step, zlib.crc32(batch.clips_BCTHW.numpy().tobytes()))\n"
        "print(__debug__, loader.stats.worker_restarts)\n"
    )
    command = [sys.executable, "-O", "-c", program, natural_index.store.url()]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=HANGS_S).stdout
    batches, _ = play(natural_index, 7, workers=0)
    expected = [f"{b.epoch} {b.step} {zlib.crc32(b.clips_BCTHW.numpy().tobytes())}" for b in batches]
    assert output.splitlines() == [*expected, "False 0"]


def test_closing_leaves_no_process_thread_or_file_behind(natural_index: ClipIndex) -> None:
    def open_files() -> set[tuple[str, str]]:
        gc.collect()  # what earlier tests dropped in a cycle is closed here, not half way through
        links = list(Path("/proc/self/fd").iterdir())
        return {(link.name, str(link.readlink())) for link in links if os.path.lexists(link)}

    files = open_files()
    with ClipLoader(natural_index, config(workers=2)) as loader:
        next(iter(loader))
        assert isinstance(loader._decoder, AvPool)
        pids = loader._decoder.pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not [t for t in threading.enumerate() if t.name.startswith("reelmae")]
    assert open_files() <= files


def test_workers_end_with_a_parent_that_is_killed(natural_index: ClipIndex) -> None:
    program = (
        "import sys, time\n"
        "from reelmae.pipeline.loading.index.clips import ClipIndex\n"
        "from reelmae.pipeline.loading.config import LoaderConfig\n"
        "from reelmae.pipeline.loading.loader import ClipLoader\n"
        "from reelmae.pipeline.loading.order.draws import SamplePolicy\n"
        "config = LoaderConfig(backend='av', workers=2, device='cpu', batch_videos=2, sample=SamplePolicy(size=32))\n"
        "loader = ClipLoader(ClipIndex.open(sys.argv[1]), config)\n"
        "next(iter(loader))\n"
        "print(*loader._decoder.pids, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, natural_index.store.url()], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2
        process.kill()
    deadline = time.monotonic() + HANGS_S
    while time.monotonic() < deadline and any(_runs(pid) for pid in pids):
        time.sleep(0.05)
    assert not any(_runs(pid) for pid in pids)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as f:  # noqa: PTH123
        return f.read().split()[2] != "Z"


def test_the_time_the_consumer_waits_is_measured(natural_index: ClipIndex) -> None:
    with ClipLoader(natural_index, config(workers=1, prefetch=4)) as loader:
        batches = iter(loader)
        next(batches)
        waited, began = loader.stats.wait_s, time.perf_counter()
        assert isinstance(loader._decoder, AvPool)
        in_flight = list(loader._decoder._order)
        while any(batch.left for batch in in_flight) and time.perf_counter() - began < HANGS_S:
            time.sleep(0.05)
        assert len(in_flight) == 4 and not any(batch.left for batch in in_flight)  # they get ready meanwhile
        time.sleep(1.0)  # the consumer computes
        computed = time.perf_counter() - began
        for _ in range(3):
            next(batches)
        assert 0 < loader.stats.wait_s - waited < computed  # the head start was not waited for
        assert loader.stats.seconds - loader.stats.wait_s >= computed  # what it computes is not waiting
        assert loader.stats.seconds > 1.0
        assert 0 < loader.stats.wait_share < 1


def test_a_state_written_by_an_earlier_version_is_taken(natural_index: ClipIndex) -> None:
    """Literally as 0.1.0 wrote it before its settings were spread over three classes."""
    state = {
        "epoch": 1,
        "step": 0,
        "index": natural_index.digest,
        "global_batch": 2,
        "repeats": 2,
        "sample": {
            "frames": 4,
            "stride": None,
            "fps": 7.5,
            "size": 32,
            "scale": [0.5, 1.0],
            "ratio": [0.75, 1.3333333333333333],
            "flip": True,
        },
        "mask": {"kind": "tube", "ratio": 0.75},
        "decoder_mask": {"kind": "none", "ratio": 0.5},
        "patch": [2, 16, 16],
        "seed": 0,
        "lanes": 64,
    }
    sample = SamplePolicy(frames=4, size=32, fps=7.5)
    settings = {
        "batch_videos": 2,
        "repeats": 2,
        "sample": sample,
        "mask": MaskPolicy("tube", 0.75),
        "patch": (2, 16, 16),
    }
    with ClipLoader(natural_index, config(**settings, seed=0)) as loader:
        loader.load_state_dict(state)
        assert loader.state_dict() == state
