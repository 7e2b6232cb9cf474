"""An S3 server on the loopback for tests, and a proxy before it, or another store's, that misbehaves as asked.

``running_server()`` yields the endpoint of a real (moto) server process. ``FaultyProxy`` forwards to one, spending
its ``faults`` one per request: a number of ERROR_CODES answers so, "503+7" with Retry-After: 7;
"reset" closes the connection before the request is served, "lost" after it, "cut" in the middle of the answer's body;
"stale" repeats the last answer to the same request; "" forwards.
"""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

Headers = list[tuple[str, str]]
Answer = tuple[int, Headers, bytes]

START_SECONDS = 30.0
ERROR_CODES = {
    "401": "Unauthorized",
    "403": "AccessDenied",
    "409": "ConditionalRequestConflict",
    "412": "PreconditionFailed",
    "500": "InternalError",
    "502": "BadGateway",
    "503": "SlowDown",
}


@contextmanager
def running_server() -> Iterator[str]:
    script = str(Path(__file__).with_name("atomic_s3.py"))
    with serving(lambda port: [sys.executable, script, "-H", "127.0.0.1", "-p", str(port)]) as endpoint:
        yield endpoint


@contextmanager
def serving(command: Callable[[int], list[str]], **environment: str) -> Iterator[str]:
    """The endpoint of a server process that ``command(port)`` starts, until the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        command(port), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **environment}
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
    raise RuntimeError(f"{server.args!r} did not come up on port {port} within {START_SECONDS} s")


class FaultyProxy:
    """A proxy on a free port; use as a context manager."""

    def __init__(self, target: str) -> None:
        self.faults: list[str] = []
        self.is_cut = False
        """Every connection is closed before its request is served."""
        self.requests: list[tuple[str, str]] = []
        """Method and path of every request that arrived."""
        self.bytes_served = 0
        self.answers: dict[tuple[str, str], Answer] = {}
        """The last answer to every request that was answered."""
        handler = type("Handler", (_Forwarder,), {"proxy": self, "target": target.removeprefix("http://")})
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def next_fault(self) -> str:
        with self._lock:
            return self.faults.pop(0) if self.faults else ""

    @contextmanager
    def cleared(self) -> Iterator[FaultyProxy]:
        """Nothing was asked of it before, nor is any fault left after."""
        self.requests.clear()
        self.answers.clear()
        self.bytes_served = 0
        yield self
        self.faults = []

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
        fault, _, wait = self.proxy.next_fault().partition("+")
        if fault == "reset" or self.proxy.is_cut:
            self._hang_up()
        elif fault == "stale":
            self._answer(*self.proxy.answers[self.command, self.path])
        elif fault in ERROR_CODES:
            code = ERROR_CODES[fault]
            headers = [("Retry-After", wait)] if wait else []
            self._answer(int(fault), headers, f"<Error><Code>{code}</Code><Message>as asked</Message></Error>".encode())
        else:
            answer = self._served(body)
            if fault == "lost":
                self._hang_up()
            else:
                self.proxy.answers[self.command, self.path] = answer
                self._answer(*answer, cut=fault == "cut")

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _forward  # noqa: N815  the names that http.server looks up

    def _served(self, body: bytes) -> Answer:
        with closing(http.client.HTTPConnection(self.target, timeout=30)) as connection:
            connection.request(self.command, self.path, body, dict(self.headers.items()))
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()

    def _answer(self, status: int, headers: Headers, content: bytes, cut: bool = False) -> None:
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
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.wfile.flush()
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):  # the client was faster
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: object) -> None:
        """Quiet."""
