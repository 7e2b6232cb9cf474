"""maskline draw: scenes with exact masks as a COCO dataset, to train on and to try things with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from jobs.command import run
from pipeline.errors import ConfigError
from pipeline.scenes import write_archive


@dataclass(frozen=True, kw_only=True)
class DrawConfig:
    """Draw scenes of discs, squares, triangles, stars and rings, with their masks in instances.json."""

    folder: tyro.conf.Positional[str]
    """Where the images go, as loose JPEGs; a local folder that does not exist yet."""
    num_images: int = 1_000
    """How many."""
    seed: int = 0
    """The same seed draws the same scenes, another one others."""
    scale: int = 1
    """Their sides, a few hundred pixels, times this."""

    def __post_init__(self) -> None:
        for name, bound in (("num_images", 1), ("seed", 0), ("scale", 1)):
            if getattr(self, name) < bound:
                raise ConfigError(f"{name} must be at least {bound}, got {getattr(self, name)}")


def main(config: DrawConfig) -> None:
    """The command."""
    folder = Path(config.folder)
    if folder.exists():
        raise ConfigError(f"{folder} exists already; give a new folder")
    annotations = write_archive(
        folder, num_images=config.num_images, num_in_tar=0, seed=config.seed, scale=config.scale
    )
    print(f"{config.num_images} scenes: {annotations}")


if __name__ == "__main__":
    run("draw", DrawConfig, main)
