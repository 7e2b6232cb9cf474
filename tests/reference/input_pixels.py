"""The network's input, one element after the other, in float64 (the rule is torch's, without aligned corners)."""

import numpy as np
from numpy.typing import NDArray

from model.recipe import Recipe
from model.structures import ImageSize

Floats = NDArray[np.float64]


def neighbours(index: int, side: int, resized_side: int) -> tuple[int, int, float]:
    """The pixels on either side of the centre of pixel `index`, and how far it is from the first."""
    position = max((index + 0.5) * side / resized_side - 0.5, 0.0)
    before = min(int(position), side - 1)
    return before, min(before + 1, side - 1), position - before


def input_pixels(image: NDArray[np.uint8], size: ImageSize, padded: ImageSize, recipe: Recipe) -> Floats:
    """(3, Hp, Wp) the image (H, W, 3) at `size` in the upper left of `padded`, zeros around it."""
    result = np.zeros((3, *padded))
    channels = image[..., ::-1] if recipe.channel_order == "BGR" else image
    normalised = (channels / recipe.pixel_range - recipe.pixel_mean) / recipe.pixel_std  # (H, W, 3)
    for y in range(size.height):
        top, bottom, lowness = neighbours(y, image.shape[0], size.height)
        for x in range(size.width):
            left, right, rightness = neighbours(x, image.shape[1], size.width)
            upper = normalised[top, left] * (1 - rightness) + normalised[top, right] * rightness
            lower = normalised[bottom, left] * (1 - rightness) + normalised[bottom, right] * rightness
            result[:, y, x] = upper * (1 - lowness) + lower * lowness
    return result
