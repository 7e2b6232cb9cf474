"""The pictures behind image keys, read again from where they lie.

Keys of a results table enter; for each its pixels, or a ``DecodeError``, leave. The archive that a key names is listed
again, for the key alone does not say where in it the image lies.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import decode, storage
from pipeline.archive import ARCHIVE_NAMES, ITEM_SCHEMA, list_images, read_images
from pipeline.decode import DecodeLimits
from pipeline.errors import DecodeError, PipelineError

Picture = NDArray[np.uint8] | DecodeError


def read_originals(keys: Sequence[str], *, limits: DecodeLimits | None = None) -> dict[str, Picture]:
    """Image key → pixels (H, W, 3) uint8 in the oriented frame, or why there are none."""
    by_container: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        by_container[container_of(key)].append(key)
    found: dict[str, Picture] = {}
    for container, wanted in by_container.items():
        try:
            found |= _read(container, wanted, limits or DecodeLimits())
        except (PipelineError, OSError) as error:
            found |= dict.fromkeys(wanted, DecodeError("unreadable", f"{container}: {error}"))
    return {key: found.get(key, DecodeError("missing", f"{key} is not there any more")) for key in keys}


def container_of(key: str) -> str:
    """The archive or table of a key; a loose file's own URI."""
    for at in (index for index, character in enumerate(key) if character == "#"):
        if key[:at].lower().endswith(ARCHIVE_NAMES):
            return key[:at]
    return key


def _read(container: str, keys: Sequence[str], limits: DecodeLimits) -> Iterator[tuple[str, Picture]]:
    items = _items(container, storage.info(container).version)
    rows = items.filter(pc.is_in(items["image_key"], value_set=pa.array(keys, pa.string())))
    for index, data in read_images(rows):
        key = rows["image_key"][index].as_py()
        try:
            if isinstance(data, DecodeError):
                raise data
            yield key, decode.decode(data, decode.inspect(data, limits))
        except DecodeError as error:
            yield key, error


@lru_cache(maxsize=8)
def _items(container: str, version: str) -> pa.Table:
    """What a container of that version holds."""
    return pa.Table.from_batches(list_images([container]), ITEM_SCHEMA)
