"""Listing skips nothing, manifests are read strictly, foreign files are fetched without following links out."""

from __future__ import annotations

import functools
import http.server
import os
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reelmae.pipeline.errors import InputError, StorageError
from reelmae.pipeline.ingest.sources import fetch, list_sources


def _urls(src: Path, labels: str = "none") -> list[str]:
    return list_sources(str(src), labels).column("url").to_pylist()


def test_every_file_is_a_source(tmp_path: Path) -> None:
    names = [
        ".hidden",
        "a/.DS_Store",
        "a/b/c.mp4",
        "a/line\nbreak.mp4",
        "-rf.mp4",
        "a/b/concat:x|y.mp4",
        "naïve 视频.mkv",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "linked folder").symlink_to("/etc")
    wanted = [*names, "dangling", "linked folder"]
    assert _urls(tmp_path) == sorted(str(tmp_path / n) for n in wanted)


def test_a_name_that_is_no_utf8_survives(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.mp4"
    with open(path, "wb") as f:  # noqa: PTH123 - pathlib takes no bytes
        f.write(b"abc")
    (url,) = _urls(tmp_path)
    assert url.endswith("/caf%E9.mp4")
    assert fetch(url, tmp_path / "copy", root=tmp_path) == 3


def test_folder_labels(tmp_path: Path) -> None:
    for name in ("yoga/a.mp4", "yoga/deep/b.mp4", "root.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert list_sources(str(tmp_path), "folder").column("label").to_pylist() == [None, "yoga", "yoga"]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_manifests_of_all_kinds_say_the_same(kind: str, tmp_path: Path) -> None:
    rows = [{"path": "x/a,b.mp4", "label": "one"}, {"path": "/abs/c.mp4", "label": None}]
    path = tmp_path / f"m.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        path.write_text('{"path": "x/a,b.mp4", "label": "one"}\n\n{"path": "/abs/c.mp4", "label": null}\n')
    elif kind == "tsv":
        path.write_text("path\tlabel\nx/a,b.mp4\tone\n/abs/c.mp4\t\n")
    else:
        path.write_bytes(b'\xef\xbb\xbfpath,label\r\n"x/a,b.mp4",one\r\n/abs/c.mp4,\r\n')
    table = list_sources(str(path), "none")
    assert table.column("url").to_pylist() == ["/abs/c.mp4", f"{tmp_path}/x/a,b.mp4"]
    assert table.column("label").to_pylist() == [None, "one"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file,label\na.mp4,x\n", "no column `path`"),
        ("path\na.mp4\na.mp4\n", "line 3.*line 2"),
        ("path\n../../secret.mp4\n", "line 2.*leads out"),
        ("path,label\n,x\n", "line 2.*no path"),
        ("path\na.mp4,b,c\n", "line 2.*more fields"),
        ("path\n", "no file"),
        ('path\n"a.mp4\n', "cannot be read"),
    ],
)
def test_bad_manifests_name_the_line(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        list_sources(str(path), "none")


def test_missing_and_empty_sources_name_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="check the path"):
        _urls(tmp_path / "nowhere")
    with pytest.raises(InputError, match="check the path"):
        _urls(tmp_path / "nowhere.csv")
    with pytest.raises(InputError, match="holds no file"):
        _urls(tmp_path)


def test_links_out_of_the_bucket_are_not_followed(tmp_path: Path) -> None:
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    (tmp_path / "secret").write_text("secret")
    (bucket / "out.mp4").symlink_to("../secret")
    (bucket / "real.mp4").write_text("video")
    (bucket / "in.mp4").symlink_to("real.mp4")
    with pytest.raises(StorageError, match="leads out"):
        fetch(str(bucket / "out.mp4"), tmp_path / "copy", root=bucket)
    assert not (tmp_path / "copy").exists()
    assert fetch(str(bucket / "in.mp4"), tmp_path / "copy", root=bucket) == 5


def test_pipes_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(StorageError, match="no plain file"):
        fetch(str(tmp_path / "pipe.mp4"), tmp_path / "copy", root=tmp_path)
    with pytest.raises(FileNotFoundError):
        fetch(str(tmp_path / "gone.mp4"), tmp_path / "copy", root=tmp_path)


def test_a_manifest_may_name_web_addresses(tmp_path: Path) -> None:
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "a b.mp4").write_bytes(b"video")
    handler = functools.partial(_Quiet, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a%20b.mp4"
        (tmp_path / "m.csv").write_text(f"url\n{url}\n")
        assert _urls(tmp_path / "m.csv") == [url]
        assert fetch(url, tmp_path / "copy", root=None) == 5
        with pytest.raises(FileNotFoundError):
            fetch(url + "x", tmp_path / "other", root=None)
        server.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""
