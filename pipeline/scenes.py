"""Drawn scenes with exact masks: for the demo, the benchmarks, the tests and small trainings. NumPy and Pillow only.

A scene is textured shapes of several sizes that overlap and throw shadows on a textured ground. The mask of a shape is
the part of it that is seen; a shape is never hidden further than to two fifths, so that nothing drawn lacks a label.
"""

from __future__ import annotations

import json
import math
import tarfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from pycocotools import mask as coco_mask

from model.structures import ImageSize

CATEGORIES: tuple[str, ...] = ("disc", "square", "triangle", "star", "ring")
"""In the order of their ids, which start at 1: 0 is the background."""

ARCHIVE_SIZES: tuple[ImageSize, ...] = (
    ImageSize(360, 480),
    ImageSize(480, 360),
    ImageSize(320, 320),
    ImageSize(427, 640),
    ImageSize(240, 426),
)
"""What the images of an archive measure, in turn."""

_PALETTES = [  # two colours of the ground, six of the shapes
    np.array([[int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)] for colour in palette.split()], dtype=np.float32)
    for palette in (
        "f4ede0 d9cbb4 d1495b edae49 00798c 30638e 003d5b 66a182",
        "22333b 3d5a6c f2a65a ee6352 59cd90 3fa7d6 fac05e f7f0f5",
        "e8eef2 c3d4de ff6b6b 4ecdc4 556270 c44d58 ffb347 5f4b8b",
        "2d2a32 4a4458 ddd92a eae151 ff7b9c 7bdff2 b2f7ef f7a072",
        "dfe8d8 b6c9a8 bc4b51 f4a259 5b8e7d 8cb369 2e4057 e07a5f",
        "f7e7e1 e3c5bb 6a4c93 1982c4 8ac926 ff595e ffca3a 264653",
    )
]
_RADII = [(0.17, 0.27), (0.09, 0.16), (0.05, 0.085)]  # large, medium and small, of the shorter side
_TRIES = 8  # places a shape is tried at
_LEAST_SEEN = 0.4  # of a shape, whatever hides it
_OVERSAMPLING = 4
_MARGIN = 1.4  # of a patch around its shape, for the shadow


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A picture and what is to be found in it, D instances from the rearmost to the foremost."""

    image: NDArray[np.uint8]
    """(H, W, 3) RGB."""
    masks: NDArray[np.bool_]
    """(D, H, W) the seen part of each; no pixel belongs to two."""
    category_ids: NDArray[np.int64]
    """(D,) 1 + the index in CATEGORIES."""


def draw_scene(seed: int, size: ImageSize) -> Scene:
    """The same scene for the same seed and size."""
    rng = np.random.default_rng(seed)
    ground, colours = np.split(_PALETTES[rng.integers(len(_PALETTES))], [2])
    canvas = _ground(rng, size, ground)  # (3, H, W) 0..1, colour by colour, which NumPy adds up fastest
    owner = np.full(size, -1, dtype=np.int16)  # (H, W) the instance seen at a pixel
    areas: list[int] = []
    category_ids: list[int] = []
    for radius in _radii(rng, size):
        for _ in range(_TRIES):
            category_id = int(rng.integers(1, len(CATEGORIES) + 1))
            angle = rng.uniform(0, 2 * np.pi)
            alpha = _silhouette(CATEGORIES[category_id - 1], radius, angle)  # (S, S) 0..1
            window = _place(rng, size, len(alpha))
            mask = alpha[window.in_patch] >= 0.5
            if _may_lie(mask, alpha, owner[window.in_canvas], owner, areas):
                owner[window.in_canvas][mask] = len(areas)
                areas.append(int(mask.sum()))
                category_ids.append(category_id)
                _paint(rng, canvas, window, alpha, radius, angle, colours)
                break
    canvas += 0.012 * rng.standard_normal(size, dtype=np.float32)
    masks = owner[None] == np.arange(len(areas), dtype=np.int16)[:, None, None]  # (D, H, W)
    return Scene(
        image=np.ascontiguousarray((np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)),
        masks=masks,
        category_ids=np.array(category_ids, dtype=np.int64),
    )


def write_archive(folder: Path, *, num_images: int, seed: int, num_in_tar: int | None = None, scale: int = 1) -> Path:
    """JPEGs, loose in folders but for the last ones, by default a third, which ``scenes.tar`` holds; the path of their
    COCO annotations. Their sides are those of ARCHIVE_SIZES times `scale`.

    A ``file_name`` is what follows the folder's URI in the image_key: ``loose/00/scene_00000.jpg`` or
    ``scenes.tar#scene_00042.jpg``. Beside each image in the tar lies its ``.json``, as WebDataset has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    num_loose = num_images - (num_images // 3 if num_in_tar is None else num_in_tar)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    with tarfile.open(folder / "scenes.tar", "w") if num_loose < num_images else nullcontext() as tar:
        for index in range(num_images):
            name = f"scene_{index:05d}.jpg"
            scene_seed = int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
            height, width = ARCHIVE_SIZES[index % len(ARCHIVE_SIZES)]
            size = ImageSize(scale * height, scale * width)
            scene = draw_scene(scene_seed, size)
            buffer = BytesIO()
            Image.fromarray(scene.image).save(buffer, "JPEG", quality=90)
            image: dict[str, Any] = {"id": index + 1, "height": size.height, "width": size.width, "seed": scene_seed}
            if index < num_loose:
                image["file_name"] = f"loose/{index // 100:02d}/{name}"
                path = folder / str(image["file_name"])
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(buffer.getvalue())
            elif tar is not None:
                image["file_name"] = f"scenes.tar#{name}"
                _add_member(tar, name, buffer.getvalue())
                _add_member(tar, name.replace(".jpg", ".json"), json.dumps(image).encode())
            images.append(image)
            annotations += _annotate(scene, index + 1, len(annotations) + 1)
    categories = [{"id": index, "name": name, "supercategory": "shape"} for index, name in enumerate(CATEGORIES, 1)]
    path = folder / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # of 1970 and of nobody, so that equal archives are equal files
    member.size = len(data)
    tar.addfile(member, BytesIO(data))


def _annotate(scene: Scene, image_id: int, first_id: int) -> Iterator[dict[str, Any]]:
    rles = coco_mask.encode(np.asfortranarray(scene.masks.transpose(1, 2, 0).astype(np.uint8)))
    for index, (rle, category_id) in enumerate(zip(rles, scene.category_ids, strict=True)):
        yield {
            "id": first_id + index,
            "image_id": image_id,
            "category_id": int(category_id),
            "bbox": coco_mask.toBbox(rle).tolist(),
            "area": int(coco_mask.area(rle)),
            "iscrowd": 0,
            "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
        }


class _Window(NamedTuple):
    """Where a square patch meets the canvas."""

    in_canvas: tuple[slice, slice]
    in_patch: tuple[slice, slice]


def _place(rng: Generator, size: ImageSize, side: int) -> _Window:
    starts = [int(rng.uniform(0, length) - side / 2) for length in size]
    pairs = [(max(start, 0), min(start + side, length), start) for start, length in zip(starts, size, strict=True)]
    (top, bottom, y), (left, right, x) = pairs
    return _Window((slice(top, bottom), slice(left, right)), (slice(top - y, bottom - y), slice(left - x, right - x)))


def _may_lie(
    mask: NDArray[np.bool_],
    alpha: NDArray[np.float32],
    owner_in_window: NDArray[np.int16],
    owner: NDArray[np.int16],
    areas: list[int],
) -> bool:
    """Enough of the shape lies in the image, and enough of every other one stays to be seen."""
    if mask.sum() < 0.55 * (alpha >= 0.5).sum():
        return False
    hidden = np.bincount(owner_in_window[mask] + 1, minlength=len(areas) + 1)[1:]
    if not hidden.any():
        return True
    seen = np.bincount(owner.ravel() + 1, minlength=len(areas) + 1)[1:]
    return bool((seen - hidden >= _LEAST_SEEN * np.array(areas)).all())


def _radii(rng: Generator, size: ImageSize) -> list[float]:
    """In pixels, roughly from large to small: a small shape behind a large one would never be seen."""
    counts = (rng.integers(1, 4), rng.integers(3, 7), rng.integers(3, 8))
    shares = [rng.uniform(*bounds) for bounds, count in zip(_RADII, counts, strict=True) for _ in range(count)]
    return [min(size) * share for share in sorted(shares, key=lambda share: -share * rng.uniform(0.6, 1.6))]


def _silhouette(category: str, radius: float, angle: float) -> NDArray[np.float32]:
    """(S, S) the share of each pixel that the shape covers."""
    half = math.ceil(radius * _MARGIN) + 2
    patch = Image.new("L", (2 * half * _OVERSAMPLING,) * 2)
    draw, middle, reach = ImageDraw.Draw(patch), half * _OVERSAMPLING, radius * _OVERSAMPLING
    if category in ("disc", "ring"):
        draw.circle((middle, middle), reach * 0.95, fill=255)
        if category == "ring":
            draw.circle((middle, middle), reach * 0.5, fill=0)
    else:
        radii = {"square": [1.0] * 4, "triangle": [1.08] * 3, "star": [1.12, 0.5] * 5}[category]
        turns = angle + 2 * np.pi * np.arange(len(radii)) / len(radii)
        corners = middle + reach * np.array(radii)[:, None] * np.stack([np.cos(turns), np.sin(turns)], axis=1)
        draw.polygon([(x, y) for x, y in corners.tolist()], fill=255)
    return np.asarray(patch.reduce(_OVERSAMPLING), dtype=np.float32) / np.float32(255)


def _paint(
    rng: Generator,
    canvas: NDArray[np.float32],
    window: _Window,
    alpha: NDArray[np.float32],
    radius: float,
    angle: float,
    colours: NDArray[np.float32],
) -> None:
    """Lay the shape's shadow and then its texture over the canvas."""
    offset = max(1, round(radius * 0.13))
    blurred = Image.fromarray((alpha * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius * 0.11))
    shadow = np.roll(np.asarray(blurred, dtype=np.float32) / 255, (offset, offset), axis=(0, 1))  # (S, S)
    base, other = colours[rng.permutation(len(colours))[:2]]
    if rng.random() < 0.6:
        other = base + (rng.integers(2).astype(np.float32) - base) * 0.35  # a tint or shade of the same colour
    axis = (np.arange(len(alpha), dtype=np.float32) - (len(alpha) - 1) / 2) / radius
    y, x = axis[:, None], axis[None, :]
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    light = 1 - 0.17 * (x + y) - 0.1 * (x * x + y * y)  # from the upper left
    pattern = _pattern(rng, u, v)
    seen = canvas[:, *window.in_canvas]  # (3, …), a view
    seen *= 1 - 0.5 * shadow[window.in_patch]
    texture = (base[:, None, None] + (other - base)[:, None, None] * pattern) * light  # (3, S, S)
    seen += alpha[window.in_patch] * (texture[:, *window.in_patch] - seen)


def _pattern(rng: Generator, u: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.float32]:
    """(S, S) 0..1 over the shape's own axes, which run from -1 to 1 within it."""
    pitch = rng.uniform(2.5, 5.5) * np.pi
    waves: NDArray[np.float32]
    match rng.integers(6):
        case 0:
            waves = np.sin(pitch * u)
        case 1:
            waves = np.sin(pitch * u) * np.sin(pitch * v)
        case 2:
            waves = np.sin(pitch * np.hypot(u, v))
        case 3:
            waves = np.sin(pitch * u) + np.sin(pitch * v) - 0.9
        case 4:
            return _clouds(rng, ImageSize(*u.shape), 7)
        case _:
            waves = 0.2 * u
    pattern: NDArray[np.float32] = np.clip(0.5 + 2.5 * waves, 0, 1)  # crisp, but not jagged
    return pattern


def _clouds(rng: Generator, size: ImageSize, detail: int) -> NDArray[np.float32]:
    """(H, W) 0..1, smooth noise of about ``detail`` blobs a side."""
    noise = Image.fromarray(rng.random((detail, detail), dtype=np.float32))
    clouds: NDArray[np.float32] = np.asarray(noise.resize((size.width, size.height), Image.Resampling.BICUBIC))
    return clouds.clip(0, 1)


def _ground(rng: Generator, size: ImageSize, colours: NDArray[np.float32]) -> NDArray[np.float32]:
    """(3, H, W) a slope from one colour to the other, clouds, and at times faint stripes."""
    y = np.linspace(-1, 1, size.height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, size.width, dtype=np.float32)[None, :] * size.width / size.height
    angle = rng.uniform(0, 2 * np.pi)
    along = x * math.cos(angle) + y * math.sin(angle)
    blend = 0.5 + 0.3 * along + 0.7 * (_clouds(rng, size, 6) - 0.5) + 0.25 * (_clouds(rng, size, 40) - 0.5)
    if rng.random() < 0.5:
        blend += 0.12 * np.sin(rng.uniform(12, 30) * (y * math.cos(angle) - x * math.sin(angle)))
    first, second = colours[:, :, None, None]  # (3, 1, 1) each
    ground: NDArray[np.float32] = first + (second - first) * np.clip(blend, 0, 1)
    return ground
