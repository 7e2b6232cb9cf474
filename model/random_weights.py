"""Seeded random networks that detect something on every image, for tests, benchmarks and the demonstration.

A freshly initialised network finds nothing, which proves nothing. Here each prediction layer is rescaled in turn until
its outputs on one image have a given spread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.config import ModelConfig, Recipe
from model.mask_rcnn import MaskRCNN
from model.network import Network, Precision, build_network
from model.weights import to_bytes

OBJECTNESS_STD = 2.0
RPN_DELTAS_STD = 0.2
CLASS_LOGITS_STD = 2.5
BOX_DELTAS_STD = 0.5
MASK_LOGITS_STD = 2.0


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
    spread(ready(sha256=""), image)
    sha256 = hashlib.sha256(to_bytes(network, config, recipe, categories)).hexdigest()
    return ready(sha256=sha256, device=device, precision=precision)


def initialise(network: Network, seed: int) -> None:
    """Set every parameter from `seed` alone: He's normal weights, no biases, norms that change nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if value.dim() > 1:
            nn.init.kaiming_normal_(value, mode="fan_out", nonlinearity="relu", generator=generator)
        else:
            is_scale = name.endswith((".norm.weight", ".norm.running_var"))
            nn.init.constant_(value, 1.0 if is_scale else 0.0)


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
    rpn, box_head, mask_head = net.running.rpn, net.running.box_head, net.running.mask_head
    steps: list[list[tuple[nn.Module, float]]] = [
        [(rpn.objectness, OBJECTNESS_STD), (rpn.deltas, RPN_DELTAS_STD)],
        [(box_head.class_logits, CLASS_LOGITS_STD), (box_head.deltas, BOX_DELTAS_STD)],
        [(mask_head.mask_logits, MASK_LOGITS_STD)],
    ]
    rescale_outputs(steps, lambda: net.detect([image]))
    for stored, scaled in zip(_prediction_layers(net.network), _prediction_layers(net.running), strict=True):
        stored.load_state_dict(scaled.state_dict())


def _prediction_layers(network: Network) -> Sequence[nn.Module]:
    rpn, box_head = network.rpn, network.box_head
    return (rpn.objectness, rpn.deltas, box_head.class_logits, box_head.deltas, network.mask_head.mask_logits)
