"""torchvision's ImageNet weights: their names, their files, and the download."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import torch

from fpn.checkpoints.errors import CheckpointError

logger = logging.getLogger(__name__)

IMAGENET_URL = "https://download.pytorch.org/models/"

# torchvision's names and files; a name's last eight digits are the start of the file's SHA-256.
IMAGENET_FILES = {
    "resnet18": {"IMAGENET1K_V1": "resnet18-f37072fd.pth"},
    "resnet34": {"IMAGENET1K_V1": "resnet34-b627a593.pth"},
    "resnet50": {"IMAGENET1K_V1": "resnet50-0676ba61.pth", "IMAGENET1K_V2": "resnet50-11ad3fa6.pth"},
    "resnet101": {"IMAGENET1K_V1": "resnet101-63fe2227.pth", "IMAGENET1K_V2": "resnet101-cd907fc2.pth"},
    "resnet152": {"IMAGENET1K_V1": "resnet152-394f9c45.pth", "IMAGENET1K_V2": "resnet152-f82ba261.pth"},
    "resnext50_32x4d": {
        "IMAGENET1K_V1": "resnext50_32x4d-7cdf4587.pth",
        "IMAGENET1K_V2": "resnext50_32x4d-1a0047aa.pth",
    },
    "resnext101_32x8d": {
        "IMAGENET1K_V1": "resnext101_32x8d-8ba56ff5.pth",
        "IMAGENET1K_V2": "resnext101_32x8d-110c445d.pth",
    },
    "resnext101_64x4d": {"IMAGENET1K_V1": "resnext101_64x4d-173b62eb.pth"},
    "wide_resnet50_2": {
        "IMAGENET1K_V1": "wide_resnet50_2-95faca4d.pth",
        "IMAGENET1K_V2": "wide_resnet50_2-9ba9bcbe.pth",
    },
    "wide_resnet101_2": {
        "IMAGENET1K_V1": "wide_resnet101_2-32ee1156.pth",
        "IMAGENET1K_V2": "wide_resnet101_2-d733dc28.pth",
    },
}


def imagenet_checkpoint(variant: str, name: str) -> Path:
    """The file of torchvision's ImageNet weights for one of `fpn.resnet.VARIANTS`, downloaded on first use.

    Args:
        variant: e.g. "resnet50".
        name: "IMAGENET1K_V1", "IMAGENET1K_V2" or "DEFAULT", the best there is.

    Returns:
        Its path in torch's cache folder (`torch.hub.get_dir()`/checkpoints), the hash checked.

    Raises:
        ValueError: there are no weights of that name.
        OSError: the download failed; the message says what to put where.
        CheckpointError: the file in the cache is not the one of that name.
    """
    files = IMAGENET_FILES[variant]
    if name != "DEFAULT" and name not in files:
        raise ValueError(f"no weights {name!r} for {variant}; there are {', '.join(files)} and DEFAULT")
    filename = files[max(files) if name == "DEFAULT" else name]
    digest = filename.rpartition("-")[2].removesuffix(".pth")
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / filename
    if not path.exists():
        url = IMAGENET_URL + filename
        try:
            folder.mkdir(parents=True, exist_ok=True)
            logger.info("downloading %s to %s", url, path)
            torch.hub.download_url_to_file(url, os.path.realpath(path), hash_prefix=digest, progress=True)
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"cannot download the weights {filename} ({error}): fetch {url} yourself and put it into {folder}"
            ) from error
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if not found.startswith(digest):
        raise CheckpointError(f"{path} is damaged: its SHA-256 starts with {found[:8]}, not {digest}; delete it")
    return path
