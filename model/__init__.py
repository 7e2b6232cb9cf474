"""Mask R-CNN: networks, weight files and inference, without Ray, Arrow or storage."""

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
