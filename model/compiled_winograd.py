"""3×3 convolution at stride 1 by Winograd's F(5×5, 3×3), compiled: in float32, or in integers in place of bfloat16.

It is compiled where maskline is installed, if there is GCC, and runs on processors with AVX-512. Outputs that spread by
one (256 channels) are off by 3·10⁻⁶ (root mean square) in float32, by 1.4·10⁻³ in 16-bit integers and, as bfloat16, by
2.2·10⁻³, where those of the plain sum in bfloat16 are by 2.3·10⁻³.

Of what is not finite no output that hangs on it is finite, and of its tile others may not be. In integers what is below
10⁻¹⁹ may count as nothing and what is above 10¹⁷ as not finite.
"""

# N images, C channels, K outputs, H × W a map; P points of a tile.

from __future__ import annotations

import ctypes
import functools
import importlib.util

import torch
from torch import Tensor, nn

from model.winograd import is_plain, transforms

TILE = 5
POINTS = (TILE + 2) ** 2
"""Of a tile."""
GROUP, LANES = 32, 16
"""Outputs must be a multiple of the first, channels of the second."""
LARGEST_NORM = 46_000
"""Of the integers at a point, as in winograd.c."""
VERSION = 1
"""As in winograd.c."""


class _Convolution(ctypes.Structure):
    """As in winograd.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "y", "plus", "weight", "weight_scale", "bias", "before", "after")),
        *((name, ctypes.c_int64) for name in ("images", "height", "width", "channels", "outputs")),
        *((name, ctypes.c_int64) for name in ("x_is_bf16", "y_is_bf16", "plus_is_bf16", "relu", "threads")),
    )


@functools.cache
def _library() -> ctypes.CDLL | str:
    """Or why there is none."""
    spec = importlib.util.find_spec("model.kernels._winograd")
    if spec is None or spec.origin is None:
        return "it was not compiled"
    try:
        library = ctypes.CDLL(spec.origin)
    except OSError as error:  # as where torch's threads, which it shares, are not those of GCC's OpenMP
        return f"it cannot be loaded: {error}"
    is_ours = hasattr(library, "version") and library.version() == VERSION
    return library if is_ours else "it was compiled from another version"


def why_missing() -> str | None:
    """Why a processor that could run it does without."""
    library = _library()
    return library if isinstance(library, str) and torch.cpu._is_avx512_supported() else None


def can_compute(conv: nn.Conv2d, *, in_integers: bool) -> bool:
    """Whether `conv` is one that can run so, here."""
    library = _library()
    return (
        isinstance(library, ctypes.CDLL)
        and bool(library.can_multiply_integers() if in_integers else library.can_multiply_floats())
        and is_plain(conv)
        and conv.in_channels % LANES == 0
        and conv.out_channels % GROUP == 0
    )


def has_bf16_tiles() -> bool:
    """Whether products in bfloat16 are many times as fast as float32's, and faster than by integers, as with AMX."""
    return bool(torch.cpu._is_amx_tile_supported())


class CompiledWinograd:
    """A 3×3 convolution at stride 1, padded by one. No gradients.

    Its maps are of `dtype`: float32 or, by integers alone, bfloat16.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, *, in_integers: bool, dtype: torch.dtype = torch.float32
    ) -> None:
        self.dtype = dtype
        of_inputs, of_kernel, of_outputs = transforms(TILE)
        self._before, self._after = of_inputs.float().contiguous(), of_outputs.float().contiguous()
        num_outputs, channels = weight.shape[:2]
        pair = 2 if in_integers else 1
        kernels = weight.detach().float().reshape(num_outputs // GROUP, GROUP, channels // pair, pair, 9)
        kernels = kernels.permute(0, 4, 2, 1, 3).flatten(2)  # (K / GROUP, 3 3, C GROUP), channels in pairs
        at_points = torch.kron(of_kernel, of_kernel).float() @ kernels  # (K / GROUP, P, C GROUP)
        at_points = at_points.view(*at_points.shape[:2], channels // pair, GROUP * pair)
        self._scale: Tensor | None = None
        if in_integers:
            largest = at_points.abs().amax(dim=2).view(-1, POINTS, GROUP, pair).amax(dim=3)  # (K / GROUP, P, GROUP)
            norm = at_points.square().sum(dim=2).view(*largest.shape, pair).sum(dim=3).sqrt()
            scale = torch.maximum(norm / LARGEST_NORM, largest / torch.iinfo(torch.int16).max)
            self._scale = scale.transpose(0, 1).contiguous()  # (P, K)
            units = scale.clamp(min=torch.finfo(torch.float32).tiny).repeat_interleave(pair, dim=2)
            at_points = at_points.div_(units[:, :, None]).round_().short()
        self._weight = at_points.view(*at_points.shape[:3], GROUP, pair).contiguous()
        self._bias = torch.zeros(num_outputs) if bias is None else bias.detach().float()

    def __call__(self, x: Tensor, plus: Tensor | None, *, relu: bool) -> Tensor:
        """``relu(conv(x) + plus)``, (N, K, H, W) channels-last; the ReLU and the sum where asked for."""
        num_images, channels, height, width = x.shape
        assert channels == self._weight.shape[2] * self._weight.shape[4]
        assert plus is None or plus.shape == (num_images, len(self._bias), height, width)
        x, plus = _cells(x), None if plus is None else _cells(plus)
        shape = (num_images, len(self._bias), height, width)
        y = torch.empty(shape, dtype=self.dtype, memory_format=torch.channels_last)
        convolution = _Convolution(
            x=x.data_ptr(),
            y=y.data_ptr(),
            plus=None if plus is None else plus.data_ptr(),
            weight=self._weight.data_ptr(),
            weight_scale=None if self._scale is None else self._scale.data_ptr(),
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
        library = _library()
        assert isinstance(library, ctypes.CDLL)
        if library.convolve(ctypes.byref(convolution)):
            raise MemoryError(f"no memory to convolve maps {(num_images, channels, height, width)}")
        return y


def _cells(maps: Tensor) -> Tensor:
    """(N, H, W, C) float32 or bfloat16 of (N, C, H, W)."""
    maps = maps if maps.dtype == torch.bfloat16 else maps.float()
    return maps.permute(0, 2, 3, 1).contiguous()
