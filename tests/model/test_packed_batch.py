"""Batches packed and laid out, against `collate`, which resizes before they travel."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from torch import Tensor

from model import R18_FPN, ModelConfig, Recipe
from model.ground_truth import GroundTruth, TrainingBatch, collate
from model.mask_targets import PackedMasks
from model.packed_batch import PackedBatch, pack
from model.structures import ImageSize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = R18_FPN(num_classes=4, min_size=20, max_size=40)


def _image(size: tuple[int, int], num_objects: int, seed: int) -> tuple[np.typing.NDArray[np.uint8], GroundTruth]:
    generator = np.random.default_rng(seed)
    height, width = size
    corners = generator.uniform(0, 0.5, (num_objects, 2)) * (width, height)
    boxes = np.hstack([corners, corners + 1.0])
    truth = GroundTruth(
        boxes=torch.tensor(boxes, dtype=torch.float32),
        labels=torch.tensor(generator.integers(1, 4, num_objects), dtype=torch.int64),
        masks=torch.tensor(generator.random((num_objects, height, width)) < 0.5, dtype=torch.uint8),
        crowd_boxes=torch.tensor([[0.0, 0.0, 3.0, 2.0]]) if seed % 2 else None,
    )
    return generator.integers(0, 256, (height, width, 3), dtype=np.uint8), truth


def _assert_same(found: TrainingBatch, expected: TrainingBatch) -> None:
    for field in fields(TrainingBatch):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if field.name == "pixels":
            torch.testing.assert_close(one.cpu(), other, rtol=0, atol=2e-5)
        elif field.name == "masks":
            one = one.bitmaps if isinstance(one, PackedMasks) else one
            assert len(one) == len(other)
            assert all(torch.equal(mine.cpu(), theirs) for mine, theirs in zip(one, other, strict=True))
        elif isinstance(other, Tensor):
            assert torch.equal(one.cpu(), other), field.name
        else:
            assert one == other, field.name


@pytest.mark.gpu
def test_a_packed_batch_of_photographs_size_too() -> None:
    _check([((300, 400), 7), ((411, 233), 0), ((480, 640), 31)])


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.tuples(st.integers(1, 24), st.integers(1, 24)), st.integers(0, 3)), min_size=1, max_size=3)
)
def test_a_packed_batch_is_laid_out_as_collate_does_it(images: list[tuple[tuple[int, int], int]]) -> None:
    _check(images)


def _check(images: list[tuple[tuple[int, int], int]]) -> None:
    pixels, truths = zip(*(_image(size, count, seed) for seed, (size, count) in enumerate(images)), strict=True)
    to_sizes = [ImageSize(height + 5, max(1, width - 3)) for (height, width), _ in images]
    options = {"config": CONFIG, "recipe": Recipe(), "to_sizes": to_sizes, "seeds": list(range(len(images)))}
    packed = pack(pixels, truths, **options)  # type: ignore[arg-type]
    _assert_same(packed.to(DEVICE), collate(pixels, truths, **options))  # type: ignore[arg-type]


def _packed(pixels: np.typing.NDArray[np.uint8], truth: GroundTruth, config: ModelConfig = CONFIG) -> PackedBatch:
    packed = pack([pixels], [truth], config=config, recipe=Recipe())
    assert isinstance(packed, PackedBatch)
    return packed


def test_a_batch_by_hand() -> None:
    masks = torch.tensor([[[1, 0, 0, 1]], [[0, 1, 1, 1]], [[1, 1, 1, 1]]], dtype=torch.uint8)  # (3, 1, 4)
    pixels = np.arange(12, dtype=np.uint8).reshape(1, 4, 3)
    truth = GroundTruth(boxes=torch.zeros(3, 4), labels=torch.ones(3, dtype=torch.int64), masks=masks)
    packed = _packed(pixels, truth)
    assert packed.pixel_bytes.tolist() == list(range(12))
    assert packed.mask_bits is not None
    assert packed.mask_bits.tolist() == [0b10010111, 0b11110000]


def test_run_lengths_are_packed_as_the_bitmaps_they_are_of() -> None:
    pixels, truth = _image((9, 13), 3, 1)
    assert isinstance(truth.masks, Tensor)
    encoded = replace(truth, masks=coco_mask.encode(np.asfortranarray(truth.masks.numpy().transpose(1, 2, 0))))
    of_bitmaps, of_runs = (_packed(pixels, one).mask_bits for one in (truth, encoded))
    assert of_bitmaps is not None
    assert of_runs is not None
    assert torch.equal(of_bitmaps, of_runs)


def test_without_a_mask_head_no_masks_travel() -> None:
    pixels, truth = _image((9, 13), 3, 1)
    packed = _packed(pixels, truth, replace(CONFIG, mask_head="none"))
    assert packed.mask_bits is None
    assert packed.to(DEVICE).masks is None


def test_images_far_larger_than_the_input_travel_resized() -> None:
    pixels, truth = _image((90, 130), 2, 1)  # into 32×40: 35,100 bytes, as floats 15,360
    options = {"config": CONFIG, "recipe": Recipe()}
    batch = pack([pixels], [truth], **options)  # type: ignore[arg-type]
    assert isinstance(batch, TrainingBatch)
    _assert_same(batch, collate([pixels], [truth], **options))  # type: ignore[arg-type]


def test_masks_that_do_not_fit_are_refused() -> None:
    pixels, truth = _image((9, 13), 1, 1)
    with pytest.raises(ValueError, match="masks must have the size of their image"):
        _packed(pixels, replace(truth, masks=torch.zeros(1, 13, 9, dtype=torch.uint8)))
    with pytest.raises(ValueError, match="polygons; use collate"):
        _packed(pixels, replace(truth, masks=[[np.zeros((3, 2))]]))
    assert _packed(pixels, _image((9, 13), 0, 1)[1]).num_objects == [0]
