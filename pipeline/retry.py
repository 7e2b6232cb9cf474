"""One retry rule for remote stores: jittered, for minutes, and only for what may pass by itself.

A call and its URI enter; its answer, or an ``OSError`` or ``ConfigError``, leaves. The clients' own retries are
turned off (``uris.py``): s3fs sleeps 1.9 s in all, and nested retries multiply the load on a throttled store.
"""

from __future__ import annotations

import errno
import functools
import logging
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Concatenate, ParamSpec, TypeVar

import stamina

from pipeline.errors import ConfigError
from pipeline.uris import public_uri

logger = logging.getLogger(__name__)

RETRY_SECONDS = 150.0
"""How long one call is tried again before its error is raised."""

RETRY_AFTER_SECONDS = 60.0
"""The longest wait that a store's Retry-After is granted."""

CLIENT_PACKAGES = {
    "botocore",
    "aiobotocore",
    "s3fs",
    "aiohttp",
    "urllib3",
    "gcsfs",
    "google",
    "adlfs",
    "azure",
    "requests",
}

# Classes by name, so that no client has to be imported (or installed) to recognise its errors.
TRANSIENT_CLASSES = {
    "HTTPClientError",  # botocore: connect and read timeouts, closed connections
    "ResponseParserError",  # botocore: a throttled S3 may answer with half a document
    "ClientConnectionError",  # aiohttp
    "ClientPayloadError",  # aiohttp: the body ended early
    "ProxyError",  # requests: how gcsfs raises an answer 502
    "IncompleteRead",  # urllib3, http.client
    "ServiceRequestError",  # azure
    "ServiceResponseError",  # azure
    "TransportError",  # google.auth
}
CREDENTIAL_CLASSES = {
    "NoCredentialsError",  # botocore
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "ProfileNotFound",
    "DefaultCredentialsError",  # google.auth
    "ClientAuthenticationError",  # azure
}
PERMANENT_ERRORS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)

# What a client's error is raised as, and the number it gets where the client gave none. First match.
OS_ERRORS: dict[type[OSError], int] = {
    FileNotFoundError: errno.ENOENT,
    FileExistsError: errno.EEXIST,
    PermissionError: errno.EACCES,
    IsADirectoryError: errno.EISDIR,
    NotADirectoryError: errno.ENOTDIR,
    TimeoutError: errno.ETIMEDOUT,
    ConnectionError: errno.ECONNRESET,
    OSError: errno.EIO,
}

P = ParamSpec("P")
T = TypeVar("T")

_count_lock = threading.Lock()
_retries = 0


def retry_count() -> int:
    """How often a storage call of this process was followed by an error that is tried again."""
    return _retries


def retried(call: Callable[Concatenate[str, P], T]) -> Callable[Concatenate[str, P], T]:
    """Wrap a function of a remote URI: transient errors are retried for ``RETRY_SECONDS``, foreign ones mapped."""

    @functools.wraps(call)
    def wrapper(uri: str, /, *args: P.args, **kwargs: P.kwargs) -> T:
        noted = False

        def should_retry(error: Exception) -> bool | float:
            nonlocal noted
            if not is_transient(error):
                return False
            _count_retry()
            if not noted:
                noted = True
                logger.warning(
                    "storage call tried again call=%s uri=%s for_up_to_seconds=%.0f error=%s: %s",
                    call.__name__.lstrip("_"), public_uri(uri), RETRY_SECONDS, type(error).__name__, error,
                )  # fmt: skip
            return retry_after(error) or True

        attempts = stamina.retry_context(
            should_retry, attempts=None, timeout=RETRY_SECONDS, wait_initial=0.5, wait_max=40.0, wait_jitter=2.0
        )
        with mapped_errors(uri):
            for attempt in attempts:
                with attempt:
                    return call(uri, *args, **kwargs)
        raise AssertionError("unreachable: the last attempt returns or raises")

    return wrapper


@contextmanager
def mapped_errors(uri: str) -> Iterator[None]:
    """Turn the errors of store clients into ``OSError`` that name the URI, or ``ConfigError``; let others through."""
    try:
        yield
    except Exception as error:
        shown = public_uri(uri)
        status = http_status(error)
        if _class_names(error) & CREDENTIAL_CLASSES or status == 401:
            raise ConfigError(_credentials_message(shown, error)) from error
        if isinstance(error, OSError):
            if error.filename == shown:
                raise
            kind = next(kind for kind in OS_ERRORS if isinstance(error, kind))
            raise kind(error.errno or OS_ERRORS[kind], error.strerror or str(error), shown) from error
        if _is_from_client(error):
            if status == 404:
                raise FileNotFoundError(errno.ENOENT, f"not found: {error}", shown) from error
            raise OSError(errno.EIO, f"{type(error).__name__}: {error}", shown) from error
        raise


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: timeouts, lost connections, throttling, 5xx."""
    if isinstance(error, PERMANENT_ERRORS):
        return False
    for link in _causes(error):
        names = _class_names(link)
        if names & CREDENTIAL_CLASSES or "SSLError" in names:
            return False
        if isinstance(link, TimeoutError | ConnectionError) or names & TRANSIENT_CLASSES:
            return True  # before its cause is looked at: under a body that ended early, aiohttp hangs a "400"
        status = _own_status(link)
        if status is not None:
            return status in (408, 429) or (status >= 500 and status != 501)
    return False


def http_status(error: BaseException) -> int | None:
    """The HTTP status that a store's client hung on its error or on the cause of it."""
    return next((found for found in map(_own_status, _causes(error)) if found is not None), None)


def _own_status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)  # botocore
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        found = getattr(error, "status_code", None) or getattr(error, "status", None) or getattr(error, "code", None)
    return found if isinstance(found, int) and 100 <= found <= 599 else None


def retry_after(error: BaseException) -> float | None:
    """The seconds that a store asked to be left alone for, jittered and bounded; None if it did not ask."""
    for link in _causes(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict):  # botocore
            headers = response.get("ResponseMetadata", {}).get("HTTPHeaders")
        else:
            headers = getattr(response, "headers", None)
        asked = str(headers.get("retry-after", "")) if headers else ""
        if asked.isdecimal():  # a date, which no store was seen to send, is left to our own waits
            return min(float(asked), RETRY_AFTER_SECONDS) + random.uniform(0, 2)
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__


def _class_names(error: BaseException) -> set[str]:
    return {cls.__name__ for cls in type(error).__mro__}


def _is_from_client(error: BaseException) -> bool:
    return any(cls.__module__.split(".")[0] in CLIENT_PACKAGES for cls in type(error).__mro__)


def _credentials_message(uri: str, error: Exception) -> str:
    if uri.startswith("s3"):
        step = (
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE), or FSSPEC_S3_ANON=true if it is public"
        )
    elif uri.startswith("g"):
        step = "run `gcloud auth application-default login` or set GOOGLE_APPLICATION_CREDENTIALS"
    else:
        step = "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_STORAGE_CONNECTION_STRING"
    return f"no usable credentials for {uri} ({error}): {step}"


def _count_retry() -> None:
    global _retries  # noqa: PLW0603  one counter per process, read through retry_count()
    with _count_lock:
        _retries += 1
