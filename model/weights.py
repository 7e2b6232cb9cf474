"""Reading and writing weight files: ours (safetensors), torchvision's and detectron2's, recognised by their contents.

A file is checked name by name and shape by shape before anything is computed. Nothing in a file is ever executed.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from model import detectron2_weights, torchvision_weights
from model.array_pickle import load_arrays
from model.coco_download import download
from model.config import ModelConfig
from model.mask_rcnn import MaskRCNN
from model.network import Network, Precision, build_network
from model.recipe import Recipe

Source = str | Path | bytes
"""A path, the contents of a file, or a name: `coco`, or one of those shipped."""

SHIPPED = ("demo", "nuclei")
"""Weights that come with this package, by name."""
NAMES = ("coco", *SHIPPED)
"""What `load` takes besides files."""

# What torch.load raises over files that were cut or altered, found by cutting and altering some.
_DAMAGED = (RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, AssertionError, struct.error)

# torch.save wrote pickles until it wrote zips, this number first.
_FIRST_TORCH_FORMAT = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

_Given = TypeVar("_Given")
_Result = TypeVar("_Result")

_METADATA_KEY = "maskline"
_FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class WeightsInfo:
    """What a weight file says about itself."""

    name: str
    """The file's name, or `coco`."""
    sha256: str
    """Of the file's bytes, hexadecimal."""
    config: ModelConfig
    recipe: Recipe
    categories: dict[int, str]
    """Name of each class but the background, by the index the network gives it."""


def load(
    source: Source,
    device: str | torch.device = "cpu",
    precision: Precision = "fp32",
    *,
    exact: bool = False,
    name: str | None = None,
) -> MaskRCNN:
    """A network ready to run from a weight file; ValueError if the file does not fit. For `exact` see `MaskRCNN`."""
    info, tensors = _read(source, name)
    with torch.device("meta"):
        network = build_network(info.config, info.recipe)
    network.load_state_dict(tensors, assign=True)
    return MaskRCNN(
        network,
        config=info.config,
        recipe=info.recipe,
        categories=info.categories,
        name=info.name,
        sha256=info.sha256,
        device=device,
        precision=precision,
        exact=exact,
    )


def describe(source: Source, *, name: str | None = None) -> WeightsInfo:
    """What `load` would load, checked as fully, without building it."""
    return _read(source, name)[0]


def load_body(network: Network, source: Source) -> None:
    """Give the network's body, and its res5, the weights of one of torchvision's ResNets trained on ImageNet.

    Raises:
        ValueError: they are of another ResNet, or the file is no such weights.
    """
    contents, path = _open(source)
    name = path.name if path else "of the body"
    loaded = _unpickle(contents, name)
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"weights {name} hold a {type(loaded).__name__}, not a ResNet's tensors by name")
    tensors = _named(name, lambda values: torchvision_weights.body_tensors(values, network), loaded)
    network.load_state_dict(tensors, strict=False)


def save(net: MaskRCNN, path: str | Path) -> None:
    """Write the network, its norms not folded, as a file that `load` reads back bit for bit."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(to_bytes(net.network, net.config, net.recipe, net.categories))
    partial.replace(path)


def to_bytes(
    network: Network, config: ModelConfig, recipe: Recipe, categories: Mapping[int, str], *, half: bool = False
) -> bytes:
    """The contents of the file that `save` writes; equal networks give equal bytes.

    `half` keeps the weights of convolutions and linear layers in float16: half the bytes, and no longer bit for bit.
    """
    document = {
        "format": _FORMAT,
        "config": config.to_json(),
        "recipe": recipe.to_json(),
        "categories": {str(index): name for index, name in sorted(categories.items())},
    }
    tensors = {
        name: value.detach().to("cpu", torch.float16 if half and value.dim() > 1 else torch.float32).contiguous()
        for name, value in network.tensors().items()
    }
    # one key of metadata: safetensors keeps several in no particular order
    return bytes(safetensors.torch.save(tensors, {_METADATA_KEY: json.dumps(document, sort_keys=True)}))


def _read(source: Source, name: str | None) -> tuple[WeightsInfo, dict[str, Tensor]]:
    """The checked contents of a weight file under our names."""
    if source == "coco":
        name, source = name or "coco", download()
    if source in SHIPPED:
        name, source = name or str(source), Path(__file__).parent / "shipped" / f"{source}.safetensors"
    contents, path = _open(source)
    sha256 = hashlib.sha256(contents).hexdigest()
    name = name or (path.name if path else f"weights-{sha256[:12]}")
    if contents[8:9] == b"{":
        return _read_ours(contents, name, sha256)
    return _read_foreign(contents, name, sha256)


def _open(source: Source) -> tuple[bytes, Path | None]:
    if isinstance(source, bytes):
        return source, None
    path = Path(source)
    try:
        return path.read_bytes(), path
    except OSError as error:
        raise ValueError(
            f"cannot read weights {str(source)!r}: {error.strerror or error}; "
            f"give a .safetensors, .pth or .pkl file, or one of the names {', '.join(NAMES)}"
        ) from error


def _read_ours(contents: bytes, name: str, sha256: str) -> tuple[WeightsInfo, dict[str, Tensor]]:
    try:
        tensors = safetensors.torch.load(contents)
    except safetensors.SafetensorError as error:
        raise ValueError(f"weights {name} are not a whole safetensors file: {error}; copy the file again") from error
    header = json.loads(contents[8 : 8 + int.from_bytes(contents[:8], "little")])
    document = _our_document(header, name)
    try:
        config, recipe = ModelConfig.from_json(document["config"]), Recipe.from_json(document["recipe"])
        categories = {int(index): str(category) for index, category in document["categories"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"weights {name} have metadata that does not fit: {error}") from error
    if set(categories) != set(range(1, config.num_classes)):
        raise ValueError(
            f"weights {name} name {len(categories)} categories; the network has the classes 1 to "
            f"{config.num_classes - 1}, each of which needs a name; write the file again with model.save"
        )
    expected = _shapes(config, recipe)
    _check_tensors(tensors, expected, name)
    info = WeightsInfo(name=name, sha256=sha256, config=config, recipe=recipe, categories=categories)
    return info, {key: tensors[key].float() for key in expected}


def _our_document(header: Mapping[str, Any], name: str) -> dict[str, Any]:
    text = header.get("__metadata__", {}).get(_METADATA_KEY)
    if text is None:
        raise ValueError(f"weights {name} are safetensors without maskline's metadata; write them with model.save")
    document = json.loads(text)
    version = document.get("format") if isinstance(document, dict) else None
    if version != _FORMAT:
        raise ValueError(
            f"weights {name} have format {version!r}, this maskline reads {_FORMAT}; "
            "use the version that wrote them, or write them again"
        )
    return dict(document)


def _read_foreign(contents: bytes, name: str, sha256: str) -> tuple[WeightsInfo, dict[str, Tensor]]:
    loaded = _unpickle(contents, name)
    tensors = _named(name, detectron2_weights.state_dict, loaded)
    if tensors is not None:
        return _read_detectron2(tensors, name, sha256)
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        keys = f" with the keys {', '.join(map(str, loaded))[:200]}" if isinstance(loaded, dict) else ""
        raise ValueError(
            f"weights {name} hold a {type(loaded).__name__}{keys}, not tensors by name; "
            "save the network's state_dict() alone"
        )
    if not torchvision_weights.is_torchvision(loaded):
        raise ValueError(
            f"weights {name} have {len(loaded)} tensors whose names are not those of an R-CNN of torchvision or "
            f"detectron2 (first: {', '.join(list(loaded)[:3])}); give a Mask, Keypoint or Faster R-CNN"
        )
    return _read_torchvision(loaded, name, sha256)


def _read_torchvision(loaded: dict[str, Tensor], name: str, sha256: str) -> tuple[WeightsInfo, dict[str, Tensor]]:
    config, recipe = torchvision_weights.recognise(loaded)
    tensors = torchvision_weights.current_names(loaded)
    shapes = _shapes(config, recipe)
    theirs = {ours: torchvision_weights.torchvision_name(ours, config) for ours in shapes}
    _check_tensors(tensors, {theirs[ours]: shape for ours, shape in shapes.items()}, name)
    categories = torchvision_weights.categories(config)
    info = WeightsInfo(name=name, sha256=sha256, config=config, recipe=recipe, categories=categories)
    return info, {ours: tensors[theirs[ours]].float() for ours in shapes}


def _read_detectron2(loaded: dict[str, Tensor], name: str, sha256: str) -> tuple[WeightsInfo, dict[str, Tensor]]:
    config, recipe = _named(name, detectron2_weights.recognise, loaded)
    tensors = detectron2_weights.parameters(loaded)
    shapes = _shapes(config, recipe)
    theirs = {ours: detectron2_weights.detectron2_name(ours, config) for ours in shapes}
    wanted = {theirs[ours]: detectron2_weights.detectron2_shape(ours, shape, config) for ours, shape in shapes.items()}
    _check_tensors(tensors, wanted, name)
    categories = detectron2_weights.categories(config)
    info = WeightsInfo(name=name, sha256=sha256, config=config, recipe=recipe, categories=categories)
    return info, {ours: detectron2_weights.our_tensor(ours, tensors[theirs[ours]].float(), config) for ours in shapes}


def _unpickle(contents: bytes, name: str) -> object:
    """What torch.save wrote, or a pickle of arrays as detectron2's `.pkl` is. Nothing in either is run."""
    if contents[:1] == b"\x80" and not contents.startswith(_FIRST_TORCH_FORMAT):
        return _named(name, load_arrays, contents)
    try:
        return torch.load(io.BytesIO(contents), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        found = f"hold {refused[1]}, which is not loaded because it could run code" if refused else "hold no tensors"
        raise ValueError(f"weights {name} {found}; save the network's state_dict() alone") from error
    except _DAMAGED as error:
        raise ValueError(f"weights {name} are cut short or damaged: {error}; copy the file again") from error


def _named(name: str, step: Callable[[_Given], _Result], given: _Given) -> _Result:
    """The step's result; its errors say which file they are about."""
    try:
        return step(given)
    except ValueError as error:
        raise ValueError(f"weights {name}: {error}") from error


def _shapes(config: ModelConfig, recipe: Recipe) -> dict[str, torch.Size]:
    with torch.device("meta"):
        network = build_network(config, recipe)
    return {name: value.shape for name, value in network.tensors().items()}


def _check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, torch.Size], name: str) -> None:
    """Raise ValueError unless exactly the expected tensors are there, in their shapes, with finite floats."""
    missing = [key for key in expected if key not in tensors]
    unexpected = [key for key in tensors if key not in expected]
    misshapen = [
        f"{key} is {tensors[key].dtype} {tuple(tensors[key].shape)}, not float {tuple(shape)}"
        for key, shape in expected.items()
        if key in tensors and (tensors[key].shape != shape or not tensors[key].is_floating_point())
    ]
    not_finite = [key for key in expected if key in tensors and not torch.isfinite(tensors[key]).all()]
    kinds = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen, "not finite": not_finite}
    faults = [f"{len(keys)} {kind} (first: {', '.join(keys[:3])})" for kind, keys in kinds.items() if keys]
    if faults:
        raise ValueError(
            f"weights {name} do not fit, of {len(expected)} tensors: {'; '.join(faults)}; give a whole Mask, Keypoint "
            "or Faster R-CNN of torchvision or detectron2, or a file that model.save wrote"
        )
