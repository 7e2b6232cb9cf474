"""Stores to test against: a local folder, memory, and a real S3 server on the loopback."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import fsspec
import pytest
import stamina
import torch

from pipeline import uris
from tests.pipeline.s3_server import FaultyProxy, running_server

# Without a GPU our kernels are interpreted. Triton asks for this as its own functions are defined, when it is first
# imported, and torchvision imports it: a conftest below this one, next to those that import a network, is too late.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    with running_server() as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def client_endpoint() -> list[str]:
    """The endpoint that the S3 clients of this process were made for; making one costs more than most tests."""
    return [""]


@pytest.fixture
def s3_environment(monkeypatch: pytest.MonkeyPatch, client_endpoint: list[str]) -> Callable[[str], None]:
    """Point S3 clients, here and in processes started from here, to an endpoint."""

    def use(endpoint: str) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        if client_endpoint != [endpoint]:
            uris.forget_clients()
            client_endpoint[:] = [endpoint]

    return use


@pytest.fixture
def fresh_clients(client_endpoint: list[str]) -> Iterator[None]:
    """For tests that change how clients are made."""
    uris.forget_clients()
    yield
    uris.forget_clients()
    client_endpoint[:] = [""]


@pytest.fixture
def s3_root(s3_endpoint: str, s3_environment: Callable[[str], None]) -> str:
    """A bucket of this test's own."""
    s3_environment(s3_endpoint)
    bucket = f"maskline-{uuid.uuid4().hex[:12]}"
    uris.resolve(f"s3://{bucket}")[0].mkdir(bucket)
    return f"s3://{bucket}/root"


@pytest.fixture
def faulty_s3(s3_root: str, s3_endpoint: str, s3_environment: Callable[[str], None]) -> Iterator[FaultyProxy]:
    """The same server behind a proxy that can fail; no waiting between retries, of which there are at most five."""
    with FaultyProxy(s3_endpoint) as proxy, stamina.set_testing(True, attempts=5, cap=False):
        s3_environment(proxy.endpoint)
        yield proxy


@pytest.fixture
def memory_root() -> Iterator[str]:
    root = f"memory://maskline-{uuid.uuid4().hex[:12]}/root"
    yield root
    with suppress(FileNotFoundError):  # nothing was written, or nothing is left
        fsspec.filesystem("memory").rm(root.removeprefix("memory:/").rpartition("/")[0], recursive=True)


@pytest.fixture(params=["local", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The root URI of an empty store, one after another of each backend."""
    if request.param == "local":
        return str(tmp_path / "root")
    return str(request.getfixturevalue(f"{request.param}_root"))


@pytest.fixture
def unused_endpoint() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"
