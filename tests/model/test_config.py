from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from model.config import R18_FPN, R50_C4, R50_FPN, R101_FPN, ModelConfig
from model.recipe import Recipe


@pytest.mark.parametrize("config", [R50_FPN(), R18_FPN(num_classes=3), R50_C4(), R101_FPN()])
def test_config_survives_json(config: ModelConfig) -> None:
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_recipe_survives_json_to_the_last_bit() -> None:
    recipe = replace(Recipe(), norm_eps=0.0, pixel_mean=(0.1, 0.2, 1 / 3))
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("body", "vgg16"),
        ("num_classes", 1),
        ("num_classes", 3.0),
        ("num_classes", True),
        ("fpn_norm", 1),
        ("anchor_sizes", (32, 64)),
        ("anchor_sizes", "32"),
        ("aspect_ratios", ()),
        ("aspect_ratios", (1.0, -1.0)),
        ("min_size", 0),
        ("max_size", 799),
        ("box_head", "3fc"),
        ("box_head", "res5"),
        ("neck", "c4"),
        ("mask_head", "polygon"),
        ("num_keypoints", -1),
    ],
)
def test_config_names_the_field_that_is_wrong(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        replace(R50_FPN(), **{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("channel_order", "GBR"),
        ("pixel_mean", (0.5, 0.5)),
        ("pixel_std", (0.5, 0.5, 0.0)),
        ("norm_eps", -1e-5),
        ("norm_eps", float("nan")),
        ("box_nms_threshold", 1.5),
        ("mask_threshold", 0.0),
        ("max_detections", 0),
        ("paste", "nearest"),
        ("resize", "nearest"),
        ("keypoint_score", "sum"),
    ],
)
def test_recipe_names_the_field_that_is_wrong(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        replace(Recipe(), **{field: value})


def test_json_of_another_version_is_refused_by_field() -> None:
    values = R50_FPN().to_json()
    del values["body"]
    with pytest.raises(ValueError, match=r"missing \['body'\], unknown \['backbone'\]"):
        ModelConfig.from_json({**values, "backbone": "resnet50"})


def test_a_field_that_is_newer_than_the_file_has_its_default() -> None:
    values = replace(R50_FPN(), norm="group").to_json()
    del values["body_width"]
    assert ModelConfig.from_json(values) == replace(R50_FPN(), norm="group")
