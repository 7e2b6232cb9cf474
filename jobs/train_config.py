"""The options of ``maskline train``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import tyro

from jobs.segment_config import parse_actors
from jobs.starting_network import ModelName
from model.losses import LossConfig
from model.optimiser import OptimiserConfig
from pipeline.augment import AugmentConfig
from pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a network on a COCO dataset, new or from weights, and evaluate it."""

    train_annotations: str
    """COCO JSON, .gz too: a file or URI."""
    train_images: str
    """What its file names are relative to: a folder or URI."""
    output: str
    """Where weights, checkpoints, records and pictures go: a folder or URI that all workers reach."""
    val_annotations: str | None = None
    """The dataset evaluated on; none: no evaluation."""
    val_images: str | None = None
    """What its file names are relative to."""
    init: str | None = None
    """Weights to start from: a Mask, Faster or Keypoint R-CNN's (a file, a URI, or demo, nuclei, coco), or those of
    torchvision's ResNets trained on ImageNet for the body alone."""
    model: ModelName = "R50-FPN"
    """The network, where init does not bring one."""
    norm: Literal["keep", "frozen", "batch", "sync", "group"] = "keep"
    """Of the body; keep is what the model or init has."""
    mask_head: bool = True
    """Without one it is a Faster R-CNN."""
    keypoints: bool = False
    """With a keypoint head, for the categories' keypoints."""
    min_size: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Short side of the input, pixels; by default the model's."""
    max_size: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Bound of its long side."""
    max_detections: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Detections kept for each image, afterwards; by default the recipe's 100."""

    workers: str = "1"
    """N, or MIN:MAX for as many as the cluster has room for at the time."""
    cpus_per_worker: Annotated[float | None, tyro.conf.arg(metavar="N")] = None
    """CPUs a worker asks of Ray and computes with; by default its share."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the workers compute."""
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    """bf16 is autocast: convolutions and products in bfloat16, weights and losses in float32. auto is bf16 on cuda,
    else fp32. fp64, for comparisons on a CPU, keeps roundings so small that they do not come to be seen."""
    deterministic: bool = False
    """On a GPU: algorithms that give the same sums each time, slower."""

    epochs: float = 12.0
    """Times each image is seen."""
    batch_size: int = 16
    """Images of a step, over all workers."""
    accumulate: int = 1
    """Forward passes that share a step, each with its part of the batch: for batches that memory does not hold."""
    seed: int = 0
    """Of everything random. The same seed and number of workers give the same losses."""
    keep_empty: bool = False
    """Whether images without objects are trained on."""
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    evaluate_every: float = 1.0
    """Epochs between evaluations; there is one at the end in any case."""
    checkpoint_every: int = 500
    """Steps between checkpoints; there is one at the end in any case."""
    keep_checkpoints: int = 2
    """How many stay."""
    log_every: int = 20
    """Steps of a printed line."""
    save_half: bool = False
    """Save the weights in half precision: half the file."""
    loader_processes: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Of each worker, that read and change images; by default one for each of its CPUs but one, at most 8; 0: none."""
    cache_folder: str = ""
    """For images of object stores, on each node; by default in the system's temporary folder."""
    cache_gigabytes: float = 50.0
    """Its bound."""

    peer: Literal["none", "torchvision"] = "none"
    """Train torchvision's Mask R-CNN of the same shape with its own losses in place of ours, to compare."""
    resume: bool = False
    """Go on from the newest checkpoint in the output."""
    max_failures: int = 3
    """How often workers may die before the run ends."""
    address: str | None = None
    """A Ray cluster's address; by default RAY_ADDRESS, else a local one is started for the run."""
    json: bool = False
    """Print one JSON object as the last line of standard output."""

    def __post_init__(self) -> None:
        parse_actors(self.workers)
        if (self.val_annotations is None) != (self.val_images is None):
            raise ConfigError("val_annotations and val_images go together; give both, or neither for no evaluation")
        for name in ("batch_size", "accumulate", "checkpoint_every", "keep_checkpoints", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("epochs", "evaluate_every"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("seed", "max_failures", "cache_gigabytes"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        most = self.bounds()[1] * self.accumulate
        if self.batch_size < most:
            raise ConfigError(
                f"batch_size must be at least workers × accumulate, {most}, so that each forward pass has an image; "
                f"got {self.batch_size}"
            )

    def bounds(self) -> tuple[int, int]:
        """Fewest and most workers."""
        low, high = parse_actors(self.workers) or (1, 1)
        return (low, high) if ":" in self.workers else (high, high)

    def curve_settings(self) -> dict[str, Any]:
        """What the losses follow from, besides the data and the starting network."""
        names = ("epochs", "batch_size", "accumulate", "seed", "optimiser", "losses", "augment", "precision")
        return {name: asdict(self)[name] for name in names}
