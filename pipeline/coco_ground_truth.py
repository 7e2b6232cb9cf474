"""What a network learns of an annotated image: its objects as tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from model.ground_truth import GroundTruth
from pipeline.coco import CocoImage
from pipeline.coco_annotations import Annotation, draw
from pipeline.coco_defects import shown
from pipeline.errors import ConfigError

# G objects of an image, C crowd regions, K keypoints.


def ground_truth(image: CocoImage, labels: Mapping[int, int], *, with_masks: bool, num_keypoints: int) -> GroundTruth:
    """``labels`` brings category ids to class indices; ``num_keypoints`` is K, 0 for no keypoints.

    Raises:
        ConfigError: an object's category has no class.
    """
    objects = [annotation for annotation in image.annotations if not annotation.is_crowd]
    crowds = [annotation for annotation in image.annotations if annotation.is_crowd]
    for annotation in objects:
        if annotation.category_id not in labels:
            raise ConfigError(
                f"no class for category {annotation.category_id}, that of annotation {annotation.annotation_id} of "
                f"image {image.image_id}; labels has {shown(sorted(labels))}"
            )
    return GroundTruth(
        boxes=_boxes(objects),
        labels=torch.tensor([labels[annotation.category_id] for annotation in objects], dtype=torch.int64),
        masks=[draw(annotation, image.size) for annotation in objects] if with_masks else None,
        keypoints=_keypoints(objects, num_keypoints) if num_keypoints else None,
        crowd_boxes=_boxes(crowds),
    )


def _boxes(annotations: Sequence[Annotation]) -> Tensor:
    boxes = torch.tensor([annotation.box for annotation in annotations], dtype=torch.float32)
    return boxes.reshape(-1, 4)  # (G, 4)


def _keypoints(annotations: Sequence[Annotation], num_keypoints: int) -> Tensor:
    nothing = (0.0,) * (3 * num_keypoints)
    values = torch.tensor([annotation.keypoints or nothing for annotation in annotations], dtype=torch.float32)
    return values.reshape(-1, num_keypoints, 3)  # (G, K, 3)
