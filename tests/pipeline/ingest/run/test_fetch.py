"""A source's copy on local disk: what is no source, what is gone, and what only seems so."""

from __future__ import annotations

import http.server
import os
import socket
import threading
from pathlib import Path

import pytest

from reelmae.pipeline.errors import StorageError
from reelmae.pipeline.ingest.run.fetch import Fetched, NoSourceError, fetch, refuse_lost_root
from reelmae.pipeline.storage.access import Access


def test_links_out_of_the_bucket_are_not_followed(tmp_path: Path) -> None:
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    (tmp_path / "secret").write_text("secret")
    (bucket / "out.mp4").symlink_to("../secret")
    (bucket / "real.mp4").write_text("video")
    (bucket / "in.mp4").symlink_to("real.mp4")
    with pytest.raises(NoSourceError, match="leads out"):
        fetch(str(bucket / "out.mp4"), tmp_path / "copy", root=bucket)
    assert not (tmp_path / "copy").exists()
    assert fetch(str(bucket / "in.mp4"), tmp_path / "copy", root=bucket) == Fetched(5, is_checked=True)


def test_what_is_no_plain_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "here").symlink_to("there")
    (tmp_path / "there").symlink_to("here")
    (tmp_path / "file").write_text("x")
    for name, words in {"pipe.mp4": "no plain file", "here": "in a ring", "x" * 300: "too long"}.items():
        with pytest.raises(NoSourceError, match=words):
            fetch(str(tmp_path / name), tmp_path / "copy", root=tmp_path)
    for name in ("gone.mp4", "file/gone.mp4"):
        with pytest.raises(FileNotFoundError):
            fetch(str(tmp_path / name), tmp_path / "copy", root=tmp_path)


def test_a_folder_that_is_empty_or_away_says_that_its_files_may_not_be_gone(tmp_path: Path) -> None:
    bucket = tmp_path / "bucket"
    (bucket / "a").mkdir(parents=True)
    gone = str(bucket / "a" / "x.mp4")
    refuse_lost_root(gone, str(bucket))  # the bucket holds something: the file is gone
    with pytest.raises(StorageError, match="a is empty: is a disk not mounted"):
        refuse_lost_root(gone, str(tmp_path / "list.csv"))
    (bucket / "a").rmdir()
    for src in (bucket, tmp_path / "list.csv"):
        with pytest.raises(StorageError, match="bucket is empty"):
            refuse_lost_root(gone, str(src))
    bucket.rmdir()
    with pytest.raises(StorageError, match="bucket cannot be read"):
        refuse_lost_root(gone, str(bucket))
    (tmp_path / "list.csv").write_text("path\n")
    refuse_lost_root(gone, str(tmp_path / "list.csv"))
    with pytest.raises(StorageError, match="holds nothing any more"):
        refuse_lost_root("memory://lost/x.mp4", "memory://lost")


@pytest.mark.parametrize("status", [401, 403, 404, 410, 451])
def test_what_a_web_server_refuses_for_good_is_no_source(status: int, tmp_path: Path) -> None:
    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(status)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(
            (NoSourceError, FileNotFoundError), match=str(status) if status in (401, 403, 451) else "a.mp4"
        ):
            fetch(f"http://127.0.0.1:{server.server_port}/a.mp4", tmp_path / "copy", root=None)
        server.shutdown()


def test_a_web_server_that_is_away_is_waited_for(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    access = Access(patience_s=1)
    with pytest.raises(StorageError, match="connection refused"):
        fetch(f"http://127.0.0.1:{port}/a.mp4", tmp_path / "copy", root=None, access=access)
    assert access.retries.counts()["connection refused"] >= 1
