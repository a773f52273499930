"""Checkpoints in: ImageNet files, reading, transfer with a report, freezing, parameter groups."""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fpn.files import CheckpointError as CheckpointError
from fpn.files import read_checkpoint as read_checkpoint
from fpn.freezing import freeze as freeze

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

BATCH_NORM_ENTRIES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
NUMBERS = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),  # of counters
)
COUNTER = "num_batches_tracked"  # a counter, not a weight: old checkpoints and frozen batch norm lack it


@dataclass(frozen=True)
class Report:
    """How the entries of a checkpoint meet those of a model.

    Attributes:
        by: "name" or "order".
        matched: name in the model -> name in the checkpoint.
        missing: names of the model that the checkpoint lacks.
        unexpected: names of the checkpoint that the model lacks.
        mismatched: name in the model -> (its shape, the checkpoint's shape).
        notes: what else is to be known of the checkpoint: its source, what its keys cannot tell.
    """

    by: str
    matched: dict[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: dict[str, tuple[torch.Size, torch.Size]]
    notes: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every entry of the model has its counterpart."""
        return not self.missing and not self.mismatched

    def __str__(self) -> str:
        total = len(self.matched) + len(self.missing) + len(self.mismatched)
        lines = [f"{len(self.matched)} of {total} entries matched by {self.by}"]
        shapes = [f"{name} is {tuple(own)}, given {tuple(given)}" for name, (own, given) in self.mismatched.items()]
        for label, names in (("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", shapes)):
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                lines.append(f"{len(names)} {label}: {', '.join(names[:5])}{more}")
        return "; ".join((*lines, *self.notes))


def match(model: Mapping[str, Tensor], checkpoint: Mapping[str, Tensor]) -> Report:
    """Pairs the entries of two state dicts by name, or by order where the names differ but the shapes agree."""
    report = match_by_name(model, checkpoint)
    if report.complete:
        return report
    return match_by_order(model, checkpoint) or report


def match_by_name(model: Mapping[str, Tensor], checkpoint: Mapping[str, Tensor]) -> Report:
    shared = [name for name in model if name in checkpoint]
    return Report(
        by="name",
        matched={name: name for name in shared if model[name].shape == checkpoint[name].shape},
        missing=tuple(name for name in model if name not in checkpoint and not name.endswith(COUNTER)),
        unexpected=tuple(name for name in checkpoint if name not in model),
        mismatched={
            name: (model[name].shape, checkpoint[name].shape)
            for name in shared
            if model[name].shape != checkpoint[name].shape
        },
    )


def match_by_order(model: Mapping[str, Tensor], checkpoint: Mapping[str, Tensor]) -> Report | None:
    """The first entries of `checkpoint` paired with those of `model`, or None where any pair disagrees."""
    for counted in (True, False):
        own = [name for name in model if counted or not name.endswith(COUNTER)]
        given = [name for name in checkpoint if counted or not name.endswith(COUNTER)]
        pairs = dict(zip(own, given, strict=False))
        if len(given) >= len(own) and all(
            model[name].shape == checkpoint[other].shape and same_role(name, other, model)
            for name, other in pairs.items()
        ):
            rest = tuple(name for name in given if name not in set(pairs.values()))
            return Report("order", pairs, missing=(), unexpected=rest, mismatched={})
    return None


def same_role(name: str, other: str, model: Mapping[str, Tensor]) -> bool:
    """Whether the checkpoint's name `other` may stand for the model's `name`.

    Shapes cannot tell a mean from a variance, nor one of two equal layers from the other: where the last word is one
    of batch norm's it has to agree, and a name that the model knows stands for itself.
    """
    word, other_word = name.rpartition(".")[2], other.rpartition(".")[2]
    return (other not in model or other == name) and (other_word not in BATCH_NORM_ENTRIES or other_word == word)


def transfer(module: nn.Module, checkpoint: Mapping[str, Tensor]) -> Report:
    """Loads `checkpoint` into `module`: all of the module's entries, or none.

    Args:
        module: any module; `checkpoint` is matched with its `state_dict()`.
        checkpoint: names -> tensors, in any dtype and on any device; it may hold more than the module.

    Returns:
        What was matched, and what of the checkpoint was left over.

    Raises:
        CheckpointError: an entry of the module is missing or of another shape, and the message is the report; or an
            entry holds NaN or infinity.
    """
    report = match(module.state_dict(), checkpoint)
    if not report.complete:
        raise CheckpointError(f"the checkpoint does not fit {type(module).__name__}: {report}")
    load_matched(module, checkpoint, report)
    return report


def load_matched(module: nn.Module, checkpoint: Mapping[str, Tensor], report: Report) -> None:
    """Loads into `module` what a complete `report` has matched, once every value is found to be a number.

    Raises:
        CheckpointError: an entry holds NaN or infinity, or is no plain tensor in memory, or the module is on the meta
            device and cannot hold it; the module is as it was.
    """
    own = module.state_dict()
    for name in report.matched:
        if own[name].is_meta:
            raise CheckpointError(f"{name} of the model is on the meta device, which holds no numbers to load")
    for name in report.matched.values():
        tensor = checkpoint[name]
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_complex():
            raise CheckpointError(f"the checkpoint's {name} is no plain tensor of real numbers in memory")
        if not name.endswith(COUNTER) and not tensor.is_floating_point():
            raise CheckpointError(f"the checkpoint's {name} must be floating point; got {tensor.dtype}")
        if tensor.dtype not in NUMBERS:
            raise CheckpointError(
                f"the checkpoint's {name} is of {tensor.dtype}; convert it, by its scale if it has one"
            )
        if not tensor.isfinite().all():
            raise CheckpointError(f"the checkpoint's {name} holds NaN or infinity")
    # Not strict, for the counters alone: `complete` has seen to the rest.
    module.load_state_dict({name: checkpoint[other] for name, other in report.matched.items()}, strict=False)


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


def load_weights(model: nn.Module, weights: str | Path, variant: str) -> Report:
    """Loads the weights that `weights` names into an FPN or, where they are a trunk's, into its `bottom_up`.

    Args:
        model: an `fpn.FPN` over a trunk of `fpn.resnet`.
        weights: a name of `imagenet_checkpoint`, or the path of a checkpoint file.
        variant: the trunk's name in `fpn.resnet.VARIANTS`.

    Returns:
        The report. What the checkpoint has beyond the model is warned about, but for a classifier's `fc`.

    Raises:
        ValueError, OSError: as `imagenet_checkpoint`, `read_checkpoint` and `transfer`; the model is as it was.
    """
    name = str(weights)
    is_name = name == "DEFAULT" or name.startswith("IMAGENET")
    path = imagenet_checkpoint(variant, name) if is_name else Path(weights)
    checkpoint = read_checkpoint(path)
    whole = any(entry.startswith("bottom_up.") for entry in checkpoint)
    report = transfer(model if whole else model.get_submodule("bottom_up"), checkpoint)
    logger.info("%s: %s", path, report)
    surplus = [entry for entry in report.unexpected if not entry.startswith("fc.")]
    if surplus:
        warnings.warn(f"{path} has entries that were not loaded: {report}", stacklevel=2)
    return report


def parameter_groups(model: nn.Module, trunk: nn.Module, *, lr: float, trunk_lr: float) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimizer: the trunk at `trunk_lr`, the rest at `lr`, frozen parameters left out.

    Args:
        model: the whole detector, or an `FPN`.
        trunk: the part of it that learns at another rate, e.g. `detector.backbone.bottom_up`.
        lr: learning rate of the rest.
        trunk_lr: learning rate of `trunk`.
    """
    in_trunk = set(trunk.parameters())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if parameter in in_trunk], "lr": trunk_lr},
        {"params": [parameter for parameter in trained if parameter not in in_trunk], "lr": lr},
    ]
