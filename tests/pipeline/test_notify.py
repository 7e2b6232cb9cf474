"""A webhook on the loopback that takes, refuses or fails as asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
import stamina

from pipeline.errors import ConfigError
from pipeline.notify import ATTEMPTS, check_webhook, notify


class Webhook:
    """Answers with its statuses, one for each request, then 200."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.taken: list[dict[str, Any]] = []
        webhook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status = webhook.statuses.pop(0) if webhook.statuses else 200
                if status == 200:
                    webhook.taken.append(json.loads(body))
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/services/SECRET"


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    opened = Webhook()
    thread = threading.Thread(target=opened.server.serve_forever)
    thread.start()
    yield opened
    opened.server.shutdown()
    thread.join()
    opened.server.server_close()


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    with stamina.set_testing(True, attempts=ATTEMPTS):
        yield


def test_the_record_arrives_with_its_sentence(webhook: Webhook) -> None:
    assert notify(webhook.url, "240 ok", {"status": "done", "images_ok": 240})
    assert webhook.taken == [{"text": "240 ok", "status": "done", "images_ok": 240}]


def test_what_may_pass_is_tried_again(webhook: Webhook) -> None:
    webhook.statuses = [503, 429, 500]
    assert notify(webhook.url, "x", {})
    assert len(webhook.taken) == 1


def test_a_refusal_is_not_and_tells_no_secret(webhook: Webhook, caplog: pytest.LogCaptureFixture) -> None:
    webhook.statuses = [403, 403]
    assert not notify(webhook.url, "x", {})
    assert webhook.statuses == [403]
    assert "127.0.0.1" in caplog.text
    assert "SECRET" not in caplog.text


def test_nobody_there_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    assert not notify("http://127.0.0.1:9/SECRET", "x", {})
    assert "SECRET" not in caplog.text


@pytest.mark.parametrize("url", ["ftp://host/x", "hooks.example/SECRET", "http:///SECRET", "file:///etc/passwd"])
def test_what_is_no_webhook_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="notify must be an http") as raised:
        check_webhook(url)
    assert "SECRET" not in str(raised.value)
