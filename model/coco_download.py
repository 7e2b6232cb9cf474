"""The weights `coco`: torchvision's maskrcnn_resnet50_fpn_v2, from its own URL."""

from __future__ import annotations

import hashlib
from pathlib import Path
from urllib.error import URLError

import torch


def download() -> Path:
    """The file, in torch's own cache, where it may be already; ValueError says what to do where it cannot be had."""
    url = _url()
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    prefix = path.stem.rpartition("-")[2]  # the first digits of the sha256
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), prefix, progress=False)
    except (URLError, OSError) as error:
        raise ValueError(
            f"cannot download the weights 'coco' from {url}: {error}; download that file on a machine that is online "
            "and give its path instead"
        ) from error
    except RuntimeError as error:
        raise ValueError(f"the weights 'coco' from {url} are not what was published: {error}; try again") from error
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(prefix):
        raise ValueError(f"{path} is damaged: its sha256 does not begin with {prefix}; delete it and try again")
    return path


def _url() -> str:
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_V2_Weights

    return str(MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1.url)
