"""What a network is trained on: a COCO dataset and the place of its images enter, batches leave in the run's order.

Each batch is read, decoded and changed by a process of its own while earlier ones are trained on. All that is random
of an image is drawn from (seed, epoch, image), so a batch is the same whichever worker makes it, and when.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from model.config import ModelConfig
from model.ground_truth import GroundTruth, TrainingBatch, collate
from model.packed_batch import PackedBatch, pack
from model.recipe import Recipe
from model.structures import ImageSize
from model.transform import common_size
from pipeline import augment, decode, storage
from pipeline.augment import AugmentConfig, Geometry
from pipeline.batch_sampler import Sample, batches, share
from pipeline.coco import CocoDataset, CocoImage
from pipeline.coco_ground_truth import ground_truth
from pipeline.errors import DecodeError
from pipeline.image_cache import ImageCache

logger = logging.getLogger(__name__)

_EVERYWHERE = torch.tensor([[-1e5, -1e5, 1e5, 1e5]])


class Part(NamedTuple):
    """What one worker does of one batch."""

    samples: list[Sample]
    padded: ImageSize
    """The input size of the whole batch."""


class LoadedBatch(NamedTuple):
    """A batch and where it comes from."""

    batch: TrainingBatch | PackedBatch
    file_names: list[str]
    unreadable: list[str]
    """Those that could not be decoded and why; they are in the batch as images of which nothing is learnt."""


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How images become a batch."""

    folder: str
    """What file names are relative to: a folder or a URI."""
    labels: dict[int, int]
    """Class index of each category id."""
    config: ModelConfig
    recipe: Recipe
    augment: AugmentConfig
    seed: int
    cache_folder: str
    cache_bytes: int
    flip_pairs: tuple[tuple[int, int], ...] = ()
    packed: bool = False
    """Whether batches leave packed, for a GPU to lay out."""


class TrainingImages(Dataset[LoadedBatch]):
    """The images of a dataset, by parts of batches."""

    def __init__(self, dataset: CocoDataset, loading: Loading) -> None:
        self.loading = loading
        self.sizes = np.array([image.size for image in dataset.images], dtype=np.int64).reshape(-1, 2)
        # One block of bytes: a million small objects would be copied into every loader by their reference counts.
        pickled = [pickle.dumps(image) for image in dataset.images]
        self._ends = np.cumsum([len(one) for one in pickled])
        self._pickled = np.frombuffer(b"".join(pickled), dtype=np.uint8)
        self.cache = ImageCache(loading.cache_folder, loading.cache_bytes)

    def __len__(self) -> int:
        return len(self.sizes)

    def image(self, index: int) -> CocoImage:
        start = self._ends[index - 1] if index else 0
        image: CocoImage = pickle.loads(self._pickled[start : self._ends[index]].tobytes())
        return image

    def parts(self, *, batch_size: int, start: int, rank: int, num_workers: int, accumulate: int) -> Iterator[Part]:
        """One worker's parts of all batches from number `start` on, `accumulate` of them to a batch."""
        for whole in batches(self.sizes, batch_size=batch_size, seed=self.loading.seed, start=start):
            for turn in range(accumulate):
                together = share(whole, turn, accumulate)
                sizes = [self._geometry(sample).to_size for sample in together]
                padded = common_size(sizes, divisor=self.loading.recipe.size_divisor)
                yield Part(share(together, rank, num_workers), padded)

    def __getitem__(self, part: Part) -> LoadedBatch:
        loaded = [self._load(sample) for sample in part.samples]
        make: Callable[..., TrainingBatch | PackedBatch] = pack if self.loading.packed else collate
        return LoadedBatch(
            make(
                [pixels for pixels, _, _ in loaded],
                [truth for _, truth, _ in loaded],
                config=self.loading.config,
                recipe=self.loading.recipe,
                to_sizes=[self._geometry(sample).to_size for sample in part.samples],
                padded=part.padded,
                seeds=[int(self._rng(sample, 3).integers(2**62)) for sample in part.samples],
            ),
            [self.image(sample.index).file_name for sample in part.samples],
            [error for _, _, error in loaded if error],
        )

    def _load(self, sample: Sample) -> tuple[NDArray[np.uint8], GroundTruth, str]:
        """Pixels and objects in the frame of the sample's window; and what is wrong with the image, if anything."""
        image = self.image(sample.index)
        geometry = self._geometry(sample)
        try:
            pixels = read_pixels(image, self.loading.folder, self.cache)
        except DecodeError as error:
            logger.warning("%s is not trained on: %s", image.file_name, error)
            return *self._nothing(geometry), f"{image.file_name}: {error}"
        config = self.loading.config
        truth = ground_truth(
            image, self.loading.labels, with_masks=config.mask_head != "none", num_keypoints=config.num_keypoints
        )
        changed = augment.apply(
            pixels,
            truth,
            geometry,
            config=self.loading.augment,
            rng=self._rng(sample, 2),
            flip_pairs=self.loading.flip_pairs,
        )
        return *changed, ""

    def _nothing(self, geometry: Geometry) -> tuple[NDArray[np.uint8], GroundTruth]:
        """An image that is all crowd: neither objects nor background are learnt from it."""
        y1, x1, y2, x2 = geometry.window
        truth = GroundTruth(
            boxes=torch.zeros(0, 4),
            labels=torch.zeros(0, dtype=torch.int64),
            masks=torch.zeros(0, y2 - y1, x2 - x1, dtype=torch.uint8),
            keypoints=torch.zeros(0, self.loading.config.num_keypoints, 3),
            crowd_boxes=_EVERYWHERE,
        )
        return np.zeros((y2 - y1, x2 - x1, 3), dtype=np.uint8), truth

    def _geometry(self, sample: Sample) -> Geometry:
        config = self.loading.config
        return augment.draw_geometry(
            ImageSize(*self.sizes[sample.index].tolist()),
            config=self.loading.augment,
            min_size=config.min_size,
            max_size=config.max_size,
            rule=self.loading.recipe.resize,
            rng=self._rng(sample, 1),
        )

    def _rng(self, sample: Sample, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.loading.seed, sample.epoch, sample.index, purpose])


def read_pixels(image: CocoImage, folder: str, cache: ImageCache) -> NDArray[np.uint8]:
    """uint8 RGB (H, W, 3) of the size that the annotations say.

    Raises:
        DecodeError: it is not there, cannot be decoded or is of another size.
    """
    try:
        data = cache.read(storage.join(folder, image.file_name))
    except OSError as error:
        if error.errno not in storage.ABSENT:
            raise
        raise DecodeError("missing", f"there is nothing at {image.file_name}") from error
    pixels = decode.decode(data, decode.inspect(data, decode.DecodeLimits()))
    if pixels.shape[:2] != image.size:
        found = ImageSize(*pixels.shape[:2])
        raise DecodeError("unreadable", f"it is {found}, its annotations say {image.size}")
    return pixels


def with_objects(dataset: CocoDataset) -> CocoDataset:
    """Without the images that have no object to learn."""
    kept = [image for image in dataset.images if any(not one.is_crowd for one in image.annotations)]
    return replace(dataset, images=kept)


def load_ahead(images: TrainingImages, parts: Iterator[Part], processes: int) -> Iterator[LoadedBatch]:
    """The batches of parts, in order, made ahead by so many processes; by this one if there are none."""
    options: dict[str, Any] = {}
    if processes:
        # Forked from a process that has threads, a loader could wait for a lock that nobody holds.
        options = {"multiprocessing_context": "forkserver", "prefetch_factor": 2}
    loader = DataLoader(images, batch_size=None, sampler=_Stream(parts), num_workers=processes, **options)
    return iter(loader)


class _Stream:
    """What DataLoader takes for a sampler: an iterable without a length."""

    def __init__(self, parts: Iterator[Part]) -> None:
        self._parts = parts

    def __iter__(self) -> Iterator[Part]:
        return self._parts


def val_share(images: Sequence[CocoImage], rank: int, num_workers: int) -> list[CocoImage]:
    """Every image is one worker's; neighbours, which may be alike in size, go to different ones."""
    return list(images[rank::num_workers])
