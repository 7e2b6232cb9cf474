"""The network a training begins with: all new, on a body trained on ImageNet, or from weights to be fine-tuned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

import model
from model import ModelConfig, Recipe, weights
from model.initial_weights import STD_BY_LAYER, initialise
from model.network import Network, build_network
from pipeline import storage
from pipeline.errors import ConfigError

ModelName = Literal["R50-FPN", "R101-FPN", "R50-C4", "R18-FPN", "R18-half-FPN"]

MODELS: dict[ModelName, Callable[[], ModelConfig]] = dict(
    zip(
        get_args(ModelName),
        (model.R50_FPN, model.R101_FPN, model.R50_C4, model.R18_FPN, model.R18_half_FPN),
        strict=True,
    )
)


@dataclass(frozen=True, kw_only=True)
class StartingNetwork:
    """What is trained, before its first step."""

    network: Network
    config: ModelConfig
    recipe: Recipe
    categories: dict[int, str]
    """Names by class index."""
    how: str
    """In words."""


def starting_network(
    *,
    name: ModelName,
    init: str | None,
    categories: Mapping[int, str],
    changes: Mapping[str, object],
    recipe_changes: Mapping[str, object],
    seed: int,
) -> StartingNetwork:
    """A network for the `categories` of a dataset (names by their COCO id), with `changes` of its config.

    Raises:
        ConfigError: there are no such weights, or the changes do not fit.
    """
    names = dict(enumerate(categories.values(), 1))
    if init is None:
        config = _changed(replace(MODELS[name](), num_classes=len(names) + 1), changes)
        return _fresh(config, _changed_recipe(Recipe(roi_aligned=True), recipe_changes), names, seed, f"{name}, new")
    source = init if init in weights.NAMES else _bytes_of(init)
    try:
        loaded = model.load(source, name=init)
    except ValueError as error:
        return _on_body(name, source, names, changes, recipe_changes, seed, init, error)
    config = _changed(loaded.config, changes)
    recipe = _changed_recipe(loaded.recipe, recipe_changes)
    if set(names.values()) <= set(loaded.categories.values()):
        how = f"all of {init}, which has these categories"
        return _with_weights(loaded.network, config, recipe, loaded.categories, seed, how, predictors=True)
    config = replace(config, num_classes=len(names) + 1)
    how = f"{init} without its predictors, which have other categories"
    return _with_weights(loaded.network, config, recipe, names, seed, how, predictors=False)


def _fresh(config: ModelConfig, recipe: Recipe, names: dict[int, str], seed: int, how: str) -> StartingNetwork:
    network = build_network(config, recipe)
    initialise(network, seed)
    return StartingNetwork(network=network, config=config, recipe=recipe, categories=names, how=how)


def _on_body(
    name: ModelName,
    source: str | bytes,
    names: dict[int, str],
    changes: Mapping[str, object],
    recipe_changes: Mapping[str, object],
    seed: int,
    init: str,
    reason: ValueError,
) -> StartingNetwork:
    config = _changed(replace(MODELS[name](), num_classes=len(names) + 1), {"norm": "frozen", **changes})
    recipe = _changed_recipe(Recipe(roi_aligned=True), recipe_changes)
    start = _fresh(config, recipe, names, seed, f"{name} on the body of {init}")
    try:
        weights.load_body(start.network, source)
    except ValueError as error:
        raise ConfigError(f"--init {init} is neither weights to fine-tune ({reason}) nor a body ({error})") from error
    return start


def _with_weights(
    trained: Network,
    config: ModelConfig,
    recipe: Recipe,
    names: dict[int, str],
    seed: int,
    how: str,
    *,
    predictors: bool,
) -> StartingNetwork:
    """A network of `config` with the tensors of `trained` for the parts that both have; of its predictors only if they
    are for these classes."""
    start = _fresh(config, recipe, names, seed, how)
    left_out = () if predictors else tuple(layer for layer in STD_BY_LAYER if not layer.startswith("rpn."))
    tensors = {key: value for key, value in trained.tensors().items() if not key.startswith(left_out or ("\0",))}
    own = start.network.tensors()
    parts = {key.split(".")[0] for key in own}
    tensors = {key: value for key, value in tensors.items() if key.split(".")[0] in parts}
    misfits = [key for key, value in tensors.items() if key not in own or own[key].shape != value.shape]
    if misfits:
        raise ConfigError(f"{how}: {len(misfits)} tensors do not fit the changed network (first: {misfits[0]})")
    with torch.no_grad():
        for key, value in tensors.items():
            own[key].copy_(value)
    return start


def _changed(config: ModelConfig, changes: Mapping[str, object]) -> ModelConfig:
    try:
        return replace(config, **changes)  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _changed_recipe(recipe: Recipe, changes: Mapping[str, object]) -> Recipe:
    try:
        return replace(recipe, **changes)  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _bytes_of(init: str) -> bytes:
    try:
        return storage.read_bytes(init)
    except OSError as error:
        raise ConfigError(f"cannot read --init {storage.public_uri(init)}: {error}") from error
