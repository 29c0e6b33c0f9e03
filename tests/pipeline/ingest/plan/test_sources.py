"""Listing skips nothing, a manifest names what it may, and options go only where they belong."""

from __future__ import annotations

import functools
import http.server
import os
import threading
from pathlib import Path
from typing import Any

import fsspec
import pytest

from reelmae.pipeline.errors import InputError
from reelmae.pipeline.ingest.config import ShardConfig
from reelmae.pipeline.ingest.plan.sources import LISTED, access_of, is_manifest, list_sources
from reelmae.pipeline.ingest.run.fetch import fetch
from reelmae.pipeline.storage.access import Access


def _urls(src: Path | str, **config: Any) -> list[str]:
    return list_sources(str(src), ShardConfig(**config)).table.column("url").to_pylist()


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
    assert fetch(url, tmp_path / "copy", root=tmp_path).bytes == 3


def test_folder_labels(tmp_path: Path) -> None:
    for name in ("yoga/a.mp4", "yoga/deep/b.mp4", "root.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    listing = list_sources(str(tmp_path), ShardConfig(labels="folder"))
    assert listing.table.schema.equals(LISTED)
    assert listing.table.column("label").to_pylist() == [None, "yoga", "yoga"]
    assert listing.table.column("rows").null_count == listing.rows == 3
    assert listing.columns == {}


def test_missing_and_empty_sources_name_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="check the path"):
        _urls(tmp_path / "nowhere")
    with pytest.raises(InputError, match="check the path"):
        _urls(tmp_path / "nowhere.csv")
    with pytest.raises(InputError, match="holds no file"):
        _urls(tmp_path)


@pytest.mark.parametrize(
    ("url", "src", "has_options"),
    [
        ("s3://a/x", "s3://a", True),
        ("s3a://b/x", "s3://a/list.csv", True),
        ("s3://a/x", "/lists/a.csv", True),
        ("http://h/x", "/lists/a.csv", False),
        ("https://h/x", "s3://a/list.csv", False),
        ("gs://h/x", "s3://a/list.csv", False),
        ("https://h/x", "https://h/list.csv", True),
    ],
)
def test_options_go_only_where_they_belong(url: str, src: str, has_options: bool) -> None:
    access = Access({"key": "mine"})
    found = access_of(url, src, access)
    assert dict(found.options) == ({"key": "mine"} if has_options else {})
    assert found.retries is access.retries
    assert found.stopping is access.stopping


def test_a_manifest_may_name_web_addresses(tmp_path: Path) -> None:
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "a b.mp4").write_bytes(b"video")
    handler = functools.partial(_Quiet, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a%20b.mp4"
        (tmp_path / "m.csv").write_text(f"url\n{url}\n")
        assert _urls(tmp_path / "m.csv") == [url]
        assert fetch(url, tmp_path / "copy", root=None).bytes == 5
        with pytest.raises(FileNotFoundError):
            fetch(url + "x", tmp_path / "other", root=None)
        server.shutdown()


def test_a_manifest_on_the_web_is_read(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "m.csv").write_text("path\nx/a.mp4\n")
    (tmp_path / "lists" / "away.csv").write_text("path\n../a.mp4\n/etc/passwd\nfile:///etc/passwd\nlocal:///etc/x\n")
    handler = functools.partial(_Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_port}"
        assert _urls(f"{root}/lists/m.csv") == [f"{root}/lists/x/a.mp4"]
        with pytest.raises(InputError, match=r"line 2.*\n.*line 3.*this machine.*\n.*line 4.*\n.*line 5.*this machine"):
            _urls(f"{root}/lists/away.csv")
        with pytest.raises(InputError, match="no such manifest"):
            _urls(f"{root}/lists/none.csv")
        assert _urls(f"{root}/lists") == [f"{root}/lists/away.csv", f"{root}/lists/m.csv"]
        server.shutdown()


def test_paths_in_a_bucket_stay_in_it() -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe("/bucket/lists/m.csv", b"path\n../b.mp4\nmemory://bucket/lists/x/c.mp4\n")
    fs.pipe(
        "/bucket/lists/n.csv",
        b"path\nmemory://bucket/lists/../x.mp4\nmemory://bucket/b.mp4\n../../../b.mp4\n",
    )
    try:
        with pytest.raises(InputError, match=r"line 2: '../b.mp4' leads out.*--allow-outside"):
            _urls("memory://bucket/lists/m.csv")
        assert _urls("memory://bucket/lists/m.csv", allow_outside=True) == [
            "memory:///bucket/b.mp4",
            "memory:///bucket/lists/x/c.mp4",
        ]
        with pytest.raises(InputError, match=r"line 2.*outside.*\n.*line 3.*outside.*\n.*line 4.*leads out"):
            _urls("memory://bucket/lists/n.csv")
    finally:
        fs.rm("/bucket", recursive=True)


@pytest.mark.parametrize("entry", ["../../secret.mp4", "a/../../x", "/etc/passwd", "file:///etc/passwd", ".."])
def test_what_leads_out_of_the_folder_must_be_allowed(entry: str, tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "m.csv").write_text(f"path\n{entry}\n")
    with pytest.raises(InputError, match=r"line 2.*folder; move it, or allow it with --allow-outside"):
        _urls(tmp_path / "in" / "deep" / "m.csv")
    (url,) = _urls(tmp_path / "in" / "deep" / "m.csv", allow_outside=True)
    assert Path(url) == (tmp_path / "in" / "deep" / entry.removeprefix("file://")).resolve()


def test_what_lies_in_the_folder_is_named_in_one_way(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    entries = [
        "./a//b.mp4",
        "c/../d.mp4",
        f"{tmp_path}/e.mp4",
        f"file://{tmp_path}/f.mp4",
        "a:b.mp4",
        "x::file://y.mp4",
    ]
    (tmp_path / "m.csv").write_text("path\n" + "".join(f"{entry}\n" for entry in entries))
    there = ["a/b.mp4", "a:b.mp4", "d.mp4", "e.mp4", "f.mp4", "x::file:/y.mp4"]
    assert _urls(tmp_path / "m.csv") == [f"{tmp_path}/{name}" for name in there]
    assert f"{tmp_path}/e.mp4" in _urls(tmp_path / "link" / "m.csv")  # the same folder by another name


def test_a_name_that_is_no_utf8_can_stand_in_a_manifest(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/caf%E9.mp4"
    (tmp_path / "m.csv").write_text(f"path\n{url}\nfile://{tmp_path}/100%25.mp4\n")
    assert _urls(tmp_path / "m.csv") == [f"{tmp_path}/100%25.mp4", url]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("nosuch://x/y", "no filesystem for 'nosuch://'"),
        ("s3://", "names no bucket"),
        ("local:///etc/passwd", "this machine"),
        ("generic:///etc/passwd", "this machine"),
        ("file://etc/passwd", "not a whole path"),
        (".", "manifest's own folder"),
        ("x" * 5000, "longer than 4096"),
        ("a\0b", "NUL"),
    ],
)
def test_entries_that_name_no_file_are_told(entry: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text(f"path\na.mp4\n{entry}\n")
    with pytest.raises(InputError, match=f"m.csv, line 3: .*{words}"):
        _urls(tmp_path / "m.csv")


def test_other_stores_are_an_ordinary_list(tmp_path: Path) -> None:
    urls = ["http://h/x.mp4?a=b", "https://h/x.mp4", "s3://bucket/a b.mp4"]
    (tmp_path / "m.txt.csv").write_text("url\n" + "\n".join(urls))
    assert is_manifest(str(tmp_path / "m.txt.csv"))
    assert _urls(tmp_path / "m.txt.csv") == urls


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""
