from __future__ import annotations

import io
import re
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50, resnet101, resnext101_32x8d
from torchvision.models.detection import (
    MaskRCNN,
    fasterrcnn_resnet50_fpn,
    fasterrcnn_resnet50_fpn_v2,
    keypointrcnn_resnet50_fpn,
    maskrcnn_resnet50_fpn,
    maskrcnn_resnet50_fpn_v2,
)
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import model
from model import R50_C4
from model.config import Body
from model.initial_weights import initialise
from model.network import build_network
from model.torchvision_weights import body_tensors, coco_categories
from model.weights import load_body

MAKERS = {
    "v1": maskrcnn_resnet50_fpn,
    "v2": maskrcnn_resnet50_fpn_v2,
    "faster v1": fasterrcnn_resnet50_fpn,
    "faster v2": fasterrcnn_resnet50_fpn_v2,
    "keypoint": keypointrcnn_resnet50_fpn,
}


def _tensors(version: str, num_classes: int = 91) -> dict[str, Tensor]:
    """Of the right names and shapes, each filled with a number of its own."""
    with torch.device("meta"):
        network: nn.Module = MAKERS[version](weights=None, weights_backbone=None, num_classes=num_classes)
    return _numbered(network)


def _numbered(network: nn.Module) -> dict[str, Tensor]:
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    return {name: torch.full(shape, float(index)) for index, (name, shape) in enumerate(shapes.items())}


def _file(tensors: dict[str, Tensor], *, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(tensors, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def _without_counters(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if not name.endswith("num_batches_tracked")}


def _name_of_2019(name: str) -> str:
    name = re.sub(r"^(backbone\.fpn\.\w+_blocks\.\d)\.0\.", r"\1.", name)
    name = name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
    return re.sub(r"mask_head\.(\d)\.0\.", lambda match: f"mask_head.mask_fcn{int(match[1]) + 1}.", name)


def test_versions_are_recognised_with_their_recipes() -> None:
    first, second = model.describe(_file(_tensors("v1"))), model.describe(_file(_tensors("v2")))
    assert first.config == model.R50_FPN()
    assert second.config.norm == "batch"
    assert (second.config.box_head, second.config.rpn_convs) == ("4conv1fc", 2)
    assert (second.config.fpn_norm, second.config.head_norm) == (True, True)
    assert first.recipe.norm_eps == second.recipe.norm_eps == 1e-5
    assert (first.config.min_size, first.config.max_size) == (800, 1333)


def test_frozen_norms_are_those_of_the_published_v1() -> None:
    info = model.describe(_file(_without_counters(_tensors("v1"))))
    assert (info.config.norm, info.recipe.norm_eps) == ("frozen", 0.0)


@pytest.mark.parametrize("version", ["faster v1", "faster v2"])
def test_faster_r_cnn_has_no_mask_head(version: str) -> None:
    info = model.describe(_file(_tensors(version)))
    assert (info.config.mask_head, info.config.num_keypoints) == ("none", 0)
    assert info.config.box_head == ("2fc" if version == "faster v1" else "4conv1fc")


def test_keypoint_r_cnn_is_recognised() -> None:
    info = model.describe(_file(_tensors("keypoint", num_classes=2)))
    assert (info.config.mask_head, info.config.num_keypoints) == ("none", 17)
    assert info.categories == {1: "person"}


@pytest.mark.parametrize("body", ["resnet18", "resnet101", "resnext101_32x8d"])
def test_other_bodies_are_recognised(body: str) -> None:
    with torch.device("meta"):
        backbone = resnet_fpn_backbone(backbone_name=body, weights=None, trainable_layers=5)
        network = MaskRCNN(backbone, num_classes=4)
    assert model.describe(_file(_numbered(network))).config.body == body


BODIES = {"resnet18": resnet18, "resnet50": resnet50, "resnet101": resnet101, "resnext101_32x8d": resnext101_32x8d}


@pytest.mark.parametrize("body", list(BODIES))
@pytest.mark.parametrize("neck", ["fpn", "c4"])
def test_bodies_trained_on_imagenet_have_one_place_for_every_tensor(body: Body, neck: Literal["fpn", "c4"]) -> None:
    config = replace(R50_C4() if neck == "c4" else model.R50_FPN(), body=body)
    with torch.device("meta"):
        network, theirs = build_network(config, model.Recipe()), BODIES[body]()
    tensors = _numbered(theirs)
    placed = body_tensors(tensors, network)
    wanted = {
        float(value.flatten()[0]) for name, value in _without_counters(tensors).items() if not name.startswith("fc.")
    }
    assert {float(value.flatten()[0]) for value in placed.values()} == wanted
    assert len(placed) == len(wanted)
    assert set(placed) == {name for name in network.tensors() if name.startswith(("body.", "res5."))}


def test_another_body_is_refused_by_name() -> None:
    with torch.device("meta"):
        network = build_network(model.R50_FPN(), model.Recipe())
    tensors = _numbered(resnet18())
    with pytest.raises(ValueError, match=r"do not fit in \d+ places, first: layer1\.0\.conv3\.weight is missing"):
        body_tensors(tensors, network)


def test_the_names_of_the_first_published_file_are_read() -> None:
    now = _without_counters(_tensors("v1"))
    then = {_name_of_2019(name): value for name, value in now.items()}
    assert len(then.keys() - now.keys()) == 26  # 16 of the pyramid, 2 of the RPN, 8 of the mask head
    new = model.load(_file(now)).network.tensors()
    old = model.load(_file(then, legacy=True)).network.tensors()
    assert list(new) == list(old)
    assert all(torch.equal(new[name], old[name]) for name in new)


@pytest.mark.parametrize("version", list(MAKERS))
def test_every_tensor_has_one_place(version: str) -> None:
    tensors = _without_counters(_tensors(version))
    placed = model.load(_file(tensors)).network.tensors()
    assert {float(value.flatten()[0]) for value in placed.values()} == {
        float(value.flatten()[0]) for value in tensors.values()
    }
    assert len(placed) == len(tensors)


def test_classes_are_counted() -> None:
    info = model.describe(_file(_tensors("v1", num_classes=3)))
    assert info.config.num_classes == 3
    assert info.categories == {1: "class 1", 2: "class 2"}


def test_categories_of_coco() -> None:
    categories = model.describe(_file(_tensors("v2"))).categories
    assert categories == coco_categories()
    assert set(categories) == set(range(1, 91))
    assert (categories[1], categories[90]) == ("person", "toothbrush")


def test_a_missing_layer_is_named() -> None:
    tensors = _tensors("v2")
    del tensors["backbone.body.layer3.4.bn2.bias"]
    with pytest.raises(ValueError, match=r"1 missing \(first: backbone\.body\.layer3\.4\.bn2\.bias\)"):
        model.describe(_file(tensors))


def test_a_body_is_loaded_and_the_rest_left_alone() -> None:
    network = build_network(replace(model.R18_FPN(num_classes=3), norm="frozen"), model.Recipe())
    initialise(network, 0)
    before = network.tensors()["fpn.output.0.conv.weight"].clone()
    theirs = resnet18()
    load_body(network, _file(theirs.state_dict()))
    assert torch.equal(network.tensors()["body.res5.1.conv2.conv.weight"], theirs.layer4[1].conv2.weight)
    assert torch.equal(network.tensors()["body.stem.norm.running_var"], theirs.bn1.running_var)
    assert torch.equal(network.tensors()["fpn.output.0.conv.weight"], before)
    with pytest.raises(ValueError, match="weights of the body: the weights of the body do not fit"):
        load_body(network, _file(resnet50().state_dict()))
