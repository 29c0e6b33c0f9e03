"""A source that looks damaged is fetched again before it is judged, where its store has no checksum to hold it against."""

from __future__ import annotations

import functools
import http.server
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pyarrow.parquet as pq
import pytest

from reelmae.pipeline import schema
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.job import Progress, shard

Make = Callable[..., Path]
SMALL = ShardConfig(short_side=48, sources_per_task=1)


class _Web(http.server.SimpleHTTPRequestHandler):
    """Serves a folder. `wrong` of the downloads of each file, the first ones, have other first bytes, each another."""

    wrong = 0
    downloads: ClassVar[Counter[str]] = Counter()

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        number = self.downloads[path.name]
        self.downloads[path.name] += 1
        data = path.read_bytes()
        if number < self.wrong and data:
            data = bytes([number]) * min(64, len(data)) + data[64:]
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[Path, str, type[_Web]]]:
    """A folder, its URL, and its server's handler."""
    folder = tmp_path / "www"
    folder.mkdir()
    handler: Any = type("Web", (_Web,), {"downloads": Counter()})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()


def _manifest(folder: Path, url: str, path: Path) -> str:
    path.write_text("url\n" + "".join(f"{url}/{p.name}\n" for p in sorted(folder.iterdir())))
    return str(path)


def _files(dst: Path) -> dict[str, bytes]:
    return {str(p.relative_to(dst)): p.read_bytes() for p in sorted(dst.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("wrong", [1, 2])
def test_a_damaged_download_costs_a_retry_and_no_video(
    wrong: int, web: tuple[Path, str, type[_Web]], make_video: Make, tmp_path: Path
) -> None:
    folder, url, handler = web
    for i in range(2):
        make_video(folder / f"{i}.mp4", frames=5, seed=i)
    src = _manifest(folder, url, tmp_path / "list.csv")
    assert shard(src, str(tmp_path / "undisturbed"), SMALL).retries == {}
    handler.downloads.clear()
    handler.wrong = wrong
    seen: list[Progress] = []
    summary = shard(src, str(tmp_path / "dst"), SMALL, workers=2, on_progress=seen.append)
    assert (summary.sources_kept, summary.rejected) == (2, {})
    assert summary.retries == {"checksum": 2 * wrong}
    assert seen[-1].retries == 2 * wrong
    assert handler.downloads == {"0.mp4": wrong + 1, "1.mp4": wrong + 1}
    assert _files(tmp_path / "dst") == _files(tmp_path / "undisturbed")


def test_what_is_damaged_at_its_store_is_read_twice_and_rejected(
    web: tuple[Path, str, type[_Web]], make_video: Make, tmp_path: Path
) -> None:
    folder, url, handler = web
    make_video(folder / "good.mp4", frames=5)
    make_video(folder / "short.mp4", frames=1)
    (folder / "notes.mp4").write_text("no video")
    summary = shard(_manifest(folder, url, tmp_path / "list.csv"), str(tmp_path / "dst"), SMALL)
    assert summary.rejected == {"not_a_video": 1, "too_few_frames": 1}
    assert summary.retries == {}
    assert handler.downloads == {"good.mp4": 1, "notes.mp4": 2, "short.mp4": 2}


def test_of_three_different_reads_the_third_decides(
    web: tuple[Path, str, type[_Web]], make_video: Make, tmp_path: Path
) -> None:
    folder, url, handler = web
    make_video(folder / "good.mp4", frames=5)
    (folder / "notes.mp4").write_text("no video")
    handler.wrong = 2
    summary = shard(_manifest(folder, url, tmp_path / "list.csv"), str(tmp_path / "dst"), SMALL)
    assert summary.rejected == {"not_a_video": 1}
    (row,) = pq.read_table(tmp_path / "dst" / schema.REJECTS_FILE).to_pylist()
    assert row["detail"] == "text: 'no video'"
    assert handler.downloads == {"good.mp4": 3, "notes.mp4": 3}


def test_a_screen_on_what_the_video_shows_is_no_damage(
    web: tuple[Path, str, type[_Web]], make_video: Make, tmp_path: Path
) -> None:
    folder, url, handler = web
    make_video(folder / "dark.mp4", frames=5)
    make_video(folder / "good.mp4", frames=5)
    config = SMALL.model_copy(update={"min_motion": 250.0})
    with pytest.raises(Exception, match="2 x static"):
        shard(_manifest(folder, url, tmp_path / "list.csv"), str(tmp_path / "dst"), config)
    assert handler.downloads == {"dark.mp4": 1, "good.mp4": 1}
