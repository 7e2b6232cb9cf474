"""moto's server, with PUTs to S3 one at a time: ``python atomic_s3.py -H HOST -p PORT``.

By itself it looks whether a key exists and then writes it, and another write fits between the two: If-None-Match: *
would now and then have two winners, which S3 rules out.
"""

from __future__ import annotations

import threading
from typing import Any

from moto.s3.responses import S3Response
from moto.server import main

_lock = threading.Lock()
_put_object = S3Response.put_object


def _put_alone(response: S3Response) -> Any:
    with _lock:
        return _put_object(response)


if __name__ == "__main__":
    S3Response.put_object = _put_alone
    main()
