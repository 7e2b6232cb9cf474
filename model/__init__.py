"""Mask R-CNN: networks, weight files and inference, without Ray, Arrow or storage."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.config import R18_FPN, R50_C4, R50_FPN, R101_FPN, ModelConfig, R18_half_FPN
    from model.mask_rcnn import MaskRCNN
    from model.random_weights import random_network
    from model.raw_detections import RawDetections
    from model.recipe import Recipe
    from model.structures import Detections, ImageSize, Rle
    from model.weights import WeightsInfo, describe, load, save

__all__ = [
    "R18_FPN",
    "R50_C4",
    "R50_FPN",
    "R101_FPN",
    "Detections",
    "ImageSize",
    "MaskRCNN",
    "ModelConfig",
    "R18_half_FPN",
    "RawDetections",
    "Recipe",
    "Rle",
    "WeightsInfo",
    "describe",
    "load",
    "random_network",
    "save",
]


_MODULES = ("structures", "config", "recipe", "mask_rcnn", "raw_detections", "random_weights", "weights")
"""Of those above, the quick ones first."""

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """What is above, imported when it is asked for: whoever only reads a table need not wait seconds for torch."""
        if name in __all__:
            for module in map(import_module, (f"{__name__}.{module}" for module in _MODULES)):
                if hasattr(module, name):
                    return getattr(module, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
