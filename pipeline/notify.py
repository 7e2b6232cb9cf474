"""Telling someone that a run has ended: one POST of JSON to a webhook, tried again, never in the run's way.

The address may hold a secret, as those of chat services do, so neither logs nor messages show more than its host.
"""

from __future__ import annotations

import http.client
import json
import logging
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

import stamina

from pipeline.errors import ConfigError

logger = logging.getLogger(__name__)

ATTEMPTS = 5
TIMEOUT_SECONDS = 10.0
"""Of one attempt."""
FAILURES = (OSError, http.client.HTTPException)


def check_webhook(url: str) -> None:
    """
    Raises:
        ConfigError: it is no address that a POST can go to.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError("notify must be an http:// or https:// address of a webhook, got something else")


def notify(url: str, text: str, record: Mapping[str, Any]) -> bool:
    """POST the record, with a sentence under ``text``, which chat services show. Whether it was taken."""
    data = json.dumps({"text": text, **record}).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method="POST")
    attempts = stamina.retry_context(
        on=_may_pass, attempts=ATTEMPTS, timeout=60.0, wait_initial=1.0, wait_max=15.0, wait_jitter=1.0
    )
    try:
        for attempt in attempts:
            with attempt, urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS):
                pass
    except FAILURES as error:
        logger.warning("the webhook was not told host=%s error=%s", urlsplit(url).hostname, type(error).__name__)
        return False
    return True


def _may_pass(error: Exception) -> bool:
    """Timeouts, lost connections, 5xx and 429; not what the service says is wrong with the request."""
    if isinstance(error, HTTPError):
        error.close()  # it holds the answer's connection
        return error.code == 429 or error.code >= 500
    return isinstance(error, FAILURES)
