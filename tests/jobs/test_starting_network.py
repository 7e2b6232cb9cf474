from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from jobs.starting_network import ModelName, StartingNetwork, starting_network
from model import R18_FPN, ModelConfig, Recipe
from model.initial_weights import STD_BY_LAYER, initialise
from model.network import build_network
from model.weights import describe, to_bytes
from pipeline import storage
from pipeline.errors import ConfigError
from pipeline.storage import join

SMALL = replace(
    R18_FPN(num_classes=4, min_size=96, max_size=160),
    body_width=32,
    fpn_channels=32,
    anchor_sizes=(8, 16, 32, 64, 128),
    box_head_width=32,
    mask_channels=32,
)
NAMES = {1: "disc", 2: "square", 3: "star"}
PREDICTORS = ("box_head.class_logits.", "box_head.deltas.", "mask_head.mask_logits.")


def begin(
    init: Path | str | None,
    *,
    name: ModelName = "R18-half-FPN",
    categories: Mapping[int, str] | None = None,
    changes: Mapping[str, object] | None = None,
    recipe_changes: Mapping[str, object] | None = None,
    seed: int = 0,
) -> StartingNetwork:
    return starting_network(
        name=name,
        init=None if init is None else str(init),
        categories=categories or {7: "disc", 9: "square", 40: "star"},
        changes=changes or {},
        recipe_changes=recipe_changes or {},
        seed=seed,
    )


def write_weights(path: Path, config: ModelConfig = SMALL, recipe: Recipe | None = None) -> dict[str, Tensor]:
    """A weight file with every tensor random, statistics too; its tensors."""
    recipe = recipe or Recipe(channel_order="BGR")
    network = build_network(config, recipe)
    initialise(network, seed=77)
    torch.manual_seed(77)
    for value in network.tensors().values():
        value.data.uniform_(0.5, 1.5)
    path.write_bytes(to_bytes(network, config, recipe, NAMES))
    return {name: value.detach().clone() for name, value in network.tensors().items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    path = tmp_path_factory.mktemp("trained") / "small.safetensors"
    return path, write_weights(path)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """torchvision's ResNet-18 with random weights and statistics, and its state dict in a file."""
    torch.manual_seed(0)
    theirs = resnet18(weights=None).eval()
    for name, value in theirs.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            value.uniform_(0.02, 0.06)  # the variance that keeps random weights' outputs alive
    path = tmp_path_factory.mktemp("imagenet") / "resnet18-f37072fd.pth"
    torch.save(theirs.state_dict(), path)
    return path, theirs


def differing(start: StartingNetwork, tensors: Mapping[str, Tensor]) -> set[str]:
    """Names of the network's tensors that are not those given."""
    own = start.network.tensors()
    return {name for name, value in own.items() if name not in tensors or not torch.equal(value, tensors[name])}


# -------------------------------------------------------------------------------------------------------------- fresh


def test_a_new_network_follows_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = begin(None, seed=5)
    torch.manual_seed(2)
    torch.rand(7)
    assert not differing(begin(None, seed=5), first.network.tensors())
    other = differing(begin(None, seed=6), first.network.tensors())
    assert {"body.stem.conv.weight", "box_head.class_logits.weight", "rpn.objectness.weight"} <= other


def test_a_new_network_is_of_the_datasets_categories_in_their_order() -> None:
    start = begin(None, categories={7: "disc", 9: "square", 40: "star", 41: "ring"})
    assert start.categories == {1: "disc", 2: "square", 3: "star", 4: "ring"}
    assert start.config.num_classes == 1 + 4
    assert start.network.box_head.class_logits.weight.shape[0] == 1 + 4
    assert "R18-half-FPN" in start.how
    weights = to_bytes(start.network, start.config, start.recipe, start.categories)
    assert describe(weights).config == start.config  # they fit each other


def test_changes_are_of_the_network_and_of_what_follows() -> None:
    changes = {"norm": "group", "min_size": 64, "max_size": 100, "mask_head": "none"}
    start = begin(None, changes=changes, recipe_changes={"max_detections": 7})
    assert {name: getattr(start.config, name) for name in changes} == changes
    assert start.recipe.max_detections == 7
    assert start.network.mask_head is None
    assert not any("running_mean" in name for name in start.network.tensors())


# ---------------------------------------------------------------------------------------------------------- fine-tune


@pytest.mark.parametrize(
    "categories",
    [{7: "disc", 9: "square", 40: "star"}, {1: "star", 2: "disc", 3: "square"}, {5: "square"}],
    ids=["the same", "in another order", "some of them"],
)
def test_weights_with_these_categories_are_kept_whole(
    trained: tuple[Path, dict[str, Tensor]], categories: dict[int, str]
) -> None:
    path, tensors = trained
    start = begin(path, categories=categories)
    assert not differing(start, tensors)
    assert start.categories == NAMES  # by the index that the weights have for them
    assert (start.config, start.recipe) == (SMALL, Recipe(channel_order="BGR"))
    assert str(path) in start.how


@pytest.mark.parametrize(
    "categories",
    [{1: "cat", 2: "dog", 3: "cow"}, {1: "disc", 2: "square", 3: "star", 4: "ring"}],
    ids=["as many", "one more"],
)
def test_weights_with_other_categories_are_kept_but_for_the_predictors(
    trained: tuple[Path, dict[str, Tensor]], categories: dict[int, str]
) -> None:
    path, tensors = trained
    start = begin(path, categories=categories)
    changed = differing(start, tensors)
    assert changed == {name for name in tensors if name.startswith(PREDICTORS)}
    assert start.categories == categories
    assert start.config == replace(SMALL, num_classes=1 + len(categories))
    own = start.network.tensors()
    for layer in ("box_head.class_logits", "box_head.deltas", "mask_head.mask_logits"):
        assert float(own[f"{layer}.weight"].std()) == pytest.approx(STD_BY_LAYER[layer], rel=0.3)
        assert not own[f"{layer}.bias"].any()
    assert "without its predictors" in start.how


def test_new_predictors_follow_from_the_seed(trained: tuple[Path, dict[str, Tensor]]) -> None:
    categories = {1: "cat"}
    first = begin(trained[0], categories=categories, seed=3)
    assert not differing(begin(trained[0], categories=categories, seed=3), first.network.tensors())
    other = differing(begin(trained[0], categories=categories, seed=4), first.network.tensors())
    assert other == {f"{layer}weight" for layer in PREDICTORS}


def test_sides_and_norms_change_and_tensors_stay(trained: tuple[Path, dict[str, Tensor]]) -> None:
    path, tensors = trained
    changes: dict[str, object] = {"norm": "frozen", "min_size": 64, "max_size": 80}
    start = begin(path, changes=changes, recipe_changes={"max_detections": 300})
    assert not differing(start, tensors)
    assert start.config == replace(SMALL, norm="frozen", min_size=64, max_size=80)
    assert start.recipe.max_detections == 300
    trainable = {name for name, _ in start.network.named_parameters()}
    assert "body.stem.conv.weight" in trainable
    assert not any(".norm." in name for name in trainable)


def test_a_keypoint_head_is_added_new(trained: tuple[Path, dict[str, Tensor]]) -> None:
    path, tensors = trained
    changes: dict[str, object] = {"num_keypoints": 5, "keypoint_convs": 1, "keypoint_channels": 8}
    start = begin(path, changes=changes)
    added = differing(start, tensors)
    assert added
    assert all(name.startswith("keypoint_head.") for name in added)


def test_weights_are_read_from_any_store(trained: tuple[Path, dict[str, Tensor]], memory_root: str) -> None:
    uri = join(memory_root, "small.safetensors")
    storage.write_bytes(uri, trained[0].read_bytes())
    start = begin(uri)
    assert not differing(start, trained[1])
    assert uri in start.how


# --------------------------------------------------------------------------------------------------------------- body


@torch.no_grad()
def test_a_body_trained_on_imagenet_computes_what_torchvisions_does(imagenet: tuple[Path, nn.Module]) -> None:
    path, theirs = imagenet
    start = begin(path, name="R18-FPN", seed=5)
    assert start.config == replace(R18_FPN(num_classes=1 + 3), norm="frozen")
    assert str(path) in start.how
    pixels = torch.randn(1, 3, 64, 96)
    expected = nn.Sequential(*list(theirs.children())[:-2])(pixels)  # without pooling and classifier
    found = start.network.body(pixels.clone())[-1]
    assert expected.std() > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_all_but_the_body_is_new(imagenet: tuple[Path, nn.Module]) -> None:
    start = begin(imagenet[0], name="R18-FPN", seed=5)
    fresh = begin(None, name="R18-FPN", seed=5, changes={"norm": "frozen"})
    same_in_both = (".norm.weight", ".norm.bias")  # of a ResNet that was never trained
    of_body = {name for name in start.network.tensors() if name.startswith("body.")}
    expected = {name for name in of_body if not name.endswith(same_in_both)}
    assert differing(start, fresh.network.tensors()) == expected


def test_the_norm_of_a_body_is_frozen_unless_asked_for(imagenet: tuple[Path, nn.Module]) -> None:
    start = begin(imagenet[0], name="R18-FPN", changes={"norm": "batch"})
    assert start.config.norm == "batch"
    mean = dict(imagenet[1].named_buffers())["bn1.running_mean"]
    assert torch.equal(start.network.tensors()["body.stem.norm.running_mean"], mean)
    with pytest.raises(ConfigError, match=r"bn1\.running_mean is unexpected"):
        begin(imagenet[0], name="R18-FPN", changes={"norm": "group"})


@pytest.mark.parametrize(
    ("name", "fault"),
    [("R50-FPN", "is missing"), ("R18-half-FPN", r"conv1\.weight is \(64, 3, 7, 7\), not \(32, 3, 7, 7\)")],
)
def test_a_body_of_another_network_is_refused(imagenet: tuple[Path, nn.Module], name: ModelName, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault) as caught:
        begin(imagenet[0], name=name)
    assert str(imagenet[0]) in str(caught.value)


# ------------------------------------------------------------------------------------------------------------ refusal


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "no tensors|cut short"),
        (b"<html>404</html>", "no tensors|cut short"),
        (saved({"epoch": 3, "model": {"x": torch.zeros(1)}}), "epoch, model"),
        (saved({"encoder.weight": torch.zeros(1)}), "not those of an R-CNN"),
    ],
    ids=["empty", "page", "nested", "foreign"],
)
def test_what_is_no_weights_is_refused_by_name(tmp_path: Path, contents: bytes, message: str) -> None:
    path = tmp_path / "start.pth"
    path.write_bytes(contents)
    with pytest.raises(ConfigError, match=message) as caught:
        begin(path)
    assert str(path) in str(caught.value)


def test_weights_that_are_cut_are_refused_by_name(trained: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(trained[0].read_bytes()[:5_000])
    with pytest.raises(ConfigError, match=r"not a whole safetensors file") as caught:
        begin(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("what", ["absent", "a folder", "absent in a store", "no store"])
def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path, memory_root: str, what: str) -> None:
    init = {
        "absent": str(tmp_path / "none.pth"),
        "a folder": str(tmp_path),
        "absent in a store": join(memory_root, "none.pth"),
        "no store": "https://example.invalid/none.pth",
    }[what]
    with pytest.raises(ConfigError) as caught:
        begin(init)
    assert init in str(caught.value)


def test_coco_offline_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ConfigError, match=r"coco.*no route to host.*online"):
        begin("coco")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "group"}, r"tensors do not fit the changed network \(first: body\.stem\.norm\.running_mean\)"),
        ({"fpn_channels": 64}, r"do not fit the changed network \(first: fpn\."),
        ({"min_size": 200, "max_size": 100}, r"max_size must be at least 200, got 100"),
        ({"min_size": 0}, r"min_size must be at least 1, got 0"),
        ({"norm": "layer"}, r"norm must be one of .*'layer'"),
    ],
)
def test_changes_that_do_not_fit_are_refused(
    trained: tuple[Path, dict[str, Tensor]], changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        begin(trained[0], changes=changes)


def test_changes_of_the_recipe_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_detections"):
        begin(None, recipe_changes={"max_detections": 0})
