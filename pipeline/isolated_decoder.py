"""Decoding in a process of its own, for shards that already cost a worker: a crash or a hang costs one image.

The parent sends encoded bytes over a pipe and receives pixels or a reason. A child that dies is ``killed_worker``, one
that does not answer in time is killed and is ``timeout``; the next image gets a fresh child.
"""

from __future__ import annotations

import importlib
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from model.structures import ImageSize
from pipeline.decode import DecodeLimits, ImageHeader, fast_operators, inspect
from pipeline.errors import DecodeError, PipelineError

START_TIMEOUT_SECONDS = 120.0
"""For a child to load its libraries."""

Decode = Callable[[bytes, ImageHeader], NDArray[np.uint8]]

EXTRA_MEMORY_BYTES = 4 * 1024**3
"""What a child may take beyond what it holds once its libraries are loaded."""


class IsolatedDecoder:
    """Decodes one image at a time in a child process. Not thread-safe; close it, or use it as a context."""

    def __init__(self, decode: Decode, limits: DecodeLimits, *, timeout_seconds: float) -> None:
        self._decode = f"{decode.__module__}:{decode.__qualname__}"
        self._limits, self._timeout_seconds = limits, timeout_seconds
        self._child: subprocess.Popen[bytes] | None = None
        self._pipe: Connection[bytes, bytes] | None = None

    def __enter__(self) -> IsolatedDecoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def decode(self, data: bytes, shrink: int = 1) -> tuple[NDArray[np.uint8], int]:
        """Pixels (H, W, 3) uint8, oriented, and the EXIF orientation that was applied; `shrink` as of ImageHeader.

        Raises:
            DecodeError: the image is bad, or killed its decoder, or took longer than ``timeout_seconds``.
        """
        pipe = self._pipe or self._start()
        try:
            pipe.send_bytes(bytes([shrink]))
            pipe.send_bytes(data)
            if not pipe.poll(self._timeout_seconds):
                self.close()
                raise DecodeError("timeout", f"decoding took more than {self._timeout_seconds:g} s")
            size, orientation, failure = pickle.loads(pipe.recv_bytes())  # our own child's words
            pixels = b"" if failure is not None else pipe.recv_bytes()
        except (EOFError, OSError) as error:
            self.close()
            raise DecodeError("killed_worker", "decoding ended its process") from error
        if failure is not None:
            raise failure
        return np.frombuffer(pixels, np.uint8).reshape(*size, 3), orientation

    def close(self) -> None:
        """End the child, if there is one."""
        if self._pipe is not None:
            self._pipe.close()
        if self._child is not None:
            self._child.kill()
            self._child.wait()
        self._child = self._pipe = None

    def _start(self) -> Connection[bytes, bytes]:
        self._pipe, theirs = Pipe()
        limits = f"{self._limits.max_image_bytes},{self._limits.max_image_pixels}"
        self._child = subprocess.Popen(
            [sys.executable, "-m", "pipeline.isolated_decoder", str(theirs.fileno()), self._decode, limits],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        if not self._pipe.poll(START_TIMEOUT_SECONDS):
            self.close()
            raise PipelineError(
                f"a decoder process did not come up in {START_TIMEOUT_SECONDS:.0f} s; is the node overloaded?"
            )
        try:
            self._pipe.recv_bytes()  # its libraries are loaded; from here on it is the image's time
        except EOFError as error:
            self.close()
            raise PipelineError("a decoder process ended as it started; is the node out of memory?") from error
        return self._pipe


def _serve(pipe: Connection[bytes, bytes], decode: Decode, limits: DecodeLimits) -> None:
    pipe.send_bytes(b"ready")
    while True:
        try:
            (shrink,) = pipe.recv_bytes()
            data = pipe.recv_bytes()
        except EOFError:
            return
        try:
            header = replace(inspect(data, limits), shrink=shrink)
            pixels = decode(data, header)
        except DecodeError as error:
            pipe.send_bytes(pickle.dumps((None, 1, error)))
        else:
            pipe.send_bytes(pickle.dumps((ImageSize(*pixels.shape[:2]), header.orientation, None)))
            pipe.send_bytes(np.ascontiguousarray(pixels).tobytes())


def _limit_memory() -> None:
    with open("/proc/self/statm", encoding="ascii") as statm:
        held = int(statm.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = held + EXTRA_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _main(file_number: str, function: str, limits: str) -> None:
    module, name = function.split(":")
    decode: Decode = getattr(importlib.import_module(module), name)
    max_image_bytes, max_image_pixels = map(int, limits.split(","))
    fast_operators()  # loaded before memory and time are bounded
    if sys.platform == "linux":
        _limit_memory()
    _serve(
        Connection(int(file_number)),
        decode,
        DecodeLimits(max_image_bytes=max_image_bytes, max_image_pixels=max_image_pixels),
    )


if __name__ == "__main__":
    _main(*sys.argv[1:])
