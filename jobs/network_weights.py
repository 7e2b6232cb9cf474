"""A command's weights: read once and checked by the driver, loaded by each actor."""

from __future__ import annotations

from typing import Literal

import model
from pipeline import storage
from pipeline.cluster import Device
from pipeline.errors import ConfigError
from pipeline.segmenter import Segmenter


def read_weights(source: str, *, sha256: str | None = None) -> tuple[str | bytes, model.WeightsInfo]:
    """The weights' bytes (a name stays a name) and what they are.

    Raises:
        ConfigError: there is no such file, it is not weights that this model understands, or not those of the `sha256`.
    """
    from model.weights import NAMES  # brings torch, for which --help need not wait

    shown = source if source in NAMES else storage.public_uri(source)
    try:
        weights: str | bytes = source if source in NAMES else storage.read_bytes(source)
        info = model.describe(weights, name=source if isinstance(weights, str) else source.rsplit("/", 1)[-1])
    except FileNotFoundError as error:
        names = ", ".join(NAMES)
        raise ConfigError(f"no weights at {source}: give a file, a URI, or one of the names {names}") from error
    except (ValueError, OSError) as error:
        raise ConfigError(f"weights {shown}: {error}") from error
    if sha256 is not None and info.sha256 != sha256.lower():
        raise ConfigError(
            f"weights {shown} have sha256 {info.sha256}, but --weights-sha256 is "
            f"{sha256.lower()}: this is not the file you pinned; see where it comes from before you pin it anew"
        )
    if info.config.proposals == "given":
        raise ConfigError(
            f"weights {shown} are a Fast R-CNN, which needs proposals for every image; "
            "give weights with an RPN, or call model.load(...).predict(images, proposals=...)"
        )
    return weights, info


def load_weights(
    weights: str | bytes, name: str, device: Device, precision: Literal["fp32", "bf16"], batch_size: int | None = None
) -> Segmenter:
    """In an actor: the model on its device, with the actor's own share of threads."""
    import ray
    import torch

    cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    torch.set_num_threads(max(1, int(cpus)))
    net = model.load(weights, device=device, precision=precision, name=name)
    net.batch_size = batch_size or net.batch_size
    return net
