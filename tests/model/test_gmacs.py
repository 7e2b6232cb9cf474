"""Multiply-adds against the arithmetic of each part, and against what torchvision publishes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torchvision.models.detection import KeypointRCNN_ResNet50_FPN_Weights as KeypointWeights
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_V2_Weights as MaskV2Weights
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights as MaskWeights

from model import gmacs
from model.config import R18_FPN, R50_C4, R50_FPN, ModelConfig
from model.network import build_network
from model.recipe import Recipe
from model.structures import ImageSize

SIZE = ImageSize(800, 1344)
V1 = R50_FPN()
V2 = replace(V1, rpn_convs=2, box_head="4conv1fc", fpn_norm=True, head_norm=True)
KEYPOINT = replace(V1, num_classes=2, mask_head="none", num_keypoints=17)

# torchvision's figures are of an input of 800 × 800 and 1000 regions, and those without "_V2" leave out the head of
# masks or keypoints.
OF_TORCHVISION = [
    (MaskWeights.COCO_V1, replace(V1, norm="frozen"), {"mask convs", "mask upsample", "mask logits"}),
    (MaskV2Weights.COCO_V1, V2, set()),
    (KeypointWeights.COCO_LEGACY, replace(KEYPOINT, norm="frozen"), {"keypoint head"}),
]


def count(
    config: ModelConfig,
    size: ImageSize = SIZE,
    *,
    recipe: Recipe = Recipe(),  # noqa: B008 - frozen
    num_proposals: int = 1000,
    num_detections: int = 100,
    all_mask_logits: bool = True,
) -> dict[str, int]:
    return gmacs.count(
        config,
        recipe,
        size,
        num_proposals=num_proposals,
        num_detections=num_detections,
        all_mask_logits=all_mask_logits,
    )


def stage_by_hand(cells: int, first_in: int, width: int, depth: int, *, stride: int) -> int:
    """A stage of bottlenecks whose first 3×3 has the stride; `cells` are its output's."""
    out = 4 * width
    first = cells * stride**2 * first_in * width + cells * (9 * width**2 + width * out + first_in * out)
    return first + (depth - 1) * cells * (out * width + 9 * width**2 + width * out)


def test_parts_of_r50_fpn_by_hand() -> None:
    c2, c3, c4, c5, p6 = 200 * 336, 100 * 168, 50 * 84, 25 * 42, 13 * 21
    pyramid = c2 + c3 + c4 + c5
    assert count(R50_FPN(num_classes=81)) == {
        "stem": 400 * 672 * 3 * 64 * 7**2,
        "res2": stage_by_hand(c2, 64, 64, 3, stride=1),
        "res3": stage_by_hand(c3, 256, 128, 4, stride=2),
        "res4": stage_by_hand(c4, 512, 256, 6, stride=2),
        "res5": stage_by_hand(c5, 1024, 512, 3, stride=2),
        "FPN lateral": (c2 * 256 + c3 * 512 + c4 * 1024 + c5 * 2048) * 256,
        "FPN output": pyramid * 256**2 * 9,
        "RPN": (pyramid + p6) * (256**2 * 9 + 256 * 3 * (1 + 4)),
        "box head": 1000 * (256 * 7**2 * 1024 + 1024**2 + 1024 * 81 * (1 + 4)),
        "mask convs": 100 * 4 * 14**2 * 256**2 * 9,
        "mask upsample": 100 * 14**2 * 256**2 * 4,
        "mask logits": 100 * 28**2 * 256 * 81,
    }


def test_r50_fpn_has_269_billion_as_our_notes_say() -> None:
    """Their classifier has four outputs less, its box deltas having no background, and their masks one class less."""
    table = {
        "stem": 2.5,
        "res2": 14.3,
        "res3": 22.0,
        "res4": 31.4,
        "res5": 17.3,
        "FPN lateral": 8.3,
        "FPN output": 52.6,
        "RPN": 53.2,
        "box head": 14.3,
        "mask convs": 46.2,
        "mask upsample": 5.1,
        "mask logits": 1.6,
    }
    counted = count(R50_FPN(num_classes=81))
    assert {name: value / 1e9 for name, value in counted.items()} == pytest.approx(table, abs=0.06)
    backbone = sum(counted[name] for name in ("stem", "res2", "res3", "res4", "res5"))
    assert backbone / 1e9 == pytest.approx(87.6, abs=0.05)
    assert sum(counted.values()) / 1e9 == pytest.approx(268.9, abs=0.05)


@pytest.mark.parametrize(("weights", "config", "left_out"), OF_TORCHVISION, ids=["mask", "mask v2", "keypoint"])
def test_sums_are_those_torchvision_publishes(
    weights: MaskWeights | MaskV2Weights | KeypointWeights, config: ModelConfig, left_out: set[str]
) -> None:
    counted = count(config, ImageSize(800, 800))
    published = weights.meta["_ops"]
    assert sum(value for name, value in counted.items() if name not in left_out) / 1e9 == pytest.approx(
        published, abs=0.001
    )


@pytest.mark.parametrize(("weights", "config", "_left_out"), OF_TORCHVISION, ids=["mask", "mask v2", "keypoint"])
def test_the_parts_hold_every_parameter(
    weights: MaskWeights | MaskV2Weights | KeypointWeights, config: ModelConfig, _left_out: set[str]
) -> None:
    with torch.device("meta"):
        network = build_network(config, Recipe())
    parameters = [parameter for part in gmacs.parts_of(network).values() for parameter in part.parameters()]
    assert sum(parameter.numel() for parameter in parameters) == weights.meta["num_params"]
    assert {id(parameter) for parameter in parameters} == {id(parameter) for parameter in network.parameters()}


def test_only_the_own_class_of_a_mask_is_computed() -> None:
    every, own = count(V1), count(V1, all_mask_logits=False)
    assert own.pop("mask logits") * 91 == every.pop("mask logits")
    assert own == every
    competing = replace(V1, mask_classes="softmax")
    assert count(competing, all_mask_logits=False) == count(competing)  # each needs the others
    assert count(replace(V1, mask_classes="agnostic"))["mask logits"] == 100 * 28**2 * 256


def test_res5_on_every_region_by_hand() -> None:
    """The notes' 732 billion: the stride is in the first 1×1, so all of res5 has 7 × 7 cells."""
    cells = 7 * 7
    of_region = cells * (1024 * 512 + 9 * 512**2 + 512 * 2048 + 1024 * 2048) + 2 * cells * (
        2048 * 512 + 9 * 512**2 + 512 * 2048
    )
    recipe = Recipe(bottleneck_stride="1x1")
    of_boxes = count(R50_C4(), recipe=recipe, num_detections=0)
    assert of_boxes["res5"] == 1000 * of_region
    assert of_boxes["res5"] / 1e9 == pytest.approx(732, abs=0.5)
    assert count(R50_C4(), recipe=recipe)["res5"] == (1000 + 100) * of_region
    assert "FPN lateral" not in of_boxes


def test_the_keypoint_head_by_hand() -> None:
    of_region = 14**2 * (256 * 512 + 7 * 512 * 512) * 9 + 14**2 * 512 * 17 * 4**2
    assert count(KEYPOINT)["keypoint head"] == 100 * of_region


def test_linear_masks_by_hand() -> None:
    counted = count(replace(V1, mask_head="mlp"))
    assert counted["mask head"] == 100 * (14**2 * 256 * 1024 + 1024**2 + 1024 * 28**2 * 91)


def test_given_proposals_need_no_rpn() -> None:
    assert "RPN" not in count(replace(V1, proposals="given", mask_head="none"))


@pytest.mark.parametrize("config", [R18_FPN(num_classes=5), R50_C4(num_classes=5)], ids=["fpn", "c4"])
def test_heads_cost_as_much_as_they_have_regions(config: ModelConfig) -> None:
    size = ImageSize(64, 96)
    none = count(config, size, num_proposals=0, num_detections=0)
    some = count(config, size, num_proposals=7, num_detections=3)
    more = count(config, size, num_proposals=14, num_detections=6)
    assert none["box head"] == none["mask upsample"] == 0
    for name, value in some.items():
        assert more[name] - value == value - none[name]
    assert some["box head"] > 0


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(ValueError, match="height=0"):
        count(V1, ImageSize(0, 64))
    with pytest.raises(ValueError, match="-1 detections"):
        count(V1, num_detections=-1)
