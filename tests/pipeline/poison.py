"""A decoder that dies or hangs on marked images, as a broken codec would."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
from numpy.typing import NDArray

from pipeline import decode
from pipeline.decode import ImageHeader

KILLS = b"kills its decoder"
HANGS = b"hangs its decoder"


def decode_poisoned(data: bytes, header: ImageHeader) -> NDArray[np.uint8]:
    """As ``pipeline.decode.decode``, but for images that carry a mark behind their last byte."""
    if data.endswith(KILLS):
        os.kill(os.getpid(), signal.SIGKILL)
    if data.endswith(HANGS):
        time.sleep(3600)
    return decode.decode(data, header)
