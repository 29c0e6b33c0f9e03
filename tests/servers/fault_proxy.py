"""An HTTP proxy on loopback between a client and an S3 server that answers some requests with faults.

The client's endpoint is the proxy. Host and every signed header go on unchanged, so the server still checks the
signature. Nothing is logged; what is remembered of a request is its method, its path and its query, without values.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import select
import socket
import socketserver
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from s3_servers import S3Server

from reelmae.tools.bench.seaweed import free_ports

CHUNK = 1 << 16
SERVER_TIMEOUT_S = 60.0
ANSWERS = {
    "500": (500, "InternalError", "We encountered an internal error. Please try again."),
    "503": (503, "SlowDown", "Please reduce your request rate."),
    "expired": (403, "ExpiredToken", "The provided token has expired."),
    "skew": (403, "RequestTimeTooSkewed", "The difference between the request time and the current time is too large."),
    "denied": (403, "AccessDenied", "Access Denied."),
}
KINDS = (*ANSWERS, "reset", "lost", "stall", "truncate", "flip", "flip_upload", "wrong_etag")
PASSING = ("500", "503", "reset", "lost", "stall", "truncate", "flip", "flip_upload")  # what a patient client survives


@dataclass(frozen=True)
class Faults:
    """Which requests get a fault.

    kinds: taken in turn, each for the next request that it fits:
        500, 503      answered by the proxy, with S3's XML; 503 says SlowDown
        expired, skew, denied: 403 ExpiredToken, RequestTimeTooSkewed, AccessDenied
        reset         RST instead of an answer; the server never sees the request
        lost          the server does what was asked, then RST instead of its answer
        stall         accepted, never answered, until the client goes away
        truncate      of a body that is read: half of it, then the connection ends
        flip          of an object's body that is read: one bit of one byte is wrong
        flip_upload   of a body that is written: one bit of one byte is wrong
        wrong_etag    the ETag in the answer to a write is another
    share: of the requests that it fits. Below 1, one request of each 1/share in a row has a fault, which one is drawn
        by `seed`; the first comes among the first three.
    method, path: only requests of this method, and with this text in `/BUCKET/KEY?QUERY` (percent signs decoded).
    most: no more faults than so many.
    """

    kinds: tuple[str, ...]
    share: float = 0.1
    seed: int = 0
    method: str | None = None
    path: str = ""
    most: int | None = None

    def __post_init__(self) -> None:
        """ValueError for a kind that is none."""
        if unknown := set(self.kinds) - set(KINDS):
            raise ValueError(f"no such fault: {sorted(unknown)}")


class FaultProxy:
    """A proxy in front of `server`. `s3` is the server as clients reach it through the proxy.

    `faults` may be set at any time, None lets everything through. `counts` are the faults so far, by kind.
    """

    def __init__(self, server: S3Server, faults: Faults | None = None) -> None:
        self.upstream = server
        self.port = free_ports(1)
        self.s3 = server.at(f"http://127.0.0.1:{self.port}")
        self.requests: list[str] = []
        self.counts: Counter[str] = Counter()
        self._faults = faults
        self._fitting = 0
        self._turn: list[str] = list(faults.kinds) if faults else []
        self._changed = threading.Condition()
        self._connections: set[socket.socket] = set()
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        self.up()

    @property
    def faults(self) -> Faults | None:
        """What goes wrong now."""
        return self._faults

    @faults.setter
    def faults(self, faults: Faults | None) -> None:
        with self._changed:
            self._faults, self._fitting = faults, 0
            self._turn = list(faults.kinds) if faults else []

    def up(self) -> None:
        """Accept connections (again)."""
        self._server = _Server(("127.0.0.1", self.port), self)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def down(self) -> None:
        """Refuse connections from now on, and reset those that are open."""
        if self._server is None:
            return
        server, thread, self._server, self._thread = self._server, self._thread, None, None
        server.shutdown()
        assert thread is not None
        thread.join()
        server.socket.close()
        with self._changed:
            open_ones = list(self._connections)
        for connection in open_ones:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # wakes its handler, which closes it
        server.server_close()  # waits for the handlers

    def close(self) -> None:
        """End it for good."""
        self.down()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait_for(self, kind: str, n: int = 1, *, seconds: float = 60.0) -> None:
        """Until there were `n` faults of this kind; AssertionError where that does not happen."""
        with self._changed:
            came = self._changed.wait_for(lambda: self.counts[kind] >= n, seconds)
        assert came, f"{self.counts[kind]} of {n} faults of kind {kind} in {seconds} s; requests: {self.requests[-5:]}"

    def wait_for_requests(self, n: int, *, path: str = "", method: str = "", seconds: float = 60.0) -> None:
        """Until `n` requests of this method, with this text in their path, have come; AssertionError else."""
        with self._changed:
            came = self._changed.wait_for(lambda: self.seen(path, method) >= n, seconds)
        assert came, f"{self.seen(path, method)} of {n} requests in {seconds} s: {self.requests[-5:]}"

    def seen(self, path: str = "", method: str = "") -> int:
        """How many requests of this method with this text in their path have come."""
        return sum(r.startswith(method) and path in r for r in list(self.requests))

    def _choose(self, method: str, target: str, has_body: bool) -> tuple[str | None, int]:
        """The fault of this request, and its number among those that fit."""
        with self._changed:
            split = urlsplit(target)
            names = "&".join(name for name, _ in parse_qsl(split.query, keep_blank_values=True))
            self.requests.append(f"{method} {unquote(split.path)}" + (f"?{names}" if names else ""))
            self._changed.notify_all()
            faults = self._faults
            if faults is None or (faults.method or method) != method or faults.path not in unquote(target):
                return None, 0
            if faults.most is not None and self.counts.total() >= faults.most:
                return None, 0
            fitting = [kind for kind in self._turn if _fits(kind, method, target, has_body)]
            if not fitting:
                return None, 0
            n, self._fitting = self._fitting, self._fitting + 1
            if not _drawn(n, faults):
                return None, n
            self._turn.remove(fitting[0])
            self._turn.append(fitting[0])
            return fitting[0], n

    def _count(self, kind: str) -> None:
        with self._changed:
            self.counts[kind] += 1
            self._changed.notify_all()


def _drawn(n: int, faults: Faults) -> bool:
    if faults.share >= 1:
        return True
    period = round(1 / faults.share)
    block = n // period
    digest = hashlib.sha256(f"{faults.seed}/{block}".encode()).digest()
    return n % period == digest[0] % (min(period, 3) if block == 0 else period)


def _fits(kind: str, method: str, target: str, has_body: bool) -> bool:
    path, _, query = target.partition("?")
    of_object = path.strip("/").count("/") > 0 and "list-type" not in query
    if kind == "truncate":
        return method == "GET"
    if kind == "flip":  # nothing can check a listing
        return method == "GET" and of_object
    if kind == "flip_upload":
        return method == "PUT" and of_object and has_body
    if kind == "wrong_etag":
        return method in ("PUT", "POST") and of_object
    return True


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], proxy: FaultProxy) -> None:
        self.proxy = proxy
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Remember the connection before its thread runs, so that `down` misses none."""
        with self.proxy._changed:
            self.proxy._connections.add(request)
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client or a server that goes away is what this is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.proxy = self.server.proxy
        self.to_server: http.client.HTTPConnection | None = None

    def finish(self) -> None:
        with self.proxy._changed:
            self.proxy._connections.discard(self.connection)
        if self.to_server is not None:
            self.to_server.close()
        super().finish()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is logged."""

    def do(self) -> None:
        """Any request: pass it on, or do what its fault says."""
        try:
            self._answer()
        except (OSError, http.client.HTTPException):  # either side went away
            self.close_connection = True

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do

    def _answer(self) -> None:
        chunked = "chunked" in self.headers.get("Transfer-Encoding", "").lower()
        size = int(self.headers.get("Content-Length") or 0)
        kind, n = self.proxy._choose(self.command, self.path, size > 0)
        body = self._chunks() if chunked else self._body(size, flip=n if kind == "flip_upload" else None)
        if kind in ANSWERS:
            for _ in body:
                pass
            self.proxy._count(kind)
            self._refuse(*ANSWERS[kind])
        elif kind == "stall":
            self.proxy._count(kind)
            self._wait_for_its_end()
        elif kind == "reset":
            self.proxy._count(kind)
            self._reset()
        else:
            if kind == "flip_upload":
                self.proxy._count(kind)
            answer = self._pass_on(body)
            if kind == "lost":
                answer.read()
                self.proxy._count(kind)
                self._reset()
            else:
                self._pass_back(answer, kind, n)

    def _body(self, size: int, *, flip: int | None) -> Iterator[bytes]:
        """The request's body; with `flip`, one bit of it is another."""
        place = None if flip is None else _place(flip, size)
        at = 0
        while at < size:
            data = self.rfile.read(min(CHUNK, size - at))
            if not data:
                raise ConnectionResetError("the client went away")
            yield _flipped(data, place, at)
            at += len(data)

    def _chunks(self) -> Iterator[bytes]:
        """A chunked body, with the lines that say how long each chunk is."""
        while True:
            line = self.rfile.readline(200)
            length = int(line.split(b";")[0], 16)
            yield line
            yield self.rfile.read(length)
            if length == 0:
                while (trailer := self.rfile.readline(CHUNK)) not in (b"\r\n", b""):
                    yield trailer
                yield b"\r\n"
                return
            yield self.rfile.read(2)

    def _pass_on(self, body: Iterator[bytes]) -> http.client.HTTPResponse:
        if self.to_server is None:
            where = urlsplit(self.proxy.upstream.endpoint)
            assert where.hostname is not None
            self.to_server = http.client.HTTPConnection(where.hostname, where.port, timeout=SERVER_TIMEOUT_S)
        self.to_server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("expect", "connection"):  # the client was told to continue; neither is signed
                self.to_server.putheader(name, value.encode("latin-1"))
        self.to_server.endheaders()
        for data in body:
            self.to_server.send(data)
        return self.to_server.getresponse()

    def _pass_back(self, answer: http.client.HTTPResponse, kind: str | None, n: int) -> None:
        length = answer.getheader("Content-Length")
        size = int(length) if length is not None and self.command != "HEAD" else 0
        good = answer.status in (200, 206)
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.headers.items():
            if kind == "wrong_etag" and name.lower() == "etag" and good:
                value = '"%s"' % hashlib.md5(str(n).encode()).hexdigest()  # noqa: UP031 - it holds quotes
                self.proxy._count(kind)
            if name.lower() not in ("connection", "transfer-encoding"):
                self.send_header(name, value)
        streamed = answer.chunked and self.command != "HEAD"
        if streamed:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        place = _place(n, size) if kind == "flip" and good and size else None
        end = size // 2 if kind == "truncate" and good and (size or streamed) else None
        at = 0
        while data := answer.read(CHUNK):
            if end is not None and (streamed or at + len(data) > end):
                self.wfile.write(data[: max(0, end - at)])
                self.proxy._count("truncate")
                self.close_connection = True
                return
            data = _flipped(data, place, at)
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data) if streamed else data)
            at += len(data)
        if streamed:
            self.wfile.write(b"0\r\n\r\n")
        if place is not None:
            self.proxy._count("flip")

    def _refuse(self, status: int, code: str, message: str) -> None:
        text = f"<Error><Code>{code}</Code><Message>{message}</Message><RequestId>proxy</RequestId></Error>"
        body = f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'.encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _wait_for_its_end(self) -> None:
        """Until the client has closed its side; what it still sends is taken and left unanswered."""
        self.close_connection = True
        while True:
            readable, _, _ = select.select([self.connection], [], [], 0.2)
            if readable and not self.connection.recv(CHUNK):
                return
            if self.proxy._server is not self.server:
                return

    def _reset(self) -> None:
        self.close_connection = True
        _reset(self.connection)


def _place(n: int, size: int) -> int:
    """Which byte of a body of this size is wrong: another one each time."""
    return int.from_bytes(hashlib.sha256(b"%d" % n).digest()[:8], "big") % max(1, size)


def _flipped(data: bytes, place: int | None, at: int) -> bytes:
    """`data`, which begins at byte `at` of a body, with one bit of byte `place` turned."""
    if place is None or not at <= place < at + len(data):
        return data
    changed = bytearray(data)
    changed[place - at] ^= 0x10
    return bytes(changed)


def _reset(connection: socket.socket) -> None:
    """Close it with RST, whoever still holds the object."""
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        fd = connection.detach()
        if fd >= 0:
            os.close(fd)


def wait_until(true: Any, *, seconds: float = 60.0, what: str = "") -> None:
    """Until this function gives something true; AssertionError where it does not in time."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not in {seconds} s: {what or true}"
        time.sleep(0.02)
