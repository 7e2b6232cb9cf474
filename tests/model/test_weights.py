from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_fpn

import model
from model import MaskRCNN, coco_download
from tests.model.conftest import drawn_image


@pytest.fixture(scope="module")
def saved(small_net: MaskRCNN, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    model.save(small_net, path)
    return path


def _rewritten(path: Path, tensors: dict[str, Tensor], **changes: Any) -> bytes:
    """The file with other tensors and changed entries of its document."""
    contents = path.read_bytes()
    header = json.loads(contents[8 : 8 + int.from_bytes(contents[:8], "little")])
    document = {**json.loads(header["__metadata__"]["maskline"]), **changes}
    return bytes(safetensors.torch.save(tensors, {"maskline": json.dumps(document)}))


def test_save_and_load_are_bit_for_bit(small_net: MaskRCNN, saved: Path) -> None:
    loaded = model.load(saved)
    assert (loaded.config, loaded.recipe, loaded.categories) == (
        small_net.config,
        small_net.recipe,
        small_net.categories,
    )
    mine, theirs = small_net.network.tensors(), loaded.network.tensors()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    image = drawn_image(100, 140)
    (before,), (after,) = small_net.predict([image]), loaded.predict([image])
    assert before.masks == after.masks
    assert np.array_equal(before.boxes, after.boxes)


def test_names_and_hashes(small_net: MaskRCNN, saved: Path) -> None:
    contents = saved.read_bytes()
    sha256 = hashlib.sha256(contents).hexdigest()
    assert model.load(saved).sha256 == model.load(contents).sha256 == sha256
    assert small_net.sha256 == sha256
    assert model.load(str(saved)).name == "small.safetensors"
    assert model.load(contents).name == f"weights-{sha256[:12]}"
    assert model.load(contents, name="s3://bucket/small").name == "s3://bucket/small"


def test_description_is_what_load_loads(small_net: MaskRCNN, saved: Path) -> None:
    info = model.describe(saved)
    assert (info.name, info.sha256) == ("small.safetensors", small_net.sha256)
    assert (info.config, info.recipe) == (small_net.config, small_net.recipe)
    assert info.categories == {1: "class 1", 2: "class 2", 3: "class 3", 4: "class 4"}


def test_norms_are_saved_unfolded(saved: Path) -> None:
    names = set(safetensors.torch.load_file(saved))
    assert {"body.stem.conv.weight", "body.stem.norm.running_var", "rpn.objectness.bias"} <= names
    assert not any("num_batches" in name for name in names)


def test_faults_are_named_key_by_key(saved: Path) -> None:
    tensors = safetensors.torch.load_file(saved)
    tensors["rpn.objectness.bias"] = torch.zeros(4)
    tensors["mask_head.convs.0.conv.bias"][0] = torch.nan
    tensors["extra"] = torch.zeros(1)
    del tensors["box_head.fcs.1.weight"]
    del tensors["box_head.fcs.1.bias"]
    with pytest.raises(ValueError, match="do not fit") as caught:
        model.describe(_rewritten(saved, tensors))
    message = str(caught.value)
    assert "2 missing (first: box_head.fcs.1.weight, box_head.fcs.1.bias)" in message
    assert "1 unexpected (first: extra)" in message
    assert "1 misshapen (first: rpn.objectness.bias is torch.float32 (4,), not float (3,))" in message
    assert "1 not finite (first: mask_head.convs.0.conv.bias)" in message
    assert "model.save" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 1}, "format 1, this maskline reads 2"),
        ({"categories": {"1": "cat"}}, "1 categories.*classes 1 to 4"),
        ({"recipe": {"channels": "RGB"}}, r"Recipe fields do not match: missing \[\], unknown \['channels'\]"),
        ({"config": {}}, r"ModelConfig fields do not match: missing \['body', 'num_classes'\]"),
        ({"config": []}, "metadata"),
        ({"categories": None}, "metadata"),
    ],
)
def test_documents_that_do_not_fit_are_refused(saved: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.describe(_rewritten(saved, safetensors.torch.load_file(saved), **changes))


def test_files_that_are_no_weights_are_refused(saved: Path, tmp_path: Path) -> None:
    foreign = safetensors.torch.save({"x": torch.zeros(1)}, {"format": "pt"})
    pickled = io.BytesIO()
    torch.save({"model": {"x": torch.zeros(1)}, "epoch": 3}, pickled)
    objects = io.BytesIO()
    torch.save({"x": Path("x")}, objects)
    named = io.BytesIO()
    torch.save({"encoder.weight": torch.zeros(1)}, named)
    for contents, message in (
        (foreign, "without maskline's metadata"),
        (saved.read_bytes()[:1000], "not a whole safetensors file"),
        (b"", "hold no tensors|cut short"),
        (b"<html>404</html>", "hold no tensors|cut short"),
        (pickled.getvalue(), r"keys model, epoch.*state_dict\(\) alone"),
        (objects.getvalue(), "could run code"),
        (objects.getvalue()[:100], "hold no tensors|cut short"),
        (named.getvalue(), "names are not those of an R-CNN"),
    ):
        with pytest.raises(ValueError, match=message):
            model.describe(contents)
    with pytest.raises(ValueError, match=r"cannot read weights.*none\.pth.*or one of the names coco, demo, nuclei"):
        model.load(tmp_path / "none.pth")
    with pytest.raises(ValueError, match="cannot read weights"):
        model.load(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_cut_anywhere_is_refused(zipped: bool) -> None:
    file = io.BytesIO()
    names = ("backbone.a", "rpn.head.b", "roi_heads.c")
    torch.save({name: torch.zeros(3) for name in names}, file, _use_new_zipfile_serialization=zipped)
    contents = file.getvalue()
    for length in range(0, len(contents), 7):
        with pytest.raises(ValueError, match="weights"):
            model.describe(contents[:length])


class _Offline:
    def __call__(self, url: str, path: str, prefix: str, *, progress: bool) -> None:
        raise URLError("no route to host")


class _Online:
    """Delivers some bytes as the file."""

    def __init__(self, contents: bytes) -> None:
        self.contents = contents

    def __call__(self, url: str, path: str, prefix: str, *, progress: bool) -> None:
        Path(path).write_bytes(self.contents)


def test_coco_offline_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", _Offline())
    with pytest.raises(ValueError, match=r"maskrcnn_resnet50_fpn_v2.*on a machine that is online and give its path"):
        model.load("coco")


def test_coco_that_is_damaged_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", _Online(b"half a file"))
    with pytest.raises(ValueError, match=r"is damaged.*delete it"):
        model.load("coco")


def test_coco_is_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    contents = saved.read_bytes()
    prefix = hashlib.sha256(contents).hexdigest()[:8]
    monkeypatch.setattr(coco_download, "_url", lambda: f"scheme:/elsewhere/some_coco-{prefix}.pth")
    monkeypatch.setattr(torch.hub, "download_url_to_file", _Online(contents))
    assert model.describe("coco").name == "coco"
    monkeypatch.setattr(torch.hub, "download_url_to_file", _Offline())
    assert model.describe("coco").sha256 == hashlib.sha256(contents).hexdigest()


def test_another_network_of_torchvision_is_refused_in_its_own_names() -> None:
    with torch.device("meta"):
        theirs = fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None)
    file = io.BytesIO()
    torch.save({name: torch.zeros(value.shape) for name, value in theirs.state_dict().items()}, file)
    with pytest.raises(ValueError, match=r"missing \(first: backbone\.body\.conv1\.weight"):
        model.describe(file.getvalue())


def test_wider_or_narrower_floats_are_brought_to_float32(small_net: MaskRCNN, saved: Path) -> None:
    tensors = {name: value.to(torch.float64) for name, value in safetensors.torch.load_file(saved).items()}
    loaded = model.load(_rewritten(saved, tensors))
    assert {value.dtype for value in loaded.network.tensors().values()} == {torch.float32}
    assert loaded.config == small_net.config


class _RunsACommand:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("kind", ["pkl", "pth", "legacy pth"])
def test_a_file_that_would_run_a_command_is_refused_and_runs_nothing(kind: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    contents = {"model": {"backbone.bottom_up.stem.conv1.weight": _RunsACommand(canary)}}
    path = tmp_path / f"weights.{kind.rsplit(maxsplit=1)[-1]}"
    if kind == "pkl":
        path.write_bytes(pickle.dumps(contents))
    else:
        torch.save(contents, path, _use_new_zipfile_serialization=kind == "pth")
    with pytest.raises(ValueError, match=r"weights\.\w+.*(posix|os)\W+system"):
        model.load(path)
    assert not canary.exists()
    pickle.loads(pickle.dumps(_RunsACommand(canary)))  # the trap does spring where it may
    assert canary.exists()
