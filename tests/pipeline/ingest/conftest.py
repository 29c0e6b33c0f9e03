"""One source through probe, screen, cut and ffmpeg."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.cut import cut
from reelmae.pipeline.ingest.probe import Probe, Prober
from reelmae.pipeline.ingest.sandbox import Sandbox
from reelmae.pipeline.ingest.screen import Kept, Rejected, screen
from reelmae.pipeline.ingest.transcode import find_ffmpeg, transcode


@dataclass(frozen=True)
class Encoded:
    """What became of one source."""

    probe: Probe
    kept: Kept
    spans: list[tuple[int, int]]
    clips: list[Path]
    prober: Prober

    def pictures(self, clip: int = 0) -> np.ndarray:
        """RGB uint8 [T, H, W, 3] of a clip."""
        with av.open(str(self.clips[clip])) as container:
            return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


Encode = Callable[..., Encoded]


@pytest.fixture(scope="module")
def encode(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Encode]:
    """encode(path, **config) → Encoded; Rejected is returned as it is."""
    sandbox = Sandbox()
    prober = Prober(sandbox, tmp_path_factory.mktemp("prober"))

    def run(path: Path, **values: Any) -> Encoded | Rejected:
        config = ShardConfig(**values)
        probe = prober.probe(path, max_pixels=config.max_pixels, wall_s=60)
        assert isinstance(probe, Probe), probe
        kept = screen(probe, config)
        assert isinstance(kept, Kept), kept
        spans = cut(kept.frames, kept.fps, config.clip_seconds)
        folder = tmp_path_factory.mktemp("clips")
        clips = transcode(sandbox, find_ffmpeg(), path, folder, probe, kept, spans, config)
        return clips if isinstance(clips, Rejected) else Encoded(probe, kept, spans, clips, prober)

    yield run  # type: ignore[misc]
    prober.close()
