"""What a network computes, part by part: multiply-adds of one image's convolutions and linear layers.

The real parts run on the meta device, where nothing is computed, and torch's FLOP counter looks at each product they
ask for. Norms, activations, pooling and the choice of boxes are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from model.config import ModelConfig
from model.mask_head import MaskHead
from model.network import Network, build_network
from model.recipe import Recipe
from model.structures import ImageSize

# P proposals and D detections of the image, C channels, S pooled side.


def parts_of(network: Network) -> dict[str, nn.Module]:
    """The parts by the names their rows have, in the order images meet them."""
    parts: dict[str, nn.Module | None] = {"stem": network.body.stem}
    parts |= {name: network.body.get_submodule(name) for name in network.body.stage_names}
    if network.fpn is not None:
        parts |= {"FPN lateral": network.fpn.lateral, "FPN output": network.fpn.output}
    parts["RPN"] = network.rpn
    if network.res5 is not None:
        parts["res5"] = network.res5
    parts["box head"] = network.box_head
    head = network.mask_head
    if isinstance(head, MaskHead):
        parts |= {"mask convs": head.convs, "mask upsample": head.upsample, "mask logits": head.mask_logits}
    else:
        parts["mask head"] = head
    parts["keypoint head"] = network.keypoint_head
    return {name: part for name, part in parts.items() if part is not None and any(True for _ in part.parameters())}


def count(
    config: ModelConfig,
    recipe: Recipe,
    size: ImageSize,
    *,
    num_proposals: int,
    num_detections: int,
    all_mask_logits: bool = False,
) -> dict[str, int]:
    """Multiply-adds of each part for an input of `size`, with so many regions for the box head and for the others.

    The mask head computes the logits of a detection's own class; `all_mask_logits` counts those of every class, as
    published figures do. With a C4 neck res5 runs on the regions of both heads.
    """
    if min(size) < 1 or min(num_proposals, num_detections) < 0:
        raise ValueError(f"nothing to count in {size} with {num_proposals} proposals and {num_detections} detections")
    with torch.device("meta"):
        network = build_network(config, recipe).eval()
        pixels = torch.zeros(1, 3, *size)
    meter = _Meter(parts_of(network))
    with torch.no_grad(), meter.running():
        levels = network.features(pixels)
        if network.rpn is not None:
            for level in levels:
                network.rpn(level)
        channels = levels[0].shape[1]
        network.box_head(_regions(network, num_proposals, channels, config.box_resolution))
        if network.mask_head is not None:
            features = _regions(network, num_detections, channels, config.mask_resolution)
            _run_mask_head(network, features, meter, all_logits=all_mask_logits)
        if network.keypoint_head is not None:
            network.keypoint_head(_regions(network, num_detections, channels, config.keypoint_resolution))
    return meter.macs


def _regions(network: Network, num_regions: int, channels: int, resolution: int) -> Tensor:
    """What a head sees of so many regions: (R, C, S, S)."""
    return network.of_regions(torch.zeros(num_regions, channels, resolution, resolution, device="meta"))


def _run_mask_head(network: Network, region_features: Tensor, meter: _Meter, *, all_logits: bool) -> None:
    head = network.mask_head
    assert head is not None
    # The head multiplies by its transposed convolution's weights itself: what it does outside its other parts is that.
    meter.enter("mask upsample" if isinstance(head, MaskHead) else "mask head")
    if all_logits:
        head.all_logits(region_features)
    else:
        head(region_features, torch.zeros(len(region_features), dtype=torch.int64, device="meta"))
    meter.leave()


class _Meter:
    """Adds up the multiply-adds of parts while they run; what a part runs inside another counts for itself alone."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        self.macs = dict.fromkeys(parts, 0)
        self._parts = parts
        self._counter = FlopCounterMode(display=False)
        self._counted = 0
        self._open: list[str] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count until it ends."""
        handles = []
        for name, part in self._parts.items():
            # a list of modules is never called itself
            for module in part if isinstance(part, nn.ModuleList) else (part,):
                handles.append(module.register_forward_pre_hook(lambda *_, name=name: self.enter(name)))
                handles.append(module.register_forward_hook(lambda *_: self.leave()))
        with self._counter:
            yield
        self._charge()
        for handle in handles:
            handle.remove()

    def enter(self, name: str) -> None:
        """From here on it is this part that computes, ..."""
        self._charge()
        self._open.append(name)

    def leave(self) -> None:
        """... until here."""
        self._charge()
        self._open.pop()

    def _charge(self) -> None:
        total = self._counter.get_total_flops() // 2
        assert self._open or total == self._counted, "a product outside all parts"
        if self._open:
            self.macs[self._open[-1]] += total - self._counted
        self._counted = total
