"""The weights training starts from, where no others are given."""

from __future__ import annotations

import torch
from torch import nn

from model.network import Network

STD_BY_LAYER = {
    "rpn.objectness": 0.01,
    "rpn.deltas": 0.01,
    "box_head.class_logits": 0.01,
    "box_head.deltas": 0.001,
    "mask_head.mask_logits": 0.01,
    "keypoint_head.upsample": 0.001,
}
"""Of the layers that predict (Girshick 2015 section 2.3, Ren et al. 2015 section 3.1.3): at first all is as likely."""


def initialise(network: Network, seed: int) -> None:
    """Set every parameter from `seed` alone: He's normal weights, no biases, norms that change nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.tensors().items():
        layer, _, kind = name.rpartition(".")
        if layer in STD_BY_LAYER and kind == "weight":
            nn.init.normal_(value, std=STD_BY_LAYER[layer], generator=generator)
        elif value.dim() > 1:
            nn.init.kaiming_normal_(value, mode="fan_out", nonlinearity="relu", generator=generator)
        else:
            is_scale = name.endswith((".norm.weight", ".norm.running_var"))
            nn.init.constant_(value, 1.0 if is_scale else 0.0)
