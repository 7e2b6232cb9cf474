"""maskline describe: what a weight file holds: its parts with their size and their work, its conventions, its classes.

The file is read and checked as for a run; no network is built in memory.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.command import run
from jobs.network_weights import read_weights
from model import gmacs
from model.network import build_network
from model.structures import ImageSize
from model.transform import padded_size
from model.weights import WeightsInfo
from pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DescribeConfig:
    """Say what a weight file holds, and what an image costs."""

    weights: tyro.conf.Positional[str]
    """A weights file or its URI, or a name: demo, nuclei or coco."""
    height: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Of the input whose multiply-adds are counted, pixels; by default the network's largest landscape input."""
    width: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """The same for its width."""
    json: bool = False
    """Print one JSON object."""

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")


def describe(config: DescribeConfig) -> dict[str, Any]:
    """All that the command says, as JSON has it.

    Raises:
        ConfigError: there is no such file, or it is not weights that this model understands.
    """
    _, info = read_weights(config.weights)
    largest = _largest_input(info)
    size = ImageSize(config.height or largest.height, config.width or largest.width)
    macs = gmacs.count(
        info.config,
        info.recipe,
        size,
        num_proposals=info.recipe.rpn_post_nms,
        num_detections=info.recipe.max_detections,
    )
    return {
        "name": info.name,
        "sha256": info.sha256,
        "input": size._asdict(),
        "num_proposals": info.recipe.rpn_post_nms,
        "num_detections": info.recipe.max_detections,
        "parts": {
            name: {"parameters": parameters, "macs": macs[name]} for name, parameters in _parameters(info).items()
        },
        "config": info.config.to_json(),
        "recipe": info.recipe.to_json(),
        "classes": {str(index): category for index, category in sorted(info.categories.items())},
    }


def _largest_input(info: WeightsInfo) -> ImageSize:
    """With the short side at its length and the long one at its bound, padded."""
    if info.config.square:
        return ImageSize(info.config.max_size, info.config.max_size)
    return padded_size(ImageSize(info.config.min_size, info.config.max_size), divisor=info.recipe.size_divisor)


def _parameters(info: WeightsInfo) -> dict[str, int]:
    """How many each part has; a frozen norm has none."""
    with torch.device("meta"):
        network = build_network(info.config, info.recipe)
    return {
        name: sum(parameter.numel() for parameter in part.parameters())
        for name, part in gmacs.parts_of(network).items()
    }


def main(config: DescribeConfig) -> None:
    """The command: print it."""
    found = describe(config)
    if config.json:
        print(json.dumps(found))
        return
    console = Console()
    console.print(Text(f"{found['name']}, sha256 {found['sha256']}"), soft_wrap=True)
    console.print(_parts_table(found))
    for title in ("config", "recipe"):
        console.print(_table(title, "value", found[title]))
    console.print(_table("class", "name", found["classes"]))


def _parts_table(found: dict[str, Any]) -> Table:
    table = Table("part")
    table.add_column("parameters", justify="right")
    table.add_column("GMAC", justify="right")
    for name, part in found["parts"].items():
        table.add_row(name, f"{part['parameters']:,}", f"{part['macs'] / 1e9:,.3f}")
    table.add_section()
    parameters, macs = (sum(part[key] for part in found["parts"].values()) for key in ("parameters", "macs"))
    table.add_row("all", f"{parameters:,}", f"{macs / 1e9:,.3f}")
    size = found["input"]
    table.caption = (
        f"an input of {size['height']} × {size['width']}, {found['num_proposals']} proposals and "
        f"{found['num_detections']} detections"
    )
    return table


def _table(key: str, value: str, rows: dict[str, Any]) -> Table:
    table = Table(key, value)
    for name, shown in rows.items():
        text = ", ".join(map(str, shown)) if isinstance(shown, list | tuple) else str(shown)
        table.add_row(Text(name), Text(text))  # Text, for rich would read [a] in a name as markup
    return table


if __name__ == "__main__":
    run("describe", DescribeConfig, main)
