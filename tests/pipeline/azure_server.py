"""Microsoft's Azurite on the loopback, where it is installed: ``npm install azurite``.

It is the command ``azurite-blob`` on PATH, or what MASKLINE_AZURITE names.
"""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from tests.pipeline.s3_server import serving

ACCOUNT = "maskline"
KEY = base64.b64encode(b"known to everybody who reads this").decode()
QUIETLY = ["--silent", "--disableTelemetry", "--skipApiVersionCheck", "--inMemoryPersistence"]


def azurite() -> str | None:
    return os.environ.get("MASKLINE_AZURITE") or shutil.which("azurite-blob")


@contextmanager
def running_azurite(command: str) -> Iterator[str]:
    with serving(
        lambda port: [command, *QUIETLY, "--blobHost", "127.0.0.1", "--blobPort", str(port)],
        AZURITE_ACCOUNTS=f"{ACCOUNT}:{KEY}",
    ) as endpoint:
        yield endpoint


def connection_string(endpoint: str) -> str:
    """What AZURE_STORAGE_CONNECTION_STRING holds for clients of it."""
    return f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={endpoint}/{ACCOUNT};"
