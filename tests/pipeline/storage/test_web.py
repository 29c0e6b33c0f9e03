"""Files of a web server, which tells nothing but sizes, and of which fsspec says for any failure that there is no file."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from reelmae.pipeline.errors import StorageError
from reelmae.pipeline.storage import remote
from reelmae.pipeline.storage.access import Access
from reelmae.pipeline.storage.store import Store

DATA = bytes(range(256)) * 40


class _Web(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is logged."""

    def do_HEAD(self) -> None:
        self._begin()

    def do_GET(self) -> None:
        self._begin()
        if self.server.stalls:
            self.server.stalls -= 1
            self.wfile.write(DATA[:100])
            self.wfile.flush()
            self.connection.settimeout(20)
            self.close_connection = True
            self.rfile.read(1)  # until the client goes away
        else:
            self.wfile.write(DATA)

    def _begin(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(DATA)))
        self.end_headers()


@pytest.fixture
def web() -> Iterator[Any]:
    """A web server; its first `stalls` answers to GET end in the middle and stay open."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Web) as server:
        server.stalls = 0  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_web_file_may_come_slowly_and_may_not_stall(
    web: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "WEB_STALL_S", 0.25)
    store = Store(f"http://127.0.0.1:{web.server_port}", Access(patience_s=60))
    web.stalls = 1
    store.download("x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == DATA
    assert store.access.retries.counts() == {"timed out": 1}
    assert store._files._fs.client_kwargs["timeout"].total is None  # type: ignore[attr-defined]


def test_a_web_server_that_is_away_is_not_a_file_that_is_gone() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Web) as server:
        port = server.server_port
    store = Store(f"http://127.0.0.1:{port}", Access(patience_s=0))
    with pytest.raises(StorageError, match="connection refused"):
        store.exists("x")
    assert not store._is_gone("x")
