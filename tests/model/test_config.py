from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from model.config import R18_FPN, R50_FPN, ModelConfig, Recipe


@pytest.mark.parametrize("config", [R50_FPN(), R18_FPN(num_classes=3), replace(R50_FPN(), box_head="4conv1fc")])
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
        ("background", "last"),
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
