"""Checkpoints of a training run: one object each, whole or not there, at any URI.

A name holds the step and the digest of the content, ``checkpoints/step=00000400-1f3a…pt``: what was cut or altered on
its way is known by its name and passed over. Positions of samplers and generators are not stored: all that is random in
a run is drawn from its seed and the step (``batch_sampler.py``).
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
from collections.abc import Iterator
from typing import Any

import torch

from pipeline import storage

logger = logging.getLogger(__name__)

_NAME = re.compile(r"/checkpoints/step=(\d+)-([0-9a-f]{32})\.pt$")


def write(output: str, step: int, state: dict[str, Any], *, keep: int) -> str:
    """Publish the state before ``step`` and delete all but the newest ``keep`` up to it; the URI of the new one.

    One of a later step is not whole, or the run would have gone on from it: it takes no place of those that are kept.
    ``state``: tensors, numbers, strings and bytes in dicts, lists and tuples.
    """
    buffer = io.BytesIO()
    torch.save({**state, "step": step}, buffer)
    data = buffer.getvalue()
    digest = _digest(data)
    uri = storage.join(output, "checkpoints", f"step={step:08d}-{digest}.pt")
    storage.write_bytes(uri, data)
    others = [found for found in _newest_first(output) if found[0] <= step and found[:2] != (step, digest)]
    num_same_step = sum(at == step for at, _, _ in others)
    for _, _, old in [*others[:num_same_step], *others[num_same_step + keep - 1 :]]:
        storage.delete(old)
    return uri


def newest(output: str) -> dict[str, Any] | None:
    """The state of the newest whole checkpoint, on the CPU; None where there is none."""
    for step, digest, uri in _newest_first(output):
        try:
            data = storage.read_bytes(uri)
        except FileNotFoundError:  # another worker of the run deleted it meanwhile
            continue
        if _digest(data) == digest:
            state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            return state
        logger.warning("checkpoint of step %d is not whole and is passed over: %s", step, storage.public_uri(uri))
    return None


def newest_step(output: str) -> int | None:
    """By the names alone."""
    return next((step for step, _, _ in _newest_first(output)), None)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _newest_first(output: str) -> Iterator[tuple[int, str, str]]:
    """Step, digest and URI."""
    try:
        files = list(storage.list_files(storage.join(output, "checkpoints")))
    except FileNotFoundError:
        return
    found = [(match, file.uri) for file in files if (match := _NAME.search(file.uri))]
    yield from sorted(((int(match[1]), match[2], uri) for match, uri in found), reverse=True)
