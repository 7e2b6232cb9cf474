"""The systems of ``maskline benchmark``'s model part: ours and its peers, the same weights and batches for each."""

# N images of a batch.

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

import model
from jobs import detectron2_peer, torchvision_peer
from jobs.stage_times import Telling
from model import Detections, ImageSize, MaskRCNN, gmacs, random_weights
from model.network import Precision
from model.stages import AfterStage, nothing

Pixels = NDArray[np.uint8]
Batches = list[list[Pixels]]
Predict = Callable[[Batches], list[Detections]]

Peer = Literal["eager", "bf16", "compiled", "detectron2", "untuned"]

REFERENCE = "torchvision, float32"
DETECTRON2 = "detectron2, float32"
UNTUNED = ", untuned"
"""Ends the name of a peer in a process with the allocator's own settings, as its users have it."""
FILLED = 2.5
"""Deviations that mask logits are raised by: all but some in a hundred of a mask's cells are then set."""
FEW_DETECTIONS = 10
"""Of an image, in the second setting."""


@dataclass(frozen=True, kw_only=True)
class ModelBenchmark:
    """What is measured, and on what."""

    paths: Sequence[Path]
    device: torch.device
    batch_size: int
    repeats: int
    peers: Sequence[Peer]
    """torchvision in float32 is always measured."""
    min_size: int = 800
    max_size: int = 1333


class System(NamedTuple):
    """What is measured."""

    predict: Predict
    telling: Telling
    dtype: torch.dtype = torch.float32
    """Of its products."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Systems that are given the same."""

    name: str
    reference: str
    """The system that the others are to agree with."""
    systems: dict[str, System]
    batches: Batches
    work: float
    """Floating point operations of an image."""


def with_torchvision(images: Sequence[Pixels], benchmark: ModelBenchmark) -> Iterator[Setting]:
    device = benchmark.device
    theirs: Any = torchvision_peer.torchvision_network(
        "v1", images[0], min_size=benchmark.min_size, max_size=benchmark.max_size
    )
    # Random logits make a mask of specks, with thousands of runs; raised, they make one piece with a few holes.
    theirs.roi_heads.mask_predictor.mask_fcn_logits.bias.data.add_(FILLED * random_weights.MASK_LOGITS_STD)
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    nets = _ours(file.getvalue(), benchmark)
    batches = _batches(images, next(iter(nets.values())), benchmark.batch_size)
    theirs.to(device)

    def systems(threshold: float) -> dict[str, System]:
        telling = torchvision_peer.telling(theirs)
        found = {REFERENCE: System(torchvision_peer.predict_batches(theirs, device), telling)}
        if "bf16" in benchmark.peers:
            predict = torchvision_peer.predict_batches(theirs, device, autocast=True)
            found["torchvision, autocast bf16"] = System(predict, telling, torch.bfloat16)
        if "compiled" in benchmark.peers:
            network = torchvision_peer.compiled(theirs)
            predict = torchvision_peer.predict_batches(network, device)
            found["torchvision, compiled"] = System(predict, torchvision_peer.telling(network))
        return found | {name: _of_net(net, threshold) for name, net in nets.items()}

    for name, count in (("many", 100), ("few", FEW_DETECTIONS)):
        work = _work_per_image(next(iter(nets.values())), batches, count)
        yield Setting(
            name=name,
            reference=REFERENCE,
            systems=systems(theirs.roi_heads.score_thresh),
            batches=batches,
            work=work,
        )
        found = torchvision_peer.predict_batches(theirs, device)(batches[:1])
        theirs.roi_heads.score_thresh = _threshold_of_few(found, benchmark.batch_size)


def with_detectron2(images: Sequence[Pixels], benchmark: ModelBenchmark) -> Setting:
    """Its own R50-FPN at its own input size."""
    theirs = detectron2_peer.detectron2_network("R50-FPN", images[0])
    theirs.network.roi_heads.mask_head.predictor.bias.data.add_(FILLED * random_weights.MASK_LOGITS_STD)
    nets = _ours(detectron2_peer.published(theirs), replace(benchmark, min_size=800, max_size=1333))
    theirs.network.to(benchmark.device)
    net = next(iter(nets.values()))
    batches = _batches(images, net, benchmark.batch_size)
    systems = {DETECTRON2: System(detectron2_peer.predict_batches(theirs), detectron2_peer.telling(theirs))}
    systems |= {name: _of_net(net, net.recipe.score_threshold) for name, net in nets.items()}
    return Setting(
        name="detectron2's weights",
        reference=DETECTRON2,
        systems=systems,
        batches=batches,
        work=_work_per_image(net, batches, 100),
    )


def _ours(weights: bytes, benchmark: ModelBenchmark) -> dict[str, MaskRCNN]:
    loaded = model.load(weights)
    config = replace(loaded.config, min_size=benchmark.min_size, max_size=benchmark.max_size)
    precisions: dict[str, tuple[Precision, bool]] = {
        "maskline, float32": ("fp32", False),
        "maskline, bf16": ("bf16", False),
    }
    if benchmark.device.type == "cpu":
        precisions["maskline, float32, exact"] = ("fp32", True)
    nets = {
        name: MaskRCNN(
            loaded.network,
            config=config,
            recipe=loaded.recipe,
            categories=loaded.categories,
            name=loaded.name,
            sha256=loaded.sha256,
            device=benchmark.device,
            precision=precision,
            exact=exact,
        )
        for name, (precision, exact) in precisions.items()
    }
    for net in nets.values():
        net.batch_size = benchmark.batch_size
    return nets


def _of_net(net: MaskRCNN, threshold: float) -> System:
    def predict(batches: Batches) -> list[Detections]:
        return net.predict([image for batch in batches for image in batch], threshold)

    @contextmanager
    def telling(after: AfterStage) -> Iterator[None]:
        net.after = after
        try:
            yield
        finally:
            net.after = nothing

    return System(predict, telling, torch.bfloat16 if net.precision == "bf16" else torch.float32)


def _work_per_image(net: MaskRCNN, batches: Batches, num_detections: int) -> float:
    """Floating point operations of an image, the mean over the batches."""
    sizes = [net.padded_size(ImageSize(*batch[0].shape[:2])) for batch in batches]
    counts = {
        size: gmacs.count(
            net.config, net.recipe, size, num_proposals=net.recipe.rpn_post_nms, num_detections=num_detections
        )
        for size in set(sizes)
    }
    return 2 * statistics.mean(sum(counts[size].values()) for size in sizes)


def _batches(images: Sequence[Pixels], net: MaskRCNN, batch_size: int) -> Batches:
    """Full batches of images that share their padded size; the last of a size is filled with its first images."""
    groups: dict[ImageSize, list[Pixels]] = {}
    for image in images:
        groups.setdefault(net.padded_size(ImageSize(*image.shape[:2])), []).append(image)
    return [
        [group[index % len(group)] for index in range(start, start + batch_size)]
        for group in groups.values()
        for start in range(0, len(group), batch_size)
    ]


def _threshold_of_few(found: Sequence[Detections], num_images: int) -> float:
    """The score that about FEW_DETECTIONS of an image are above."""
    scores = np.sort(np.concatenate([one.scores for one in found]))
    return float(scores[-min(len(scores), FEW_DETECTIONS * num_images)])
