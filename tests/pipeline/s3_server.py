"""An S3 server on the loopback for tests, and a proxy before it that misbehaves as asked.

``running_server()`` yields the endpoint of a real (moto) server process. ``FaultyProxy`` forwards to one, spending
its ``faults`` one per request: "403", "409", "500", "503" answer so; "reset" closes the connection before the
request is served, "lost" after it; "" forwards.
"""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

START_SECONDS = 30.0
ERROR_CODES = {
    "403": "AccessDenied",
    "409": "ConditionalRequestConflict",
    "500": "InternalError",
    "503": "SlowDown",
}


@contextmanager
def running_server() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(port, server)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"the S3 server did not come up on port {port} within {START_SECONDS} s")


class FaultyProxy:
    """A proxy on a free port; use as a context manager."""

    def __init__(self, target: str) -> None:
        self.faults: list[str] = []
        self.requests: list[tuple[str, str]] = []
        """Method and path of every request that arrived."""
        self.bytes_served = 0
        handler = type("Handler", (_Forwarder,), {"proxy": self, "target": target.removeprefix("http://")})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FaultyProxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Forwarder(BaseHTTPRequestHandler):
    proxy: ClassVar[FaultyProxy]
    target: ClassVar[str]
    protocol_version = "HTTP/1.1"

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.proxy.requests.append((self.command, self.path))
        fault = self.proxy.faults.pop(0) if self.proxy.faults else ""
        if fault == "reset":
            self._hang_up()
        elif fault in ERROR_CODES:
            code = ERROR_CODES[fault]
            self._answer(int(fault), [], f"<Error><Code>{code}</Code><Message>as asked</Message></Error>".encode())
        else:
            connection = http.client.HTTPConnection(self.target, timeout=30)
            connection.request(self.command, self.path, body, dict(self.headers.items()))
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
            if fault == "lost":
                self._hang_up()
            else:
                self._answer(answer.status, answer.getheaders(), content)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _forward  # noqa: N815  the names that http.server looks up

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self.send_response(status)
        dropped = {"transfer-encoding", "connection", "date", "server"}
        if self.command != "HEAD":
            dropped.add("content-length")
            self.send_header("Content-Length", str(len(content)))
        for name, value in headers:
            if name.lower() not in dropped:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.proxy.bytes_served += len(content)  # before the client can have it all
            self.wfile.write(content)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: object) -> None:
        """Quiet."""
