"""COCO run-length strings of a batch of masks on CUDA: model/rle.py with shapes that are fixed beforehand.

In: mask logits and boxes in the image frame. Out: the strings of all detections end to end, and areas, in buffers of a
given capacity. Nothing waits for the host, so a CUDA graph can hold it. Two kernels run twice each, first to count and
then to write: mask_outline.py finds the borders of the masks' runs, run_strings.py spells them.
"""

# N images, D places for detections in each, M mask side, K = M + 2 knots.

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.mask_outline import find_borders
from model.kernels.run_strings import write_strings
from model.paste import PasteRule
from model.raw_detections import MaskTexts


def encode_masks(
    mask_logits: Tensor,
    boxes: Tensor,
    image_sizes: Tensor,
    valid: Tensor,
    *,
    threshold: float,
    paste: PasteRule,
    run_capacity: int,
    text_capacity: int,
) -> MaskTexts:
    """The strings of the pixels whose pasted probability is at least ``threshold``: rle.encode_detections for a batch.

    Args:
        mask_logits: (N, D, M, M) of the predicted class.
        boxes: float32 (N, D, 4) in the frame of each image; one that is not finite lies outside.
        image_sizes: (N, 2) height and width of each image, float32 or integers.
        valid: bool (N, D): which places hold a detection.
        run_capacity: runs of all masks for which there is room; what goes beyond is dropped and shows in ``needed``.
        text_capacity: bytes of all strings, likewise.
    """
    num_images, per_image = mask_logits.shape[:2]
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be above 0 and at most 1, got {threshold}")
    if boxes.shape != (num_images, per_image, 4) or boxes.dtype != torch.float32:
        raise ValueError(
            f"boxes must be float32 ({num_images}, {per_image}, 4), got {boxes.dtype} {tuple(boxes.shape)}"
        )
    if valid.shape != (num_images, per_image) or image_sizes.shape != (num_images, 2):
        raise ValueError(
            f"valid must be ({num_images}, {per_image}) and image_sizes ({num_images}, 2), "
            f"got {tuple(valid.shape)} and {tuple(image_sizes.shape)}"
        )
    padded = F.pad(mask_logits.float().sigmoid().nan_to_num(0.0), (1, 1, 1, 1))  # (N, D, K, K)
    borders, run_ends, run_counts, areas = find_borders(
        padded, boxes, image_sizes, valid, threshold=threshold, paste=paste, capacity=run_capacity
    )
    text, ends = write_strings(borders, run_counts, run_ends, text_capacity)
    needed = torch.stack([run_counts.sum(), ends[-1:].sum()])
    return MaskTexts(text, ends, areas, needed)
