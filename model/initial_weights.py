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

RPN_STD = 0.01
"""Of the RPN's convolutions (Ren et al. 2015 section 3.1.3)."""

KEEP_SCALE = ("fpn.", "box_head.fcs.", "mask_head.fcs.")
"""Layers with far more inputs than outputs, or fewer, whose outputs keep the variance of the inputs. He's weights by
outputs make 1,024 outputs of 12,544 inputs five times as large: a first loss of 22 where a guess costs 2."""


def initialise(network: Network, seed: int) -> None:
    """Set every parameter from `seed` alone: He's normal weights by outputs (He et al. 2015), in layers of KEEP_SCALE
    normal ones of variance one over the number of inputs, no biases, norms that change nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.tensors().items():
        layer = name.rpartition(".")[0]
        std = RPN_STD if layer.startswith("rpn.convs.") else STD_BY_LAYER.get(layer)
        if std is not None and value.dim() > 1:
            nn.init.normal_(value, std=std, generator=generator)
        elif value.dim() > 1 and name.startswith(KEEP_SCALE):
            nn.init.kaiming_normal_(value, mode="fan_in", nonlinearity="linear", generator=generator)
        elif value.dim() > 1:
            nn.init.kaiming_normal_(value, mode="fan_out", nonlinearity="relu", generator=generator)
        else:
            is_scale = name.endswith((".norm.weight", ".norm.running_var"))
            nn.init.constant_(value, 1.0 if is_scale else 0.0)
