"""pycocotools' average precision of detections in memory."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from model import Detections


def average_precision(
    truth: Sequence[tuple[NDArray[np.bool_], NDArray[np.int64]]], found: Sequence[Detections], categories: Sequence[str]
) -> float:
    """AP at IoU 0.5 of masks where there are any, else of boxes.

    `truth` is the masks (G, H, W) and category ids (G,), from 1 on, of each image.
    """
    coco, results = COCO(), []
    annotations: list[dict[str, Any]] = []
    for image_id, ((gt_masks, category_ids), detections) in enumerate(zip(truth, found, strict=True), 1):
        for mask, category in zip(gt_masks, category_ids.tolist(), strict=True):
            rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            box = coco_mask.toBbox(rle).tolist()
            annotation = {"id": len(annotations) + 1, "image_id": image_id, "category_id": category, "iscrowd": 0}
            annotations.append({**annotation, "bbox": box, "area": int(coco_mask.area(rle)), "segmentation": rle})
        for index, (x1, y1, x2, y2) in enumerate(detections.boxes.tolist()):
            result: dict[str, Any] = {
                "image_id": image_id,
                "category_id": int(detections.category_ids[index]),
                "score": float(detections.scores[index]),
                "bbox": [x1, y1, x2 - x1, y2 - y1],
            }
            if detections.masks:
                result["segmentation"] = detections.masks[index]
            results.append(result)
    coco.dataset = {
        "images": [
            {"id": index, "height": masks.shape[1], "width": masks.shape[2]}
            for index, (masks, _) in enumerate(truth, 1)
        ],
        "annotations": annotations,
        "categories": [{"id": index, "name": name} for index, name in enumerate(categories, 1)],
    }
    with redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "segm" if found[0].masks else "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[1])
