"""A relay that makes a server on this machine look far away: `shaped(endpoint, …)`, a process of its own.

Each answer's first byte comes `latency_ms` later than the server sends it, and each connection carries at most
`connection_mb_s` in each direction, as many connections as there are. What is not modelled: the time to open a
connection, slow start, packet loss. Bytes pass untouched. A server must accept the relay's address as its own name,
since clients sign it (S3 servers do), and must speak HTTP without TLS.

An answer is what the server sends after the client has sent something: no message is parsed.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

from reelmae.pipeline.errors import ConfigError, ReelmaeError

PIECE = 256 << 10  # bytes carried at a time; at 60 MB/s one is sent every 4 ms
CREDIT_S = 0.01  # what a pump that slept too long may catch up


@contextlib.contextmanager
def shaped(endpoint: str, *, latency_ms: float, connection_mb_s: float) -> Iterator[str]:
    """The endpoint of a relay to the server at `endpoint`, which ends with the block.

    0 for `connection_mb_s` does not limit. ConfigError where `endpoint` is not plain HTTP.
    """
    to = urlsplit(endpoint)
    if to.scheme != "http" or not to.hostname:
        raise ConfigError(
            f"{endpoint}: only an endpoint of plain http:// can be shaped, since bytes pass untouched; "
            "leave --latency-ms and --connection-mb-s out"
        )
    values = (to.hostname, to.port or 80, latency_ms / 1000, connection_mb_s * 1e6)
    argv = [sys.executable, "-P", "-m", "reelmae.tools.bench.shaping", *map(str, values)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as relay:
        try:
            assert relay.stdout is not None
            port = relay.stdout.readline().strip()
            if not port:
                raise ReelmaeError(f"the relay to {endpoint} did not start; its own message is above")
            yield f"http://127.0.0.1:{port}"
        finally:
            relay.kill()


def relay(host: str, port: int, latency_s: float, bytes_per_s: float) -> int:
    """Accept connections on a free port of this machine, in threads; returns the port."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)

    def accept() -> None:
        while True:
            client, _ = listener.accept()
            threading.Thread(target=_serve, args=(client, (host, port), latency_s, bytes_per_s), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return int(listener.getsockname()[1])


def _serve(client: socket.socket, address: tuple[str, int], latency_s: float, bytes_per_s: float) -> None:
    """Both directions of one connection until both have ended."""
    with client:
        try:
            server = socket.create_connection(address)
        except OSError:  # the client sees its connection end, as it would see the server's
            return
        with server:
            for side in (client, server):
                side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            asked = threading.Event()
            up = threading.Thread(target=_pump, args=(client, server, bytes_per_s, asked.set), daemon=True)
            up.start()

            def delay() -> None:
                if asked.is_set():
                    asked.clear()
                    time.sleep(latency_s)

            _pump(server, client, bytes_per_s, delay)
            up.join()


def _pump(source: socket.socket, sink: socket.socket, bytes_per_s: float, before: Callable[[], None]) -> None:
    """Carry bytes one way until `source` ends or one side is gone; `before` is called before each piece is sent."""
    buffer = memoryview(bytearray(PIECE))
    free_at = 0.0
    try:
        while n := source.recv_into(buffer):
            before()
            if bytes_per_s:
                now = time.monotonic()
                if free_at > now:
                    time.sleep(free_at - now)
                free_at = max(free_at, now - CREDIT_S) + n / bytes_per_s
            sink.sendall(buffer[:n])
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        for side in (source, sink):
            with contextlib.suppress(OSError):  # it is closed already
                side.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    print(relay(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])), flush=True)
    sys.stdin.read()  # ends with the process that started it
