"""What a URI names: a local path, or a key in a store that a client opens.

A URI enters; its local path, its public form, or a client and the path in its store leave.
"""

from __future__ import annotations

import errno
import os
import re
from functools import lru_cache
from typing import Any

import fsspec

from pipeline.errors import ConfigError

EXTRAS = {
    "memory": "",
    "s3": "s3",
    "s3a": "s3",
    "gs": "gcs",
    "gcs": "gcs",
    "az": "azure",
    "abfs": "azure",
    "abfss": "azure",
}
"""The remote schemes, and the extra of this package that brings the client of each."""

_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_CHAINED = re.compile(r"^[A-Za-z0-9+.-]+::|::[A-Za-z0-9+.-]+://")
_CREDENTIALS = re.compile(r"^[^/@]*:[^/@]*@")
_QUERY = re.compile(r"[?][A-Za-z][\w.-]*=[^/?]*$")


def local_path(uri: str) -> str | None:
    """The path of a local file, None for a remote URI. A plain absolute path is taken as it stands."""
    if uri.startswith("/"):
        return uri
    match = _URI.match(uri)
    if match is None:
        if _CHAINED.search(uri):
            raise ConfigError(f"chained URIs are not taken: {uri!r}; give the archive itself")
        return uri
    return match[2] if match[1].lower() in ("file", "local") else None


def is_local(uri: str) -> bool:
    return local_path(uri) is not None


def scheme_of(uri: str) -> str:
    """The scheme of a remote URI, one name per store."""
    scheme = uri.split("://", 1)[0].lower()
    return {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az"}.get(scheme, scheme)


def join(uri: str, *parts: str) -> str:
    for part in parts:
        uri = (uri if uri.endswith("/") else uri + "/") + part.strip("/")
    return uri


def public_uri(uri: str) -> str:
    """The URI as it may be shown and stored: no user:password@, no query string; local paths absolute and plain."""
    path = local_path(uri)
    if path is not None:
        return os.path.abspath(path)
    scheme, rest = uri.split("://", 1)
    rest = _QUERY.sub("", _CREDENTIALS.sub("", rest))
    if scheme.lower() == "memory":
        rest = rest.lstrip("/")
    return f"{scheme.lower()}://{rest}"


def refuse_credentials(uri: str) -> None:
    """
    Raises:
        ConfigError: the URI has a user and a password in it.
    """
    if local_path(uri) is None and _CREDENTIALS.match(uri.split("://", 1)[1]):
        raise ConfigError(f"credentials in a URI end up in logs: {public_uri(uri)}; give them through the environment")


def resolve(uri: str) -> tuple[Any, str]:
    """The fsspec file system of a URI and the path in it, for libraries that want them. Its client retries a little."""
    return _locate(uri, client_retries=True)


def locate(uri: str) -> tuple[Any, str]:
    """As ``resolve``, with a client that tries once: for calls that ``retry.py`` repeats, or nobody may."""
    return _locate(uri, client_retries=False)


def _locate(uri: str, *, client_retries: bool) -> tuple[Any, str]:
    path = local_path(uri)
    if path is not None:
        return _file_system("file", os.getpid(), client_retries), os.path.abspath(path)
    scheme, rest = uri.split("://", 1)
    scheme = scheme.lower()
    if _CHAINED.search(uri):
        raise ConfigError(f"chained URIs are not taken: {public_uri(uri)}; give the archive itself")
    if scheme not in EXTRAS:
        known = ", ".join(f"{name}://" for name in ("s3", "gs", "az", "abfs", "memory"))
        raise ConfigError(f"no storage for {scheme}:// in {public_uri(uri)}; give a local path or one of {known}")
    refuse_credentials(uri)
    fs = _file_system(scheme, os.getpid(), client_retries)
    if scheme_of(uri) == "s3":
        return fs, rest.lstrip("/")  # fsspec would strip a trailing slash, which is part of a key
    if scheme == "memory":
        return fs, "/" + rest.strip("/")
    path = fs._strip_protocol(uri)
    key = fs.split_path(path)[1]  # adlfs takes a key apart as a URL, and loses a ? or # at its end
    if not rest.rstrip("/").endswith(f"/{key}".rstrip("/")):
        raise OSError(errno.EINVAL, f"its client would take this key for {key!r}", public_uri(uri))
    return fs, path


@lru_cache(maxsize=16)
def _file_system(scheme: str, _pid: int, client_retries: bool) -> Any:
    """One client per process, not one per thread as fsspec keeps them; listings are never cached."""
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if scheme in ("s3", "s3a"):
        options["config_kwargs"] = {"max_pool_connections": 64}
        if not client_retries:
            options["config_kwargs"]["retries"] = {"total_max_attempts": 1}
    try:
        fs = fsspec.filesystem(scheme, **options)
    except ImportError as error:
        raise ConfigError(f"{scheme}:// needs another package: pip install 'maskline[{EXTRAS[scheme]}]'") from error
    except ValueError as error:  # adlfs, when no account is named
        raise ConfigError(
            f"cannot open {scheme}:// ({error}): set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, "
            "or AZURE_STORAGE_CONNECTION_STRING"
        ) from error
    if not client_retries:
        _try_once(fs, scheme)
    return fs


def _try_once(fs: Any, scheme: str) -> None:
    """Turn off what a client tries again by itself. Google's and Azure's have no switch for it."""
    if scheme in ("s3", "s3a"):
        fs.retries = 1
    elif scheme in ("gs", "gcs"):
        fs._request = fs._request.__wrapped__.__get__(fs)
    elif scheme in ("az", "abfs", "abfss"):
        fs.service_client._config.retry_policy.total_retries = 0


def forget_clients() -> None:
    """Drop the clients of this process, as when the credentials in the environment have changed."""
    _file_system.cache_clear()
