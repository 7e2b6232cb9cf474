"""3×3 convolution at stride 1 by Winograd's F(5×5, 3×3) with products of 16-bit integers, on a CPU that has VNNI.

It is compiled where maskline is installed, if there is a C compiler. Outputs that spread by one are off by 1.4·10⁻³
(root mean square, of 256 channels), as bfloat16 by 2.2·10⁻³, where those of the plain sum in bfloat16 are by 2.3·10⁻³.
What is below 10⁻¹⁷ counts as nothing, and what is above 10¹⁷ as not finite, which its tile shows as not a number.
"""

# N images, C channels, K outputs, H × W a map; P points of a tile.

from __future__ import annotations

import ctypes
import functools
import importlib.util

import torch
from torch import Tensor, nn

from model.winograd import transforms

TILE = 5
GROUP = 64
"""Output channels computed at once."""
LANES = 16
LARGEST_NORM = 46_000
"""Of the integers at a point, as in integer_winograd.c."""


class _Convolution(ctypes.Structure):
    """As in integer_winograd.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "y", "plus", "weight", "weight_scale", "bias", "before", "after")),
        *((name, ctypes.c_int64) for name in ("images", "height", "width", "channels", "outputs")),
        *((name, ctypes.c_int64) for name in ("x_is_bf16", "y_is_bf16", "plus_is_bf16", "relu", "threads")),
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    """None where it was not compiled, or this processor cannot run it."""
    spec = importlib.util.find_spec("model.kernels._integer_winograd")
    if spec is None or spec.origin is None:
        return None
    try:
        library = ctypes.CDLL(spec.origin)
    except OSError:  # torch came without OpenMP, whose threads it shares
        return None
    return library if library.can_run() else None


def can_quantise(conv: nn.Conv2d) -> bool:
    """Whether `conv` is one that can run so, here."""
    return (
        conv.kernel_size == (3, 3)
        and conv.stride == conv.padding == conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.in_channels % LANES == 0
        and conv.out_channels % GROUP == 0
        and _library() is not None
    )


class IntegerWinograd:
    """A 3×3 convolution at stride 1, padded by one, that gives maps of `dtype`: float32 or bfloat16. No gradients."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        self.dtype = dtype
        of_inputs, of_kernel, of_outputs = (matrix.float() for matrix in transforms(TILE))
        self._before, self._after = of_inputs.contiguous(), of_outputs.contiguous()
        num_outputs, channels = conv.weight.shape[:2]
        kernels = conv.weight.detach().float().permute(2, 3, 0, 1).reshape(9, -1)  # (3 3, K C)
        at_points = (torch.kron(of_kernel, of_kernel) @ kernels).view(-1, num_outputs, channels)  # (P, K, C)
        largest = at_points.abs().amax(dim=2) / torch.iinfo(torch.int16).max
        unit = torch.maximum(at_points.norm(dim=2) / LARGEST_NORM, largest)  # (P, K)
        integers = (at_points / unit.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).round_().short()
        groups = integers.view(len(at_points), num_outputs // GROUP, GROUP, channels // 2, 2)
        self._weight = groups.permute(1, 0, 3, 2, 4).contiguous()  # (K / GROUP, P, C / 2, GROUP, 2)
        self._weight_scale = unit.contiguous()
        self._bias = torch.zeros(num_outputs) if conv.bias is None else conv.bias.detach().float()

    def __call__(self, x: Tensor, plus: Tensor | None, *, relu: bool) -> Tensor:
        """``relu(conv(x) + plus)``, (N, K, H, W) channels-last; the ReLU and the sum where asked for."""
        num_images, channels, height, width = x.shape
        x, plus = _cells(x), None if plus is None else _cells(plus)
        y = torch.empty(num_images, height, width, len(self._bias), dtype=self.dtype)
        library = _library()
        assert library is not None
        is_short = library.convolve(
            ctypes.byref(
                _Convolution(
                    x=x.data_ptr(),
                    y=y.data_ptr(),
                    plus=None if plus is None else plus.data_ptr(),
                    weight=self._weight.data_ptr(),
                    weight_scale=self._weight_scale.data_ptr(),
                    bias=self._bias.data_ptr(),
                    before=self._before.data_ptr(),
                    after=self._after.data_ptr(),
                    images=num_images,
                    height=height,
                    width=width,
                    channels=channels,
                    outputs=len(self._bias),
                    x_is_bf16=x.dtype == torch.bfloat16,
                    y_is_bf16=y.dtype == torch.bfloat16,
                    plus_is_bf16=plus is not None and plus.dtype == torch.bfloat16,
                    relu=relu,
                    threads=torch.get_num_threads(),
                )
            )
        )
        if is_short:
            raise MemoryError(f"no memory to convolve maps {(num_images, channels, height, width)}")
        return y.permute(0, 3, 1, 2)


def _cells(maps: Tensor) -> Tensor:
    """(N, H, W, C) float32 or bfloat16 of (N, C, H, W)."""
    maps = maps if maps.dtype == torch.bfloat16 else maps.float()
    return maps.permute(0, 2, 3, 1).contiguous()
