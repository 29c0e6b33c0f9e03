"""One source through probe, screen, cut, ffmpeg, verification and scores."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from reelmae.pipeline.ingest.clips.make import ClipMaker
from reelmae.pipeline.ingest.clips.outcome import Rejected
from reelmae.pipeline.ingest.clips.probe import Probe, Prober
from reelmae.pipeline.ingest.clips.screen import Kept, screen_source
from reelmae.pipeline.ingest.clips.source import Source
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.ffmpeg import find_ffmpeg
from reelmae.pipeline.ingest.sandbox import Sandbox
from reelmae.pipeline.ingest.shards.pack import ClipRow

ENCODER = {"h264": "x264", "hevc": "x265", "vp9": "vpx"}


@dataclass(frozen=True)
class Encoded:
    """What became of one source."""

    probe: Probe
    kept: Kept
    clips: list[Path]
    rows: list[ClipRow]
    dropped: list[dict[str, Any]]
    prober: Prober

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Of the clips, in frames of the source at its output rate."""
        fps = self.kept.fps
        return [(round(r.span_start_s * fps), round(r.span_end_s * fps)) for r in self.rows]

    def pictures(self, clip: int = 0) -> np.ndarray:
        """RGB uint8 [T, H, W, 3] of a clip."""
        with av.open(str(self.clips[clip])) as container:
            return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


Encode = Callable[..., Encoded]


@pytest.fixture(scope="module")
def encode(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Encode]:
    """encode(path, rows=[(start_s, end_s), …], **config) → Encoded, or the Rejected of ClipMaker."""
    sandbox = Sandbox()
    prober = Prober(sandbox, tmp_path_factory.mktemp("prober"))

    def run(path: Path, rows: Any = (), **values: Any) -> Encoded | Rejected:
        config = ShardConfig(**values)
        probe = prober.probe(path, max_pixels=config.max_pixels, wall_s=60)
        assert isinstance(probe, Probe), probe
        kept = screen_source(probe, config)
        assert isinstance(kept, Kept), kept
        maker = ClipMaker(config, find_ffmpeg(), ENCODER[config.codec], {}, sandbox, prober)
        given = [{"start_s": s, "end_s": e, "label": None, "extra": None} for s, e in rows]
        source = Source(str(path), None, given, path, path.stat().st_size)
        made = maker.make(source, tmp_path_factory.mktemp("work"))
        if isinstance(made, Rejected):
            return made
        return Encoded(probe, kept, made.clips, made.rows, made.dropped, prober)

    yield run  # type: ignore[misc]
    prober.close()


@pytest.fixture(scope="session")
def list_processes() -> Callable[[Path], list[int]]:
    """list_processes(folder) → the ids of the processes that work in this folder or below it."""

    def list_in(folder: Path) -> list[int]:
        """Processes that work in this folder."""
        found = []
        for process in Path("/proc").iterdir():
            if process.name.isdigit():
                try:
                    if (process / "cwd").readlink().is_relative_to(folder):
                        found.append(int(process.name))
                except OSError:  # it ended just now
                    continue
        return found

    return list_in


TarMember = tuple[str, bytes] | tarfile.TarInfo


@pytest.fixture(scope="session")
def write_tar() -> Callable[..., Path]:
    """write_tar(path, [(name, bytes) | TarInfo, …], format=tarfile.USTAR_FORMAT) → path"""

    def write(path: Path, members: Iterable[TarMember], format: int = tarfile.USTAR_FORMAT) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, mode="w", format=format) as tar:
            for member in members:
                if isinstance(member, tarfile.TarInfo):
                    tar.addfile(member)
                    continue
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
        return path

    return write
