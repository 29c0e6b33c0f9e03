"""The relay passes bytes untouched, makes answers late, and limits each connection by itself."""

from __future__ import annotations

import http.client
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from reelmae.pipeline.errors import ConfigError
from reelmae.tools.bench.shaping import PIECE, shaped


class _Echo(BaseHTTPRequestHandler):
    """Answers a POST with its body, and a GET of /N with N bytes."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self._send(self.rfile.read(int(self.headers["Content-Length"])))

    def do_GET(self) -> None:
        self._send(bytes(int(self.path[1:])))

    def _send(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Endpoint of an HTTP server in threads."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Echo) as served:
        served.daemon_threads = True
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()
        thread.join()


def _connect(endpoint: str) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(endpoint.removeprefix("http://"), timeout=30)


def _get(endpoint: str, size: int, times: int = 1) -> float:
    """Seconds for some requests on one connection, one after the other."""
    connection = _connect(endpoint)
    try:
        began = time.monotonic()
        for _ in range(times):
            connection.request("GET", f"/{size}")
            assert len(connection.getresponse().read()) == size
        return time.monotonic() - began
    finally:
        connection.close()


def test_bytes_pass_untouched_in_both_directions(server: str) -> None:
    with shaped(server, latency_ms=1, connection_mb_s=200) as endpoint:
        connection = _connect(endpoint)
        for size in (0, 1, 700_001, 5_000_003):
            body = random.Random(size).randbytes(size)
            connection.request("POST", "/", body=body)
            assert connection.getresponse().read() == body
        connection.close()


def test_each_answer_of_a_connection_is_late_and_each_only_once(server: str) -> None:
    with shaped(server, latency_ms=200, connection_mb_s=0) as endpoint:
        assert _get(endpoint, 10, times=3) >= 0.6
        pieces = 64
        assert 0.2 <= _get(endpoint, pieces * PIECE) < 0.2 * pieces / 2


def test_each_connection_has_a_rate_of_its_own(server: str) -> None:
    with shaped(server, latency_ms=0, connection_mb_s=5) as endpoint:
        one = _get(endpoint, 2_500_000)
        assert one > 0.4
        began = time.monotonic()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: _get(endpoint, 2_500_000), range(8)))
        assert time.monotonic() - began < 4 * one, "all eight share one limit"


def test_it_ends_with_the_block_and_says_where_the_server_is_gone(server: str) -> None:
    with shaped(server, latency_ms=0, connection_mb_s=0) as endpoint:
        _get(endpoint, 1)
    with pytest.raises(ConnectionRefusedError):
        _get(endpoint, 1)
    with shaped(endpoint, latency_ms=0, connection_mb_s=0) as beyond, pytest.raises(OSError):
        _get(beyond, 1)


def test_what_it_cannot_pass_through_is_refused() -> None:
    with (
        pytest.raises(ConfigError, match=r"https://s3.* plain http"),
        shaped("https://s3.amazonaws.com", latency_ms=1, connection_mb_s=1),
    ):
        pass
