"""Detections scored by pycocotools' COCOeval against COCO annotations.

Detections of images become COCO results; COCOeval's numbers, AP by category and the precisions behind them leave. What
has no ground truth is nan, where COCOeval says -1.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from model.structures import Detections
from pipeline.errors import ConfigError

# T IoU thresholds, R recalls, K categories, D detections of an image.

Kind = Literal["bbox", "segm", "keypoints"]
Result = dict[str, Any]
"""One detection as COCO's results have it: image_id, category_id, score, bbox, and segmentation or keypoints."""

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""Of the axis T."""
RECALLS = np.linspace(0, 1, 101)
"""Of the axis R."""

_BOX_STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
STAT_NAMES: dict[Kind, tuple[str, ...]] = {
    "bbox": _BOX_STATS,
    "segm": _BOX_STATS,
    "keypoints": ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl"),
}
"""In COCOeval's order. s, m, l: areas up to 32² and 96² pixels and beyond; AR1: one detection for each image."""

_FIELDS: dict[Kind, str] = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}
_PERSON_KEYPOINTS = 17
_NAMES_SHOWN = 12  # in a message


@dataclass(frozen=True, kw_only=True)
class Score:
    """How detections of one kind compare with the annotations."""

    kind: Kind
    stats: dict[str, float]
    """The numbers of STAT_NAMES, 0..1."""
    per_category: dict[str, float]
    """AP by category name, in the order of the categories' ids."""
    num_objects: dict[str, int]
    """Annotated objects by category name; crowds, and for keypoints objects that show none, are not counted."""
    precision: NDArray[np.float64]
    """(T, R, K) at all areas and the most detections of an image; K in the order of per_category."""


def to_coco_results(image_id: int, detections: Detections, category_ids: Mapping[int, int]) -> list[Result]:
    """The detections of one image whose category `category_ids` (network index → COCO category id) has."""
    boxes = as_xywh(detections.boxes).tolist()
    results = []
    scores = detections.scores.tolist()
    for index, category in enumerate(detections.category_ids.tolist()):
        if category not in category_ids:
            continue
        result: Result = {"image_id": image_id, "category_id": category_ids[category]}
        result |= {"score": scores[index], "bbox": boxes[index]}
        if detections.masks:
            mask = detections.masks[index]
            result["segmentation"] = {"size": list(mask["size"]), "counts": mask["counts"].decode()}
        if detections.keypoints is not None:
            result["keypoints"] = detections.keypoints[index].ravel().tolist()
        results.append(result)
    return results


def as_xywh(boxes: NDArray[np.float32]) -> NDArray[np.float64]:
    """(D, 4) x1 y1 x2 y2 as x y width height, subtracted in float64, which loses nothing."""
    corners = boxes.astype(np.float64)
    return np.hstack([corners[:, :2], corners[:, 2:] - corners[:, :2]])


def category_mapping(network: Mapping[int, str], annotated: Mapping[int, str]) -> dict[int, int]:
    """Network index → COCO category id, by name. A class that the annotations lack is left out.

    Raises:
        ConfigError: they have no name in common.
    """
    ids = {name: category_id for category_id, name in sorted(annotated.items(), reverse=True)}
    mapping = {index: ids[name] for index, name in network.items() if name in ids}
    if not mapping:
        raise ConfigError(
            f"the network and the annotations share no category: the network has {_some(network.values())}; the "
            f"annotations have {_some(annotated.values())}. Name them alike: rename the annotations' categories"
        )
    return mapping


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return (", ".join(names[:_NAMES_SHOWN]) or "none") + more


# ------------------------------------------------------------------------------------------------------------ scoring


def score(
    coco: COCO, results: Sequence[Result], kinds: Sequence[Kind], image_ids: Iterable[int] | None = None
) -> dict[Kind, Score]:
    """COCOeval's numbers for each kind: at most 100 detections of an image, 20 with keypoints.

    Results of a kind are those that hold its field. Keypoints other than a person's 17 have no published OKS sigmas;
    each takes the mean of those 17.

    Args:
        image_ids: score these images only; by default all that `coco` has.
    """
    ids = sorted(coco.getImgIds() if image_ids is None else set(image_ids))
    with redirect_stdout(io.StringIO()):  # pycocotools prints
        truth = _evaluation_copy(coco, keypoints="keypoints" in kinds)
        return {kind: _score_kind(truth, results, kind, ids) for kind in kinds}


def _evaluation_copy(coco: COCO, *, keypoints: bool) -> COCO:
    """The annotations numbered from 1, for COCOeval takes a match with number 0 for none, and writes into them.

    With `keypoints`, an object that lacks them has them all unlabelled: it is neither found nor missed.
    """
    annotations = [{**annotation, "id": index} for index, annotation in enumerate(coco.dataset["annotations"], 1)]
    if keypoints:
        lengths = (len(annotation["keypoints"]) for annotation in annotations if "keypoints" in annotation)
        unlabelled = [0] * max(lengths, default=_PERSON_KEYPOINTS * 3)
        for annotation in annotations:
            points = annotation.setdefault("keypoints", unlabelled)
            annotation.setdefault("num_keypoints", sum(visibility > 0 for visibility in points[2::3]))
    return _indexed({**coco.dataset, "annotations": annotations})


def _indexed(dataset: dict[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = dataset
    coco.createIndex()
    return coco


def _score_kind(truth: COCO, results: Sequence[Result], kind: Kind, image_ids: list[int]) -> Score:
    evaluation = COCOeval(truth, _load_results(truth, results, kind), kind)
    evaluation.params.imgIds = image_ids
    if kind == "keypoints":
        evaluation.params.kpt_oks_sigmas = _oks_sigmas(truth, results, evaluation.params.kpt_oks_sigmas)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    precision = _nan_where_absent(evaluation.eval["precision"][..., 0, -1])  # (T, R, K), all areas, most detections
    names = _category_names(truth, evaluation.params.catIds)
    objects = Counter(_counted_categories(truth, kind, set(image_ids)))
    return Score(
        kind=kind,
        stats=dict(zip(STAT_NAMES[kind], _nan_where_absent(evaluation.stats).tolist(), strict=True)),
        per_category=dict(zip(names, precision.mean(axis=(0, 1)).tolist(), strict=True)),
        num_objects={name: objects[index] for name, index in zip(names, evaluation.params.catIds, strict=True)},
        precision=precision,
    )


def _load_results(truth: COCO, results: Sequence[Result], kind: Kind) -> COCO:
    """One kind's results with its own field alone, as COCO's server takes them: areas are those of boxes, masks or the
    extent of the keypoints."""
    keys = ("image_id", "category_id", "score", _FIELDS[kind])
    chosen = [{key: result[key] for key in keys} for result in results if _FIELDS[kind] in result]
    if chosen:
        return truth.loadRes(chosen)
    return _indexed({**truth.dataset, "annotations": []})  # loadRes looks at the first


def _oks_sigmas(truth: COCO, results: Sequence[Result], person: NDArray[np.float64]) -> NDArray[np.float64]:
    """(keypoints,) how far annotators' clicks spread, relative to an object's size."""
    annotated = {len(annotation["keypoints"]) // 3 for annotation in truth.dataset["annotations"]}
    found = {len(result["keypoints"]) // 3 for result in results if "keypoints" in result}
    counts = annotated | found
    if len(counts) > 1:
        raise ConfigError(
            f"the annotated objects have {_some(map(str, annotated))} keypoints, the detections "
            f"{_some(map(str, found))}; all must have as many"
        )
    count = counts.pop() if counts else len(person)
    return person if count == len(person) else np.full(count, person.mean())


def _counted_categories(truth: COCO, kind: Kind, image_ids: set[int]) -> Iterator[int]:
    for annotation in truth.dataset["annotations"]:
        ignored = annotation.get("iscrowd") or (kind == "keypoints" and annotation.get("num_keypoints") == 0)
        if annotation["image_id"] in image_ids and not ignored:
            yield annotation["category_id"]


def _category_names(truth: COCO, category_ids: Sequence[int]) -> list[str]:
    """Two categories of one name are told apart by their ids."""
    names = [str(truth.cats[category_id]["name"]) for category_id in category_ids]
    return [
        name if names.count(name) == 1 else f"{name} ({index})" for name, index in zip(names, category_ids, strict=True)
    ]


def _nan_where_absent(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(values == -1, np.nan, values)
