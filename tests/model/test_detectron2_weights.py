from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model import torchvision_weights
from model.array_pickle import load_arrays
from model.config import R50_C4, R50_FPN, ModelConfig
from model.detectron2_weights import (
    categories,
    detectron2_name,
    detectron2_shape,
    is_detectron2,
    our_tensor,
    parameters,
    recognise,
    state_dict,
)
from model.network import build_network
from model.recipe import Recipe
from model.weights import _check_tensors
from tests.reference.detectron2_layout import Layout, detectron2_layout, old_constants

LAYOUTS: dict[str, dict[str, Any]] = {
    "R50-FPN": {"body": "R50"},
    "R101-FPN": {"body": "R101"},
    "X101-FPN": {"body": "X101"},
    "R50-C4": {"body": "R50", "neck": "C4"},
    "R101-C4": {"body": "R101", "neck": "C4"},
    "faster R50-FPN": {"body": "R50", "heads": "box"},
    "faster R50-C4": {"body": "R50", "heads": "box", "neck": "C4"},
    "keypoint R50-FPN": {"body": "R50", "heads": "keypoint", "num_classes": 1},
    "keypoint X101-FPN": {"body": "X101", "heads": "keypoint", "num_classes": 1},
    "LSJ R50-FPN": {"body": "R50", "large_scale_jitter": True},
    "LSJ R101-FPN": {"body": "R101", "large_scale_jitter": True},
}
BGR_MEAN = (103.53, 116.28, 123.675)
BGR_STD = (57.375, 57.12, 58.395)


def _tensors(layout: Layout) -> dict[str, Tensor]:
    """Each filled with a number of its own, which takes no memory."""
    return {name: torch.tensor(float(index)).expand(shape) for index, (name, shape) in enumerate(layout.items(), 1)}


def _constants(neck: Any) -> dict[str, Tensor]:
    """What old versions stored besides, with the values they had."""
    anchors = []
    for size in (32, 64, 128, 256, 512):
        for height_over_width in (0.5, 1.0, 2.0):
            width = size / height_over_width**0.5
            height = size * height_over_width**0.5
            anchors.append([-width / 2, -height / 2, width / 2, height / 2])
    values = torch.tensor(anchors).view(1 if neck == "C4" else 5, -1, 4)
    constants = {name: torch.ones(shape) for name, shape in old_constants(neck).items()}
    constants["pixel_mean"] = torch.tensor(BGR_MEAN)[:, None, None]
    return {**constants, **dict(zip([name for name in constants if "anchors" in name], values, strict=True))}


def _checked(tensors: dict[str, Tensor]) -> tuple[ModelConfig, Recipe, dict[str, Tensor]]:
    """As model/weights.py puts the parts together."""
    config, recipe = recognise(tensors)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in build_network(config, recipe).tensors().items()}
    expected = {detectron2_name(name, config): detectron2_shape(name, shape, config) for name, shape in shapes.items()}
    assert len(expected) == len(shapes)
    found = parameters(tensors)
    _check_tensors(found, expected, "x.pkl")
    ours = {name: our_tensor(name, found[detectron2_name(name, config)], config) for name in shapes}
    assert {name: value.shape for name, value in ours.items()} == shapes
    return config, recipe, ours


@pytest.mark.parametrize("with_constants", [False, True])
@pytest.mark.parametrize("kind", list(LAYOUTS))
def test_every_key_has_one_place(kind: str, with_constants: bool) -> None:
    layout = detectron2_layout(**LAYOUTS[kind])
    tensors = _tensors(layout)
    if with_constants:
        tensors |= _constants(LAYOUTS[kind].get("neck", "FPN"))
        if kind.startswith(("X101", "keypoint X101")):
            tensors["pixel_std"] = torch.tensor(BGR_STD)[:, None, None]
    assert is_detectron2(tensors)
    assert not torchvision_weights.is_torchvision(tensors)
    config, recipe, ours = _checked(tensors)
    placed = [float(value.flatten()[-1]) for value in ours.values()]  # the first row may be the background's
    stored = [float(value.flatten()[-1]) for name, value in tensors.items() if name in parameters(tensors)]
    assert sorted(placed) == sorted(stored)
    assert len(set(placed)) == len(placed)
    assert (config, recipe) == recognise(_tensors(layout))


def _recognised(kind: str) -> tuple[ModelConfig, Recipe]:
    return recognise(_tensors(detectron2_layout(**LAYOUTS[kind])))


def test_architectures_follow_from_the_keys() -> None:
    fpn = replace(R50_FPN(num_classes=81), norm="frozen")
    c4 = replace(R50_C4(num_classes=81), norm="frozen")
    jittered = {"norm": "sync", "fpn_norm": True, "rpn_convs": 2, "box_head": "4conv1fc", "head_norm": True}
    keypoints: dict[str, Any] = {"mask_head": "none", "num_classes": 2, "num_keypoints": 17}
    assert {kind: _recognised(kind)[0] for kind in LAYOUTS} == {
        "R50-FPN": fpn,
        "R101-FPN": replace(fpn, body="resnet101"),
        "X101-FPN": replace(fpn, body="resnext101_32x8d"),
        "R50-C4": c4,
        "R101-C4": replace(c4, body="resnet101"),
        "faster R50-FPN": replace(fpn, mask_head="none"),
        "faster R50-C4": replace(c4, mask_head="none"),
        "keypoint R50-FPN": replace(fpn, **keypoints),
        "keypoint X101-FPN": replace(fpn, body="resnext101_32x8d", **keypoints),
        "LSJ R50-FPN": replace(fpn, **jittered),  # type: ignore[arg-type]
        "LSJ R101-FPN": replace(fpn, body="resnet101", **jittered),  # type: ignore[arg-type]
    }


def test_conventions_follow_from_the_family() -> None:
    """configs/Base-RCNN-FPN.yaml, Base-RCNN-C4.yaml, and STRIDE_IN_1X1 and PIXEL_STD of each network's own file."""
    recipe = _recognised("R50-FPN")[1]
    assert (recipe.channel_order, recipe.pixel_range) == ("BGR", 1.0)
    assert (recipe.pixel_mean, recipe.pixel_std) == (BGR_MEAN, (1.0, 1.0, 1.0))
    assert (recipe.resize, recipe.size_divisor, recipe.bottleneck_stride) == ("detectron2", 32, "1x1")
    assert (recipe.norm_eps, recipe.anchors_rounded, recipe.anchor_strides) == (1e-5, False, "fixed")
    assert (recipe.rpn_pre_nms, recipe.rpn_post_nms, recipe.rpn_nms_threshold) == (1000, 1000, 0.7)
    assert (recipe.roi_aligned, recipe.roi_sampling_ratio, recipe.roi_levels) == (True, 0, "detectron2")
    assert (recipe.score_threshold, recipe.box_nms_threshold, recipe.max_detections) == (0.05, 0.5, 100)
    assert (recipe.paste, recipe.mask_threshold, recipe.keypoint_score) == ("detectron2", 0.5, "softmax")
    for side in (recipe.rpn_min_side, recipe.box_min_side):
        assert 0 < np.float32(side) < 1e-30  # sides must be above 0
    for kind in LAYOUTS:
        own = replace(recipe, pixel_std=BGR_STD, bottleneck_stride="3x3") if "X101" in kind else recipe
        own = replace(own, rpn_pre_nms=6000, size_divisor=1) if "C4" in kind else own
        assert _recognised(kind)[1] == own, kind


def test_a_network_without_an_rpn_is_fast_r_cnn() -> None:
    layout = detectron2_layout("R50", heads="box")
    tensors = _tensors({name: shape for name, shape in layout.items() if not name.startswith("proposal_generator.")})
    config, _, _ = _checked(tensors)
    assert (config.proposals, config.mask_head) == ("given", "none")


def test_constants_in_the_file_override_the_family() -> None:
    tensors = _tensors(detectron2_layout("R50"))
    tensors["pixel_mean"] = torch.tensor(BGR_MEAN[::-1])[:, None, None]
    tensors["pixel_std"] = torch.tensor(BGR_STD[::-1])[:, None, None]
    recipe = recognise(tensors)[1]  # a body of torchvision's
    assert (recipe.channel_order, recipe.bottleneck_stride) == ("RGB", "3x3")
    assert (recipe.pixel_mean, recipe.pixel_std) == (BGR_MEAN[::-1], BGR_STD[::-1])


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("pixel_mean", torch.zeros(4, 1, 1), "pixel_mean .* must be 3 numbers"),
        ("pixel_mean", torch.tensor([1.0, torch.nan, 1.0]), "pixel_mean .* must be 3 numbers"),
        ("pixel_std", torch.tensor([1.0, 0.0, 1.0]), "pixel_std .* must be 3 numbers, deviations positive"),
        ("proposal_generator.anchor_generator.cell_anchors.1", torch.ones(3, 4), r"other anchors.*cell_anchors\.1"),
        ("proposal_generator.anchor_generator.cell_anchors.0", torch.ones(9, 4), r"other anchors.*\(9, 4\)"),
        ("proposal_generator.anchor_generator.cell_anchors.5", torch.ones(3, 4), r"other anchors.*cell_anchors\.5"),
    ],
)
def test_constants_must_be_those_we_have(name: str, values: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recognise({**_tensors(detectron2_layout("R50")), name: values})


def test_background_comes_first() -> None:
    """Two classes: rows cat, dog, background of the logits; four of each class of the deltas; cat, dog of the masks."""
    config = R50_FPN(num_classes=3)
    logits = our_tensor("box_head.class_logits.bias", torch.tensor([1.0, 2.0, 9.0]), config)
    assert logits.tolist() == [9, 1, 2]
    deltas = our_tensor("box_head.deltas.weight", torch.arange(1.0, 9)[:, None], config)
    assert deltas.flatten().tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]
    masks = our_tensor("mask_head.mask_logits.weight", torch.tensor([1.0, 2.0])[:, None, None, None], config)
    assert (masks.shape, masks.flatten().tolist()) == ((3, 1, 1, 1), [0, 1, 2])
    for name in ("box_head.fcs.0.bias", "mask_head.upsample.bias", "rpn.deltas.bias"):
        assert our_tensor(name, torch.tensor([1.0, 2.0]), config).tolist() == [1, 2]
    agnostic = replace(config, mask_classes="agnostic")
    assert our_tensor("mask_head.mask_logits.bias", torch.tensor([5.0]), agnostic).tolist() == [5]


def test_shapes_are_those_before_the_background() -> None:
    config = R50_FPN(num_classes=81)
    for name, ours, theirs in (
        ("box_head.class_logits.weight", (81, 1024), (81, 1024)),
        ("box_head.deltas.weight", (324, 1024), (320, 1024)),
        ("box_head.deltas.bias", (324,), (320,)),
        ("mask_head.mask_logits.weight", (81, 256, 1, 1), (80, 256, 1, 1)),
        ("rpn.deltas.weight", (12, 256, 1, 1), (12, 256, 1, 1)),
    ):
        assert detectron2_shape(name, torch.Size(ours), config) == theirs


def test_names_worked_by_hand() -> None:
    fpn, c4 = R50_FPN(), R50_C4()
    two_convs = replace(fpn, rpn_convs=2)
    for config, ours, theirs in (
        (fpn, "body.stem.conv.weight", "backbone.bottom_up.stem.conv1.weight"),
        (c4, "body.stem.norm.running_var", "backbone.stem.conv1.norm.running_var"),
        (c4, "body.res4.5.conv2.conv.weight", "backbone.res4.5.conv2.weight"),
        (c4, "res5.0.shortcut.norm.bias", "roi_heads.res5.0.shortcut.norm.bias"),
        (fpn, "body.res5.0.shortcut.conv.weight", "backbone.bottom_up.res5.0.shortcut.weight"),
        (fpn, "fpn.lateral.0.conv.bias", "backbone.fpn_lateral2.bias"),
        (fpn, "fpn.output.3.norm.weight", "backbone.fpn_output5.norm.weight"),
        (fpn, "rpn.convs.0.conv.bias", "proposal_generator.rpn_head.conv.bias"),
        (two_convs, "rpn.convs.0.conv.bias", "proposal_generator.rpn_head.conv.conv0.bias"),
        (two_convs, "rpn.convs.1.conv.weight", "proposal_generator.rpn_head.conv.conv1.weight"),
        (fpn, "box_head.fcs.1.weight", "roi_heads.box_head.fc2.weight"),
        (fpn, "box_head.convs.3.norm.weight", "roi_heads.box_head.conv4.norm.weight"),
        (fpn, "mask_head.convs.0.conv.weight", "roi_heads.mask_head.mask_fcn1.weight"),
        (fpn, "mask_head.upsample.bias", "roi_heads.mask_head.deconv.bias"),
        (fpn, "keypoint_head.convs.7.conv.bias", "roi_heads.keypoint_head.conv_fcn8.bias"),
        (fpn, "keypoint_head.upsample.weight", "roi_heads.keypoint_head.score_lowres.weight"),
    ):
        assert detectron2_name(ours, config) == theirs


def test_categories_are_in_detectron2s_order() -> None:
    """data/datasets/builtin_meta.py: COCO's ids without those that were given up, 12 (a street sign) the first."""
    names = categories(R50_FPN(num_classes=81))
    assert list(names) == list(range(1, 81))
    assert (names[1], names[11], names[12], names[80]) == ("person", "fire hydrant", "stop sign", "toothbrush")
    keypoint = replace(R50_FPN(num_classes=2), num_keypoints=17)
    assert categories(keypoint) == {1: "person"}
    assert categories(R50_FPN(num_classes=3)) == {1: "class 1", 2: "class 2"}


@pytest.mark.parametrize("kind", ["R50-FPN", "R50-C4", "keypoint R50-FPN", "LSJ R50-FPN"])
def test_faults_are_named_in_detectron2s_words(kind: str) -> None:
    layout = detectron2_layout(**LAYOUTS[kind])
    parts = ("res2.0.conv2.weight", "res4.5.conv1.norm.running_mean", "anchor_deltas.bias", "bbox_pred.bias")
    cut, norm, integers, short = (next(name for name in layout if name.endswith(part)) for part in parts)
    tensors = _tensors(layout)
    del tensors[cut], tensors[norm]
    tensors[integers] = torch.ones(layout[integers], dtype=torch.int64)
    tensors[short] = torch.ones(7)
    tensors |= dict.fromkeys(("backbone.extra", "pixel_means", "x.num_batches_tracked"), torch.ones(1))
    with pytest.raises(ValueError, match=r"x\.pkl do not fit") as caught:
        _checked(tensors)
    message = str(caught.value)
    assert f"2 missing (first: {', '.join(name for name in layout if name in (cut, norm))})" in message
    assert "3 unexpected (first: backbone.extra, pixel_means, x.num_batches_tracked)" in message
    assert f"{integers} is torch.int64 {layout[integers]}, not float {layout[integers]}" in message
    assert f"{short} is torch.float32 (7,), not float {layout[short]}" in message


def test_one_box_for_all_classes_is_named_as_misshapen() -> None:
    tensors = _tensors(detectron2_layout("R50"))
    tensors["roi_heads.box_predictor.bbox_pred.weight"] = torch.ones(4, 1024)
    with pytest.raises(ValueError, match=r"misshapen.*bbox_pred\.weight is torch\.float32 \(4, 1024\)"):
        _checked(tensors)


@pytest.mark.parametrize(
    ("extra", "removed", "message"),
    [
        ("backbone.res5.0.conv1.weight", "backbone.bottom_up.", "DC5"),
        ("roi_heads.box_predictor.2.cls_score.weight", "roi_heads.box_predictor.", "Cascade R-CNN"),
        ("head.cls_score.weight", "roi_heads.", "RetinaNet"),
        ("sem_seg_head.predictor.weight", "nothing", "Panoptic FPN"),
        ("backbone.bottom_up.res5.0.conv2_offset.weight", "nothing", "deformable"),
        ("pixel_mean", "roi_heads.", "without heads for regions"),
        ("backbone.bottom_up.s1.b1.a.weight", "backbone.bottom_up.", "no ResNet"),
        ("backbone.bottom_up.res3.4.conv1.weight", "nothing", "3, 5, 6, 3 blocks"),
        ("backbone.bottom_up.res2.0.conv1.weight", "backbone.bottom_up.res2.", "1, 4, 6, 3 blocks"),
    ],
)
def test_other_networks_are_refused(extra: str, removed: str, message: str) -> None:
    tensors = _tensors(detectron2_layout("R50"))
    tensors = {name: value for name, value in tensors.items() if not name.startswith(removed)} | {extra: torch.ones(3)}
    assert is_detectron2(tensors)
    with pytest.raises(ValueError, match=message):
        recognise(tensors)


def test_norms_everywhere_need_to_say_their_deviation() -> None:
    """Misc/mask_rcnn_R_50_FPN_3x_syncbn.yaml has neither PIXEL_STD nor the stride of its scratch_…_9x twin."""
    layout = detectron2_layout("R50", large_scale_jitter=True)
    tensors = _tensors(layout)
    for part in ("weight", "bias"):
        tensors[f"proposal_generator.rpn_head.conv.{part}"] = tensors.pop(
            f"proposal_generator.rpn_head.conv.conv0.{part}"
        )
        del tensors[f"proposal_generator.rpn_head.conv.conv1.{part}"]
    with pytest.raises(ValueError, match="add the pixel_std"):
        recognise(tensors)
    for std, stride in (((1.0, 1.0, 1.0), "1x1"), (BGR_STD, "3x3")):
        tensors["pixel_std"] = torch.tensor(std)[:, None, None]
        config, recipe, _ = _checked(tensors)
        assert (config.norm, config.rpn_convs, recipe.pixel_std, recipe.bottleneck_stride) == ("sync", 1, std, stride)
    group = {name: value for name, value in tensors.items() if not name.endswith((".running_mean", ".running_var"))}
    group["pixel_std"] = torch.ones(3, 1, 1)
    config, recipe, _ = _checked(group)
    assert (config.norm, recipe.bottleneck_stride) == ("group", "3x3")


def _arrays() -> dict[str, Any]:
    return {"backbone.bottom_up.a": np.arange(3, dtype=np.float32), "pixel_mean": np.ones((3, 1, 1), np.float32)}


@pytest.mark.parametrize("protocol", [2, 4])
def test_files_of_the_model_zoo_are_opened(protocol: int) -> None:
    document = {"model": OrderedDict(_arrays()), "__author__": "someone", "matching_heuristics": True}
    tensors = state_dict(load_arrays(pickle.dumps(document, protocol)))
    assert tensors is not None
    assert {name: value.tolist() for name, value in tensors.items()} == {
        "backbone.bottom_up.a": [0, 1, 2],
        "pixel_mean": [[[1]], [[1]], [[1]]],
    }


def test_checkpoints_are_opened_without_what_training_left() -> None:
    file = io.BytesIO()
    model = {name: torch.from_numpy(value) for name, value in _arrays().items()}
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    torch.save({"model": model, "optimizer": optimizer, "scheduler": {"last_epoch": 5}, "iteration": 4}, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    tensors = state_dict(loaded)
    assert tensors is not None
    assert list(tensors) == list(model)
    assert state_dict(model) == model  # a state dict alone


def test_integers_and_numbers_become_tensors() -> None:
    arrays = {**_arrays(), "a": np.uint16(7), "b": np.array(3), "c": np.array([True])}
    tensors = state_dict({"model": arrays})
    assert tensors is not None
    assert [tensors[name].tolist() for name in "abc"] == [7, 3, [True]]


def test_other_objects_are_no_files_of_detectron2() -> None:
    others: list[object] = [None, [1], {}, {"model": {}}, {"model": 3}, {"model": {1: 2}}, {"blobs": _arrays()}]
    for loaded in others:
        assert state_dict(loaded) is None
    with pytest.raises(ValueError, match=r"1 entries that are no arrays \(first: roi_heads, a str\)"):
        state_dict({"model": {**_arrays(), "roi_heads": "x"}})
