"""Seeded random networks that detect something on every image, for tests, benchmarks and the demonstration.

A freshly initialised network finds nothing, which proves nothing. Here each prediction layer is rescaled in turn until
its outputs on one image have a given spread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.config import ModelConfig
from model.initial_weights import initialise
from model.mask_head import MaskHead
from model.mask_rcnn import MaskRCNN
from model.network import Network, Precision, build_network
from model.recipe import Recipe
from model.weights import to_bytes

OBJECTNESS_STD = 2.0
RPN_DELTAS_STD = 0.2
CLASS_LOGITS_STD = 2.5
BOX_DELTAS_STD = 0.5
MASK_LOGITS_STD = 2.0
HEATMAPS_STD = 2.0


def random_network(
    config: ModelConfig,
    seed: int = 0,
    *,
    recipe: Recipe | None = None,
    categories: Mapping[int, str] | None = None,
    image: NDArray[np.uint8] | None = None,
    device: str = "cpu",
    precision: Precision = "fp32",
) -> MaskRCNN:
    """A ready network with weights from `seed`, its outputs spread on `image` (noise if none is given)."""
    recipe = recipe or Recipe()
    categories = categories or {index: f"class {index}" for index in range(1, config.num_classes)}
    if image is None:
        image = np.random.default_rng(seed).integers(0, 256, (240, 320, 3), dtype=np.uint8)
    with torch.device("meta"):
        network = build_network(config, recipe)
    network.to_empty(device="cpu")
    initialise(network, seed)
    ready = partial(MaskRCNN, network, config=config, recipe=recipe, categories=categories, name=f"random-{seed}")
    spread(ready(sha256="", exact=True), image)  # where each layer runs by itself
    sha256 = hashlib.sha256(to_bytes(network, config, recipe, categories)).hexdigest()
    return ready(sha256=sha256, device=device, precision=precision)


def rescale_outputs(steps: Iterable[Iterable[tuple[nn.Module, float]]], run: Callable[[], object]) -> None:
    """Scale weight and bias of the layers so that their outputs during `run()` have the deviations given with them.

    Step by step, because what a later layer sees follows from what the earlier ones put out; layers of one step must
    not depend on each other. Outputs of several calls of a layer, as for the levels of a pyramid, are taken together.
    """
    for step in steps:
        targets = dict(step)
        for layer, outputs in _outputs(targets, run).items():
            if not outputs:
                raise ValueError(f"nothing reached {layer}, which was to have outputs of deviation {targets[layer]}")
            factor = targets[layer] / torch.cat(outputs).float().std()
            for parameter in layer.parameters():
                parameter.data.mul_(factor)


def _outputs(layers: Iterable[nn.Module], run: Callable[[], object]) -> dict[nn.Module, list[Tensor]]:
    outputs: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}

    def keep(layer: nn.Module, _inputs: object, output: Tensor) -> None:
        outputs[layer].append(output.flatten())

    handles = [layer.register_forward_hook(keep) for layer in outputs]
    run()
    for handle in handles:
        handle.remove()
    return outputs


def spread(net: MaskRCNN, image: NDArray[np.uint8]) -> None:
    """Give the prediction layers of a float32 network on a CPU the spread under which every image has detections."""
    if net.precision != "fp32" or net.device.type != "cpu":
        raise ValueError(f"spread needs fp32 on a cpu, got {net.precision} on {net.device}; move the network after it")
    proposals = None if net.running.rpn else [_windows(image)]
    rescale_outputs(_prediction_layers(net.running), lambda: net.detect([image], proposals=proposals))
    for of_stored, of_running in zip(_prediction_layers(net.network), _prediction_layers(net.running), strict=True):
        for (stored, _), (scaled, _) in zip(of_stored, of_running, strict=True):
            stored.load_state_dict(scaled.state_dict())


def _prediction_layers(network: Network) -> list[list[tuple[nn.Module, float]]]:
    """The layers whose outputs become boxes, scores, masks and keypoints, in the order they run, with deviations."""
    rpn, box_head, mask_head = network.rpn, network.box_head, network.mask_head
    steps: list[list[tuple[nn.Module, float]]] = []
    if rpn is not None:
        steps.append([(rpn.objectness, OBJECTNESS_STD), (rpn.deltas, RPN_DELTAS_STD)])
    steps.append([(box_head.class_logits, CLASS_LOGITS_STD), (box_head.deltas, BOX_DELTAS_STD)])
    if mask_head is not None:
        last = mask_head.mask_logits if isinstance(mask_head, MaskHead) else mask_head.fcs[-1]
        steps.append([(last, MASK_LOGITS_STD)])
    if network.keypoint_head is not None:
        steps.append([(network.keypoint_head.upsample, HEATMAPS_STD)])
    return steps


def _windows(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Proposals for a network without an RPN: a grid of windows in two sizes."""
    height, width = image.shape[:2]
    corners = np.stack(np.meshgrid(np.arange(0, 0.8, 0.1), np.arange(0, 0.8, 0.1)), axis=-1).reshape(-1, 2)
    windows = np.concatenate([np.hstack([corners, corners + side]) for side in (0.2, 0.4)]).clip(0, 1)
    return (windows * (width, height, width, height)).astype(np.float32)
