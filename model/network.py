"""The parameters of a Mask R-CNN, part by part, and the copy of them that runs.

`Network` is what is trained and stored. `ready_to_run` makes the copy that runs on a device in a precision.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Literal, TypeVar

import torch
from torch import nn

from model.box_head import BoxHead, first_layer_as_convolution
from model.config import ModelConfig, Recipe
from model.conv_norm import FixedNorm, folded
from model.fpn import FPN
from model.mask_head import MaskHead
from model.resnet import ResNet, resnet18, resnet50
from model.rpn import RPNHead

Precision = Literal["fp32", "bf16"]
"""Of the convolutions and linear layers."""

_Module = TypeVar("_Module", bound=nn.Module)


class Network(nn.Module):
    """The parts and their parameters; the names of its state dict are those of our weight files."""

    def __init__(self, *, body: ResNet, fpn: FPN, rpn: RPNHead, box_head: BoxHead, mask_head: MaskHead) -> None:
        super().__init__()
        self.body = body
        self.fpn = fpn
        self.rpn = rpn
        self.box_head = box_head
        self.mask_head = mask_head


def build_network(config: ModelConfig, recipe: Recipe) -> Network:
    """The parts a config asks for, their parameters not yet set to anything."""
    norm = partial(FixedNorm, eps=recipe.norm_eps, form=recipe.norm)
    head_norm = norm if config.head_norm else None
    body = resnet18(norm=norm) if config.body == "resnet18" else resnet50(norm=norm)
    num_convs, num_fcs = (0, 2) if config.box_head == "2fc" else (4, 1)
    return Network(
        body=body,
        fpn=FPN(body.out_channels, config.fpn_channels, norm=norm if config.fpn_norm else None),
        rpn=RPNHead(
            in_channels=config.fpn_channels,
            anchors_per_cell=len(config.aspect_ratios),
            num_convs=config.rpn_convs,
        ),
        box_head=BoxHead(
            in_channels=config.fpn_channels,
            resolution=config.box_resolution,
            num_convs=num_convs,
            num_fcs=num_fcs,
            width=config.box_head_width,
            num_classes=config.num_classes,
            norm=head_norm,
        ),
        mask_head=MaskHead(
            in_channels=config.fpn_channels,
            channels=config.mask_channels,
            num_convs=config.mask_convs,
            num_classes=config.num_classes,
            norm=head_norm,
        ),
    )


def ready_to_run(network: Network, device: torch.device, precision: Precision, *, exact: bool) -> Network:
    """The copy of `network` that runs.

    Exact, what boxes and scores come from is computed in the order torchvision computes it, on a CPU to the last bit.
    Otherwise norms are folded, everything is channels-last, and in bf16 all but the box head's outputs is bfloat16:
    scores and boxes hang on them. The mask head is never exact; a mask's threshold is not that sharp.
    """
    _check_run(device, precision, exact=exact)
    running = copy.deepcopy(network).eval()
    running.mask_head = _channels_last(folded(running.mask_head))
    if not exact:
        first_layer_as_convolution(running.box_head)
        running = _channels_last(folded(running))
    if precision == "bf16":
        outputs = copy.deepcopy((running.box_head.class_logits, running.box_head.deltas))
        running.to(torch.bfloat16)
        running.box_head.class_logits, running.box_head.deltas = outputs
    return running.requires_grad_(False).to(device)


def _check_run(device: torch.device, precision: Precision, *, exact: bool) -> None:
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision must be fp32 or bf16, got {precision!r}")
    if exact and precision != "fp32":
        raise ValueError(f"exact needs precision fp32, got {precision}; leave exact out")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device}, but torch {torch.__version__} finds no CUDA device; use device='cpu'")


def _channels_last(module: _Module) -> _Module:
    return module.to(memory_format=torch.channels_last)
