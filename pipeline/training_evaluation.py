"""Evaluation in a training run: each worker detects on its share of the images, the first scores all detections."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from model import Detections
from pipeline.coco import CocoDataset, CocoImage
from pipeline.coco_evaluation import Kind, Result, category_mapping, score, to_coco_results
from pipeline.coco_ground_truth import ground_truth
from pipeline.errors import DecodeError
from pipeline.image_cache import ImageCache
from pipeline.training_data import read_pixels, val_share
from pipeline.training_pictures import predictions, truth_as_detections
from pipeline.worker_group import WorkerGroup

logger = logging.getLogger(__name__)

Predict = Callable[[Sequence[NDArray[np.uint8]]], Sequence[Detections]]

_PICTURED_IMAGES = 6
_STAT_NAMES = ("AP", "AP50", "AP75")


class Evaluator:
    """Scores of a network on a dataset, and a picture of what it finds."""

    def __init__(
        self,
        dataset: CocoDataset,
        folder: str,
        *,
        categories: Mapping[int, str],
        kinds: Sequence[Kind],
        group: WorkerGroup,
        cache: ImageCache,
    ) -> None:
        """`categories`: the network's names by class index."""
        self.dataset, self.folder, self.categories = dataset, folder, categories
        self.kinds, self.group = kinds, group
        self.picture: bytes | None = None
        """PNG of the last evaluation, on the first worker."""
        self._category_ids = category_mapping(categories, dataset.categories)
        self._cache = cache

    def scores(self, predict: Predict) -> dict[str, float]:
        """Scores by name on the first worker, none on the others: `segm AP`, `bbox AP50`, …; all workers must call."""
        results: list[Result] = []
        shown: list[tuple[CocoImage, NDArray[np.uint8], Detections]] = []
        for image in val_share(self.dataset.images, self.group.rank, self.group.size):
            try:
                pixels = read_pixels(image, self.folder, self._cache)
            except DecodeError as error:
                logger.warning("%s counts as one in which nothing is found: %s", image.file_name, error)
                continue
            (found,) = predict([pixels])
            results += to_coco_results(image.image_id, found, self._category_ids)
            if self.group.rank == 0 and len(shown) < _PICTURED_IMAGES:
                shown.append((image, pixels, found))
        gathered = self.group.gather(results)
        if self.group.rank != 0:
            return {}
        self.picture = self._draw(shown) if shown else None
        scored = score(self.dataset.coco(), gathered, self.kinds)
        return {
            f"{kind} {name}": one.stats[name]
            for kind, one in scored.items()
            for name in _STAT_NAMES
            if not math.isnan(one.stats[name])
        }

    def _draw(self, shown: Sequence[tuple[CocoImage, NDArray[np.uint8], Detections]]) -> bytes:
        labels = {category_id: index for index, category_id in self._category_ids.items()}
        truths = []
        for image, _, _ in shown:
            known = tuple(one for one in image.annotations if one.category_id in labels)
            truth = ground_truth(
                replace(image, annotations=known), labels, with_masks="segm" in self.kinds, num_keypoints=0
            )
            truths.append(truth_as_detections(image.size, truth, self.categories))
        return predictions([pixels for _, pixels, _ in shown], truths, [found for _, _, found in shown])
