"""The parameters of a Mask R-CNN, part by part, and the copy of them that runs.

`Network` is what is trained and stored. `ready_to_run` makes the copy that runs on a device in a precision.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from model.box_head import BoxHead, first_layer_as_convolution
from model.compiled_winograd import CompiledWinograd, can_compute, has_bf16_tiles
from model.config import ModelConfig
from model.conv_norm import ConvNorm, folded
from model.fpn import FPN
from model.fused_conv import can_fuse_on_cpu, cudnn_conv, onednn_conv
from model.kernels import run_kernels_on
from model.keypoint_head import KeypointHead
from model.mask_head import MaskHead, MLPMaskHead
from model.norm import Norm, norm_of
from model.recipe import Recipe
from model.resnet import ARCHITECTURES, BasicBlock, Bottleneck, ResNet
from model.rounding import to_bfloat16
from model.rpn import RPNHead
from model.winograd import Winograd, can_transform

Precision = Literal["fp32", "bf16"]
"""Of the convolutions and linear layers."""

_Module = TypeVar("_Module", bound=nn.Module)


class Network(nn.Module):
    """The parts and their parameters; the names of its tensors are those of our weight files."""

    def __init__(
        self,
        *,
        body: ResNet,
        fpn: FPN | None,
        rpn: RPNHead | None,
        res5: nn.Sequential | None,
        box_head: BoxHead,
        mask_head: MaskHead | MLPMaskHead | None,
        keypoint_head: KeypointHead | None,
    ) -> None:
        super().__init__()
        self.body = body
        self.fpn = fpn
        self.rpn = rpn
        self.res5 = res5
        self.box_head = box_head
        self.mask_head = mask_head
        self.keypoint_head = keypoint_head

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels between cells of the levels regions are pooled from."""
        return (16,) if self.fpn is None else (4, 8, 16, 32)

    def features(self, pixels: Tensor) -> list[Tensor]:
        """The levels of (N, 3, H, W): P2 to P6, the last for the RPN alone, or C4."""
        maps: list[Tensor] = self.body(pixels)
        return [maps[-1]] if self.fpn is None else self.fpn(maps)

    def of_regions(self, pooled: Tensor) -> Tensor:
        """What the heads see of pooled features (R, C, S, S)."""
        return pooled if self.res5 is None else self.res5(pooled)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and statistics by name; torch's counts of batches, which nothing uses, are left out."""
        return {name: value for name, value in self.state_dict().items() if value.is_floating_point()}


def build_network(config: ModelConfig, recipe: Recipe) -> Network:
    """The parts a config asks for, their parameters not yet set to anything."""
    architecture = replace(ARCHITECTURES[config.body], width=config.body_width)
    is_pyramid = config.neck == "fpn"
    norm = norm_of(config.norm, recipe.norm_eps)
    head_norm = norm if config.head_norm else None
    stride_in = recipe.bottleneck_stride
    body = ResNet(architecture, num_stages=4 if is_pyramid else 3, stride_in=stride_in, norm=norm)
    channels = config.fpn_channels if is_pyramid else body.out_channels[-1]
    region_channels = channels if is_pyramid else architecture.out_channels[-1]
    num_convs, num_fcs = {"2fc": (0, 2), "4conv1fc": (4, 1), "res5": (0, 0)}[config.box_head]
    return Network(
        body=body,
        fpn=FPN(body.out_channels, channels, norm=norm if config.fpn_norm else None) if is_pyramid else None,
        rpn=RPNHead(in_channels=channels, anchors_per_cell=config.anchors_per_cell, num_convs=config.rpn_convs)
        if config.proposals == "rpn"
        else None,
        res5=None if is_pyramid else architecture.stage(3, stride_in=stride_in, norm=norm),
        box_head=BoxHead(
            in_channels=region_channels,
            resolution=config.box_resolution,
            num_convs=num_convs,
            num_fcs=num_fcs,
            width=config.box_head_width,
            num_classes=config.num_classes,
            norm=head_norm,
        ),
        mask_head=_mask_head(config, region_channels, head_norm),
        keypoint_head=KeypointHead(
            in_channels=channels,
            channels=config.keypoint_channels,
            num_convs=config.keypoint_convs,
            num_keypoints=config.num_keypoints,
        )
        if config.num_keypoints
        else None,
    )


def _mask_head(config: ModelConfig, in_channels: int, norm: Norm | None) -> MaskHead | MLPMaskHead | None:
    if config.mask_head == "none":
        return None
    if config.mask_head == "mlp":
        return MLPMaskHead(
            in_channels=in_channels,
            resolution=config.mask_side // 2,
            num_classes=config.num_classes,
            classes=config.mask_classes,
        )
    return MaskHead(
        in_channels=in_channels,
        channels=config.mask_channels,
        num_convs=config.mask_convs,
        num_classes=config.num_classes,
        classes=config.mask_classes,
        norm=norm,
    )


def ready_to_run(network: Network, device: torch.device, precision: Precision, *, exact: bool) -> Network:
    """The copy of `network` that runs.

    Exact, what boxes and scores come from is computed in the order torchvision computes it, on a CPU to the last bit.
    Otherwise norms are folded, everything is channels-last, and in bf16 all is bfloat16 but for some layers that boxes
    and scores hang on. The mask head is never exact; a mask's threshold is not that sharp.
    """
    _check_run(device, precision, exact=exact)
    running = copy.deepcopy(network).float().eval()
    for part in running.modules():
        if isinstance(part, ConvNorm):
            part.trains_by_winograd = False
    if running.mask_head is not None:
        running.mask_head = _channels_last(folded(running.mask_head))
    if not exact:
        first_layer_as_convolution(running.box_head)
        running = _channels_last(folded(running))
    if precision == "bf16":
        _round(running, device)
    if device.type == "cpu" and not exact:
        _fuse_on_cpu(running, precision)
    if run_kernels_on(device) and not exact:
        _fuse_on_cuda(running)
    return running.requires_grad_(False).to(device)


def _round(network: Network, device: torch.device) -> None:
    """To bfloat16, but for the box head's outputs and, on a CPU, what costs little or nothing there in float32.

    That is the stem, whose roundings each later layer inherits, the box head's small layer, the weights that integers
    are made of and, but on processors with tiles of bfloat16, the RPN.
    """
    head = network.box_head
    precise: list[nn.Module] = [head.class_logits, head.deltas]
    if device.type == "cpu":
        precise += [network.body.stem, *head.fcs[1:], *_in_integers(network)]
        if network.rpn is not None and not has_bf16_tiles():
            precise.append(network.rpn)
    kept = {id(parameter) for part in precise for parameter in part.parameters()}
    if device.type == "cpu" and can_fuse_on_cpu(torch.bfloat16):
        kept |= {id(part.conv.bias) for part in network.modules() if isinstance(part, ConvNorm)}
    for part in network.modules():
        for parameter in part.parameters(recurse=False):
            if id(parameter) in kept:
                continue
            is_kernel = isinstance(part, nn.Conv2d) and parameter is part.weight
            rounded = to_bfloat16(parameter.data) if is_kernel else parameter.data.to(torch.bfloat16)
            parameter.data = rounded.contiguous(memory_format=torch.channels_last) if is_kernel else rounded


def _in_integers(network: Network) -> list[ConvNorm]:
    """Convolutions that a CPU computes in 16-bit integers in place of bfloat16: faster, and rounded less."""
    if has_bf16_tiles():
        return []
    parts = [part for part in network.modules() if isinstance(part, ConvNorm) and part.norm is None]
    return [part for part in parts if can_compute(part.conv, in_integers=True)]


def _fuse_on_cpu(network: Network, precision: Precision) -> None:
    """Let convolutions without a norm run as one operation with what follows, and by Winograd where that pays."""
    in_integers = _in_integers(network) if precision == "bf16" else []
    heads = [head for head in (network.rpn, network.mask_head) if head is not None]
    not_rounded = {part for head in heads for part in head.modules()}  # between their layers
    on_boxes = set(network.box_head.convs)
    for part in network.modules():
        if isinstance(part, ConvNorm) and part.norm is None:
            part.fused = onednn_conv if can_fuse_on_cpu(part.conv.weight.dtype) else None
            if part in in_integers:
                dtype = torch.float32 if part in not_rounded else torch.bfloat16
                part.winograd = CompiledWinograd(part.conv.weight, part.conv.bias, in_integers=True, dtype=dtype)
            elif part.conv.weight.dtype == torch.float32:
                part.winograd = _in_float32(part.conv, of_boxes=part in on_boxes)
        elif isinstance(part, RPNHead):
            part.fused = part.objectness.weight.dtype == torch.float32
        elif isinstance(part, MaskHead):
            part.fused = can_fuse_on_cpu(part.upsample.weight.dtype)


def _in_float32(conv: nn.Conv2d, *, of_boxes: bool) -> CompiledWinograd | Winograd | None:
    """The fastest form that there is here: maps of 7×7 are one tile of the one, and four of the other."""
    if can_compute(conv, in_integers=False) and not (of_boxes and can_transform(conv)):
        return CompiledWinograd(conv.weight, conv.bias, in_integers=False)
    return Winograd(conv) if can_transform(conv) else None


def _fuse_on_cuda(network: Network) -> None:
    """Let what has no norm of its own left run as one operation with what follows it."""
    for part in network.modules():
        if isinstance(part, ConvNorm):
            part.fused = cudnn_conv if part.norm is None else None
        elif isinstance(part, BasicBlock | Bottleneck):
            _move_shortcut_bias(part)
        elif isinstance(part, ResNet):
            part.fused = part.stem.norm is None
        elif isinstance(part, FPN):
            part.fused = all(isinstance(one, ConvNorm) and one.norm is None for one in part.lateral)
        elif isinstance(part, RPNHead | BoxHead | MaskHead):
            part.fused = True


def _move_shortcut_bias(block: BasicBlock | Bottleneck) -> None:
    """Shortcut and last convolution are added up: one bias is enough, and that of the last costs nothing."""
    last = block.conv2 if isinstance(block, BasicBlock) else block.conv3
    shortcut = block.shortcut
    if shortcut is not None and shortcut.norm is None and last.norm is None:
        assert last.conv.bias is not None
        assert shortcut.conv.bias is not None
        last.conv.bias = nn.Parameter((last.conv.bias.float() + shortcut.conv.bias.float()).to(last.conv.bias.dtype))
        shortcut.conv.bias = None


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
