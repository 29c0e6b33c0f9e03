"""A tiny dataset of format 1 (moving waves, H.264) and a tiny configuration to train on it."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from reelmae.train.config import PretrainConfig, load_recipe

FRAMES, HEIGHT, WIDTH, FPS = 24, 32, 48, 15
MakeConfig = Callable[..., PretrainConfig]
TINY = """
    run.steps=6 run.device=cpu run.log_every=1 run.threads=1 run.checkpoint_every=1000
    loader.batch_videos=4 loader.repeats=2 loader.workers=0 loader.backend=av
    loader.sample.stride=1 loader.mask.ratio=0.5
    model.frames=4 model.size=16 model.patch=8 model.dim=24 model.depth=1 model.heads=2
    model.decoder_dim=16 model.decoder_depth=1 model.decoder_heads=2
    optim.blr=0.5 optim.clip_grad=1
"""


def _encode(seed: int) -> bytes:
    """Long waves that travel, each clip its own way: patches are ramps, which a tiny model learns soon."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    fy, fx, speed = *rng.uniform(-0.08, 0.08, 2), rng.uniform(0.05, 0.2)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "20", "preset": "veryfast", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.thread_count = 1
        for t in range(FRAMES):
            picture = np.clip(128 + 90 * np.sin(fy * y + fx * x + speed * t), 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture[..., None].repeat(3, 2), format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


@pytest.fixture(scope="session")
def dataset(ready_dataset: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """12 clips in 3 shards. Read-only: shared by tests."""
    return ready_dataset(tmp_path_factory.mktemp("dataset"), [_clip(seed) for seed in range(12)], 4)


@pytest.fixture(scope="session")
def other_dataset(ready_dataset: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another one of the same size."""
    return ready_dataset(tmp_path_factory.mktemp("other"), [_clip(seed) for seed in range(100, 112)], 4)


def _clip(seed: int) -> dict[str, Any]:
    shape = {"frames": FRAMES, "fps": FPS, "height": HEIGHT, "width": WIDTH}
    return {"source": f"source{seed}", "video": _encode(seed), **shape}


@pytest.fixture
def tiny(dataset: str, tmp_path: Path) -> MakeConfig:
    """tiny("run.steps=5", …) → config of a run of a very small model on `dataset`, decoded in this process."""

    def make(*overrides: str) -> PretrainConfig:
        basis = [f"data.url={dataset}", f"run.out={tmp_path / 'run'}", *TINY.split()]
        return load_recipe(None, [*basis, *overrides])

    return make
