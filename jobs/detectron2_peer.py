"""The peer of ``maskline benchmark``'s model part where detectron2 is installed, and what tests agree with.

Its own networks, with seeded random weights under which every image has detections.

On the CPU nothing of detectron2's compiled part is called: a checkout on the path does.
"""

# D detections, M mask side, K keypoints.

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor, nn

from jobs.stage_times import Telling, hooked
from model import Detections, ImageSize, Rle, random_weights
from model.stages import AfterStage, Stage

Output = dict[str, Tensor]

CONFIGS = {
    "R50-FPN": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml",
    "R50-C4": "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_3x.yaml",
    "X101-FPN": "COCO-InstanceSegmentation/mask_rcnn_X_101_32x8d_FPN_3x.yaml",
    "keypoint R50-FPN": "COCO-Keypoints/keypoint_rcnn_R_50_FPN_3x.yaml",
    "LSJ R50-FPN": "new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py",
}

_NORM_RANGES = {"weight": (0.7, 1.1), "bias": (-0.2, 0.2), "running_mean": (-0.2, 0.2), "running_var": (0.8, 1.2)}
_BIAS_RANGE = (-0.1, 0.1)
_LEVEL_STDS = (2.0, 1.5, 1.25, 1.0)
"""Of the features p5 to p2, which share the RPN: p2 has most of the anchors and would have all the proposals."""


@dataclass(frozen=True)
class Detectron2Network:
    """A network and how its images are resized for inference."""

    network: Any
    """GeneralizedRCNN, in eval mode."""
    resize: Any
    """detectron2.data.transforms.Augmentation."""


@torch.no_grad()
def detectron2_network(kind: str, image: NDArray[np.uint8], *, seed: int = 0) -> Detectron2Network:
    """A network of the model zoo by its name in `CONFIGS`, its outputs spread on `image`, uint8 RGB (H, W, 3)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        theirs = _build(_configs() / CONFIGS[kind])
        _vary(theirs.network)
        _spread(theirs, image)
    return theirs


@torch.no_grad()
def predict(theirs: Detectron2Network, image: NDArray[np.uint8]) -> Output:
    """detectron2's answer for one image as torchvision would put it: the background is class 0, masks are
    probabilities (D, 1, H, W)."""
    from detectron2.layers.mask_ops import _do_paste_mask
    from detectron2.modeling.postprocessing import detector_postprocess

    height, width = image.shape[:2]
    (raw,) = theirs.network.inference([_inputs(theirs, image)], do_postprocess=False)
    if raw.has("pred_masks"):
        raw.soft_masks = raw.pred_masks  # (D, 1, M, M); postprocessing puts bitmaps in the other's place
    found = detector_postprocess(raw, height, width)
    output = {"boxes": found.pred_boxes.tensor, "scores": found.scores, "labels": found.pred_classes + 1}
    if found.has("soft_masks"):
        pasted, _ = _do_paste_mask(found.soft_masks, output["boxes"], height, width, skip_empty=False)  # (D, H, W)
        assert torch.equal(pasted >= 0.5, found.pred_masks)  # what detectron2 itself answers
        output["masks"] = pasted[:, None]  # (D, 1, H, W)
    if found.has("pred_keypoints"):
        output["keypoints"] = found.pred_keypoints  # (D, K, 3)
        output["keypoints_scores"] = found.pred_keypoints[:, :, 2]  # (D, K)
    return output


def predict_batches(theirs: Detectron2Network) -> Callable[[Sequence[Sequence[NDArray[np.uint8]]]], list[Detections]]:
    """Its inference with its paste, then run lengths as its COCOEvaluator encodes them."""

    @torch.inference_mode()
    def of_batch(batch: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        outputs = theirs.network.inference([_inputs(theirs, image) for image in batch])
        sizes = [ImageSize(*image.shape[:2]) for image in batch]
        return [_encoded(output["instances"], size) for output, size in zip(outputs, sizes, strict=True)]

    return lambda batches: [found for batch in batches for found in of_batch(batch)]


def telling(theirs: Detectron2Network) -> Telling:
    """Its stages; boxes brought to the image and pasting are the last."""

    def tell(after: AfterStage) -> AbstractContextManager[None]:
        network = theirs.network
        heads = network.roi_heads
        ends: dict[nn.Module, Stage] = {
            network.backbone: "body and pyramid",
            network.proposal_generator.rpn_head: "RPN head",
            network.proposal_generator: "proposals",
            heads.box_pooler: "RoIAlign for boxes",
            heads.box_predictor: "box head",
            heads.mask_pooler: "RoIAlign for masks",
            heads.mask_head: "mask head",
        }
        begins: dict[nn.Module, Stage] = {network.backbone: "resize and normalise", heads.mask_pooler: "detections"}
        return hooked(after, ends=ends, begins=begins)

    return tell


def _encoded(instances: Any, size: ImageSize) -> Detections:
    masks: list[Rle] = [
        coco_mask.encode(np.array(mask[:, :, None], order="F", dtype=np.uint8))[0]
        for mask in instances.pred_masks.cpu().numpy()
    ]
    labels = instances.pred_classes.cpu().numpy() + 1
    return Detections(
        size=size,
        boxes=instances.pred_boxes.tensor.cpu().numpy(),
        scores=instances.scores.cpu().numpy(),
        category_ids=labels,
        categories=[str(label) for label in labels],
        masks=masks,
        areas=coco_mask.area(masks).astype(np.int64),
    )


def published(theirs: Detectron2Network) -> bytes:
    """The `.pkl` of the model zoo."""
    arrays = {name: values.numpy() for name, values in theirs.network.state_dict().items()}
    return pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}, protocol=2)


def _configs() -> Path:
    """An installed detectron2 has its configs inside, a checkout beside it."""
    import detectron2

    package = Path(detectron2.__file__).parent
    inside = package / "model_zoo" / "configs"
    return inside if inside.exists() else package.parent / "configs"


def _build(path: Path) -> Detectron2Network:
    from detectron2.config import LazyConfig, get_cfg, instantiate
    from detectron2.data.transforms import ResizeShortestEdge
    from detectron2.modeling import build_model

    if path.suffix == ".py":
        lazy = LazyConfig.load(str(path))
        return Detectron2Network(
            network=instantiate(lazy.model).eval(),
            resize=instantiate(lazy.dataloader.test.mapper.augmentations[0]),
        )
    config = get_cfg()
    config.merge_from_file(str(path))
    config.MODEL.DEVICE = "cpu"
    return Detectron2Network(
        network=build_model(config).eval(),
        resize=ResizeShortestEdge([config.INPUT.MIN_SIZE_TEST] * 2, config.INPUT.MAX_SIZE_TEST),  # a range of one size
    )


def _inputs(theirs: Detectron2Network, image: NDArray[np.uint8]) -> dict[str, Any]:
    """As detectron2.engine.DefaultPredictor makes them."""
    bgr = image[:, :, ::-1]
    resized = theirs.resize.get_transform(bgr).apply_image(bgr)
    pixels = torch.from_numpy(resized.astype(np.float32).transpose(2, 0, 1))  # (3, H, W) of the input
    return {"image": pixels, "height": image.shape[0], "width": image.shape[1]}


def _vary(network: nn.Module) -> None:
    """Norms that change nothing and biases of zero would hide a wrong folding or a wrong place."""
    for name, values in network.state_dict().items():
        part = name.rpartition(".norm.")[2]
        if part in _NORM_RANGES:
            values.uniform_(*_NORM_RANGES[part])
        elif name.endswith(".bias"):
            values.uniform_(*_BIAS_RANGE)
        if name.endswith(".conv3.norm.weight"):
            values.mul_(0.3)  # or the sums over a body's blocks grow without bound


def _spread(theirs: Detectron2Network, image: NDArray[np.uint8]) -> None:
    """Give each output of the layers a mean of 0 on the image, or all regions are of one class, and a deviation."""
    inputs = [_inputs(theirs, image)]
    for step in _layers(theirs.network):
        outputs: dict[Any, list[Tensor]] = {layer: [] for layer, _ in step}

        def keep(layer: Any, _inputs: object, output: Tensor, outputs: dict[Any, list[Tensor]] = outputs) -> None:
            outputs[layer].append(output.transpose(0, 1).flatten(1))

        handles = [layer.register_forward_hook(keep) for layer in outputs]
        theirs.network.inference(inputs)
        for handle in handles:
            handle.remove()
        for layer, deviation in step:
            values = torch.cat(outputs[layer], dim=1)  # (channels, places)
            means = values.mean(dim=1, keepdim=True)  # (channels, 1)
            factor = deviation / (values - means).std()
            layer.weight.mul_(factor)
            layer.bias.sub_(means[:, 0]).mul_(factor)


def _layers(network: Any) -> list[list[tuple[Any, float]]]:
    """Layers with the deviations of their outputs, in the order they run; those of a step do not feed each other."""
    rpn, heads = network.proposal_generator.rpn_head, network.roi_heads
    box_predictor = heads.box_predictor
    steps = [
        [(rpn.objectness_logits, random_weights.OBJECTNESS_STD), (rpn.anchor_deltas, random_weights.RPN_DELTAS_STD)],
        [
            (box_predictor.cls_score, random_weights.CLASS_LOGITS_STD),
            (box_predictor.bbox_pred, random_weights.BOX_DELTAS_STD),
        ],
    ]
    if hasattr(network.backbone, "output_convs"):
        outputs = zip(network.backbone.output_convs, _LEVEL_STDS, strict=True)
        steps.insert(0, [(conv.norm or conv, deviation) for conv, deviation in outputs])
    if hasattr(heads, "mask_head"):
        steps.append([(heads.mask_head.predictor, random_weights.MASK_LOGITS_STD)])
    if hasattr(heads, "keypoint_head"):
        steps.append([(heads.keypoint_head.score_lowres, random_weights.HEATMAPS_STD)])
    return steps
