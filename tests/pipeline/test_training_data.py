"""Batches for training, from drawn scenes on a local disk or, for one test, in memory."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from model import R18_FPN, Recipe
from model.ground_truth import TrainingBatch
from model.initial_weights import initialise
from model.losses import LossConfig
from model.mask_targets import PackedMasks
from model.network import build_network
from model.packed_batch import PackedBatch
from model.training import TrainingForward
from pipeline import storage
from pipeline.augment import AugmentConfig
from pipeline.batch_sampler import Sample
from pipeline.coco import CocoDataset, read_coco
from pipeline.scenes import CATEGORIES, write_archive
from pipeline.training_data import LoadedBatch, Loading, Part, TrainingImages, load_ahead, val_share, with_objects

SMALL = replace(
    R18_FPN(num_classes=1 + len(CATEGORIES), min_size=64, max_size=96),
    body_width=32,
    norm="group",  # no statistics of a batch, in which an unreadable image would count
    fpn_channels=32,
    anchor_sizes=(8, 16, 32, 64, 128),
    box_head_width=32,
    mask_channels=32,
)
LOSSES = LossConfig(rpn_pre_nms=50, rpn_post_nms=30, box_samples=32)
EVERYTHING = AugmentConfig(
    quarter_turns=True, min_sizes=(48, 64), scales=(0.8, 1.4), crop=72, brightness=0.3, contrast=0.3, saturation=0.3
)
LARGE: dict[str, Any] = {
    "config": replace(SMALL, min_size=200, max_size=300),
    "augment": AugmentConfig(quarter_turns=True, scales=(0.8, 1.1), crop=250, brightness=0.3),
}
"""Images of 360×480 are packed if the input is at least a quarter as large."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As loaders have: with two, interpolation and colours are summed in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_archive(folder, num_images=15, seed=5)
    return folder


@pytest.fixture(scope="session")
def dataset(folder: Path) -> CocoDataset:
    """The ten loose images; those of the tar are no files."""
    whole = read_coco(str(folder / "instances.json"))
    return replace(whole, images=[image for image in whole.images if "#" not in image.file_name])


def images_of(dataset: CocoDataset, folder: Path | str, cache: Path, **changes: Any) -> TrainingImages:
    loading = Loading(
        folder=str(folder),
        labels={category_id: category_id for category_id in dataset.categories},
        config=SMALL,
        recipe=Recipe(),
        augment=EVERYTHING,
        seed=11,
        cache_folder=str(cache),
        cache_bytes=10**7,
    )
    return TrainingImages(dataset, replace(loading, **changes))


def parts(
    images: TrainingImages, count: int, *, start: int = 0, rank: int = 0, num_workers: int = 1, accumulate: int = 1
) -> list[Part]:
    """The first parts of batches of four."""
    stream = images.parts(batch_size=4, start=start, rank=rank, num_workers=num_workers, accumulate=accumulate)
    return list(itertools.islice(stream, count))


def laid_out(loaded: LoadedBatch) -> TrainingBatch:
    return loaded.batch.to(torch.device("cpu"))


def by_image(batches: list[LoadedBatch]) -> list[dict[str, Any]]:
    """What the batches hold of each image, without the places that other images of its batch have left empty."""
    found = []
    for loaded in batches:
        batch = laid_out(loaded)
        assert batch.seeds is not None
        masks = batch.masks.bitmaps if isinstance(batch.masks, PackedMasks) else batch.masks
        assert masks is not None
        found += [
            {
                "file_name": loaded.file_names[index],
                "seed": batch.seeds[index],
                "pixels": batch.pixels[index],
                "size": batch.image_sizes[index],
                "boxes": batch.gt_boxes[index][batch.gt_valid[index]],
                "labels": batch.gt_labels[index][batch.gt_valid[index]],
                "crowds": batch.crowd_boxes[index][batch.crowd_valid[index]],
                "masks": masks[index],
            }
            for index in range(len(batch.pixels))
        ]
    return found


def assert_same(found: list[LoadedBatch], expected: list[LoadedBatch]) -> None:
    """The same images, bit for bit and in the same order, however they are cut into batches."""
    mine, theirs = by_image(found), by_image(expected)
    assert [one["file_name"] for one in mine] == [other["file_name"] for other in theirs]
    for one, other in zip(mine, theirs, strict=True):
        for name, value in other.items():
            if isinstance(value, Tensor):
                assert torch.equal(one[name], value), (one["file_name"], name)
            else:
                assert one[name] == value, (one["file_name"], name)


# ------------------------------------------------------------------------------------------------------------ sharing


def test_batches_of_two_workers_together_are_those_of_one(dataset: CocoDataset, folder: Path, tmp_path: Path) -> None:
    images = images_of(dataset, folder, tmp_path)
    whole = [images[part] for part in parts(images, 5)]
    halves = [parts(images, 5, rank=rank, num_workers=2) for rank in range(2)]
    together = [images[part] for step in zip(*halves, strict=True) for part in step]
    assert [len(loaded.file_names) for loaded in together] == [2] * 10
    assert_same(together, whole)  # of the same padding, as whole inputs are compared
    assert sum(int(laid_out(loaded).gt_valid.sum()) for loaded in whole) > 50
    seeds = [one["seed"] for one in by_image(whole)]
    assert len(set(seeds)) == 20


def test_shares_that_are_not_even_cover_the_batch_too(dataset: CocoDataset, folder: Path, tmp_path: Path) -> None:
    images = images_of(dataset, folder, tmp_path)
    for whole, *shares in zip(
        parts(images, 4), *(parts(images, 4, rank=rank, num_workers=3) for rank in range(3)), strict=True
    ):
        assert [sample for part in shares for sample in part.samples] == whole.samples
        assert sorted(len(part.samples) for part in shares) == [1, 1, 2]
        assert {part.padded for part in shares} == {whole.padded}


@pytest.mark.parametrize(("num_workers", "accumulate"), [(1, 2), (2, 2), (1, 4), (1, 3), (4, 1)])
def test_accumulated_parts_cover_the_batch(
    dataset: CocoDataset, folder: Path, tmp_path: Path, num_workers: int, accumulate: int
) -> None:
    images = images_of(dataset, folder, tmp_path)
    of_workers = [
        parts(images, 3 * accumulate, rank=rank, num_workers=num_workers, accumulate=accumulate)
        for rank in range(num_workers)
    ]
    turns = list(zip(*of_workers, strict=True))
    for step, whole in enumerate(parts(images, 3)):
        own = turns[step * accumulate : (step + 1) * accumulate]
        assert [sample for turn in own for part in turn for sample in part.samples] == whole.samples
        assert all(len({part.padded for part in turn}) == 1 for turn in own)  # of all that are computed at a time
        largest = [max(turn[0].padded[side] for turn in own) for side in (0, 1)]
        assert largest == list(whole.padded)


def test_accumulated_batches_hold_what_the_whole_one_does(dataset: CocoDataset, folder: Path, tmp_path: Path) -> None:
    images = images_of(dataset, folder, tmp_path, augment=AugmentConfig())
    (whole,) = (images[part] for part in parts(images, 1))
    found = by_image([images[part] for part in parts(images, 2, accumulate=2)])
    for one, other in zip(found, by_image([whole]), strict=True):
        height, width = (int(side) for side in other["size"])
        assert torch.equal(one["pixels"][:, :height, :width], other["pixels"][:, :height, :width])
        assert torch.equal(one["boxes"], other["boxes"])
        assert one["seed"] == other["seed"]


# --------------------------------------------------------------------------------------------------------- resumption


@pytest.mark.parametrize("start", [1, 2, 3, 7])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_stream_begun_at_a_step_is_the_rest_of_the_stream(
    dataset: CocoDataset, folder: Path, tmp_path: Path, start: int, accumulate: int
) -> None:
    images = images_of(dataset, folder, tmp_path)
    whole = parts(images, 10 * accumulate, rank=1, num_workers=2, accumulate=accumulate)
    count = (10 - start) * accumulate
    assert parts(images, count, start=start, rank=1, num_workers=2, accumulate=accumulate) == whole[-count:]


def test_a_resumed_run_loads_what_it_would_have_loaded(dataset: CocoDataset, folder: Path, tmp_path: Path) -> None:
    """By another object, in whose process nothing has been drawn before."""
    images = images_of(dataset, folder, tmp_path)
    whole = [images[part] for part in parts(images, 4)]
    torch.manual_seed(99)
    again = images_of(dataset, folder, tmp_path)
    assert_same([again[part] for part in parts(again, 1, start=3)], whole[3:])


def test_packed_batches_are_those_that_are_laid_out_before(dataset: CocoDataset, folder: Path, tmp_path: Path) -> None:
    images, packing = (images_of(dataset, folder, tmp_path, packed=packed, **LARGE) for packed in (False, True))
    for part in parts(images, 2):
        assert isinstance(packing[part].batch, PackedBatch)
        one, other = by_image([images[part]]), by_image([packing[part]])
        for mine, theirs in zip(one, other, strict=True):
            torch.testing.assert_close(mine.pop("pixels"), theirs.pop("pixels"), rtol=0, atol=5e-5)
            assert all(torch.equal(mine[name], theirs[name]) for name in ("size", "boxes", "labels", "crowds", "masks"))
            assert (mine["file_name"], mine["seed"]) == (theirs["file_name"], theirs["seed"])


def test_an_image_is_changed_otherwise_in_another_epoch_and_by_another_seed(
    dataset: CocoDataset, folder: Path, tmp_path: Path
) -> None:
    images = images_of(dataset, folder, tmp_path)
    other_seed = images_of(dataset, folder, tmp_path, seed=12)
    (part,) = parts(images, 1)
    later = Part([Sample(sample.epoch + 1, sample.index) for sample in part.samples], part.padded)
    first, epoch, seed = images[part], images[later], other_seed[part]
    for other in (epoch, seed):
        assert other.file_names == first.file_names
        assert laid_out(other).seeds != laid_out(first).seeds
        assert not torch.equal(laid_out(other).image_sizes, laid_out(first).image_sizes)


@pytest.mark.parametrize(("processes", "packed"), [(0, False), (1, False), (1, True)])
def test_loading_ahead_changes_nothing(
    dataset: CocoDataset, folder: Path, tmp_path: Path, processes: int, packed: bool
) -> None:
    images = images_of(dataset, folder, tmp_path, packed=packed, **(LARGE if packed else {}))
    count = 1 if packed else 5  # laid out by interpreted kernels
    expected = [images[part] for part in parts(images, count)]
    endless = images.parts(batch_size=4, start=0, rank=0, num_workers=1, accumulate=1)
    loaded = list(itertools.islice(load_ahead(images, endless, processes), count))
    assert all(isinstance(one.batch, PackedBatch if packed else TrainingBatch) for one in loaded)
    assert_same(loaded, expected)
    assert [one.unreadable for one in loaded] == [[]] * count


# --------------------------------------------------------------------------------------------------- unreadable images


def damage(path: Path, how: str) -> str:
    """Make an image unreadable; what will be said of it."""
    if how == "missing":
        path.unlink()
        return "missing"
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:2_000])
        return "truncated"
    if how == "foreign":
        path.write_bytes(b"<html>404</html>")
        return "un"  # readable or supported
    data = BytesIO()
    Image.new("RGB", (50, 40)).save(data, "JPEG")
    path.write_bytes(data.getvalue())
    return "ImageSize(height=40, width=50)"


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """The images, to be damaged."""
    return Path(shutil.copytree(folder / "loose", tmp_path / "copied" / "loose")).parent


def losses_of(batch: TrainingBatch) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Losses and gradients."""
    network = build_network(SMALL, Recipe())
    initialise(network, seed=0)
    losses = TrainingForward(network, config=SMALL, recipe=Recipe(), losses=LOSSES)(batch)
    torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    gradients = {name: one.grad for name, one in network.named_parameters() if one.grad is not None}
    assert len(gradients) == len(list(network.parameters()))
    return {name: loss.item() for name, loss in losses.items()}, gradients


@pytest.mark.parametrize("how", ["missing", "truncated", "foreign", "other size"])
def test_an_unreadable_image_is_named_and_costs_nothing_else(
    dataset: CocoDataset, copied: Path, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    images = images_of(dataset, copied, tmp_path)
    (part,) = parts(images, 1)
    before = by_image([images[part]])
    name = before[2]["file_name"]
    reason = damage(copied / name, how)
    after = images[part]
    (error,) = after.unreadable
    assert error.startswith(f"{name}: ")
    assert reason in error
    assert name in caplog.text
    found = by_image([after])
    for index in (0, 1, 3):
        assert all(torch.equal(found[index][key], before[index][key]) for key in ("pixels", "boxes", "labels", "masks"))
    assert len(found[2]["boxes"]) == len(found[2]["masks"]) == 0
    assert torch.equal(found[2]["size"], before[2]["size"])


def test_an_unreadable_image_adds_nothing_to_losses_or_gradients(
    dataset: CocoDataset, copied: Path, tmp_path: Path
) -> None:
    images = images_of(dataset, copied, tmp_path)
    (part,) = parts(images, 1)
    damage(copied / images.image(part.samples[1].index).file_name, "truncated")
    good = images[Part(part.samples[:1], part.padded)]
    both = images[Part(part.samples[:2], part.padded)]
    assert (len(good.unreadable), len(both.unreadable)) == (0, 1)
    losses, gradients = losses_of(laid_out(both))
    expected, expected_gradients = losses_of(laid_out(good))
    assert losses == pytest.approx(expected, rel=1e-5)
    assert all(loss > 0 for loss in expected.values())
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).norm() <= 1e-3 * gradient.norm(), name  # another batch, other roundings


def test_a_batch_of_unreadable_images_alone_has_no_loss_and_no_gradient(
    dataset: CocoDataset, copied: Path, tmp_path: Path
) -> None:
    """It may be all that one of several workers has."""
    images = images_of(dataset, copied, tmp_path)
    (part,) = parts(images, 1)
    for sample in part.samples:
        damage(copied / images.image(sample.index).file_name, "missing")
    loaded = images[part]
    assert len(loaded.unreadable) == 4
    losses, gradients = losses_of(laid_out(loaded))
    assert set(losses) == {"rpn_objectness", "rpn_box", "class", "box", "mask"}
    assert set(losses.values()) == {0.0}
    assert not any(gradient.any() for gradient in gradients.values())


def test_an_image_that_an_object_store_lacks_is_missing(
    dataset: CocoDataset, folder: Path, memory_root: str, tmp_path: Path
) -> None:
    images = images_of(dataset, memory_root, tmp_path / "cache")
    (part,) = parts(images, 1)
    names = [images.image(sample.index).file_name for sample in part.samples]
    for name in names[1:]:
        storage.write_bytes(storage.join(memory_root, name), (folder / name).read_bytes())
    (error,) = images[part].unreadable
    assert error.startswith(f"{names[0]}: missing")
    assert len(list((tmp_path / "cache").iterdir())) == 3


# ------------------------------------------------------------------------------------------------------------- choice


def test_images_without_objects_to_learn_are_left_out(dataset: CocoDataset) -> None:
    first, second, third = dataset.images[:3]
    crowds = tuple(replace(one, is_crowd=True) for one in second.annotations)
    odd = [replace(first, annotations=()), replace(second, annotations=crowds), third]
    mixed = replace(dataset.images[3], annotations=(*crowds, *dataset.images[3].annotations))
    assert with_objects(replace(dataset, images=[*odd, mixed])).images == [third, mixed]


@pytest.mark.parametrize("num_workers", [1, 2, 3, 20])
def test_each_image_is_evaluated_by_one_worker(dataset: CocoDataset, num_workers: int) -> None:
    shares = [val_share(dataset.images, rank, num_workers) for rank in range(num_workers)]
    assert sorted(image.image_id for own in shares for image in own) == [image.image_id for image in dataset.images]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_images_are_those_of_the_dataset(dataset: CocoDataset, folder: Path, tmp_path: Path) -> None:
    images = images_of(dataset, folder, tmp_path)
    assert len(images) == len(dataset.images) == 10
    assert [images.image(index) for index in range(10)] == dataset.images
