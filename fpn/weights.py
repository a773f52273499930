"""Weights into a model: from a checkpoint file, or torchvision's ImageNet weights by name."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from fpn._freezing import freeze
from fpn._report import Report
from fpn.checkpoints.content import find_state_dict
from fpn.checkpoints.description import describe_images, describe_trunk
from fpn.checkpoints.errors import CheckpointError
from fpn.checkpoints.files import read_checkpoint, read_file
from fpn.checkpoints.imagenet import imagenet_checkpoint
from fpn.checkpoints.input_channels import adapt_channels
from fpn.checkpoints.namings import Names
from fpn.checkpoints.recognition import beside_trunk, match_all, statistics_folded_in, the_one_naming
from fpn.checkpoints.relatives import refuse_hidden_relatives
from fpn.checkpoints.transfer import load_matched, transfer
from fpn.levels import P6P7
from fpn.resnet import Bottleneck

__all__ = ["CheckpointError", "Report", "freeze", "load_weights", "read_checkpoint", "transfer"]

logger = logging.getLogger(__name__)


def load_weights(
    model: nn.Module,
    weights: str | Path | Mapping[str, Tensor],
    variant: str,
    key: str | None = None,
    in_channels: int | None = None,
) -> Report:
    """Loads weights into an FPN; a classifier's weights go into its `bottom_up`.

    The source is recognised as `fpn.from_checkpoint` recognises it, with the same names for the same entries. The model
    stays what it is: a checkpoint of a pyramid must have all of the model's entries, extra levels included.

    Args:
        model: an `fpn.FPN` over a trunk of `fpn.resnet`.
        weights: a name of torchvision's ImageNet weights ("IMAGENET1K_V1", "IMAGENET1K_V2", "DEFAULT"), the path of a
            checkpoint file, or what such a file holds.
        variant: the trunk's name in `fpn.resnet.VARIANTS`.
        key: which of several models in a file, as `read_checkpoint` takes it.
        in_channels: as `fpn.from_checkpoint` takes it.

    Returns:
        The report. Entries that belong neither to the model nor to a known head are warned about.

    Raises:
        ValueError: there are no ImageNet weights of that name.
        OSError: the file is not there, or cannot be downloaded.
        CheckpointError: the file cannot be read, its source is not known, or an entry of the model is missing or of
            another shape; the model is as it was.
    """
    if isinstance(weights, Mapping):
        source, content = "the state dict", find_state_dict(weights, key)
    else:
        path = imagenet_checkpoint(variant, str(weights)) if is_name(weights) else Path(weights)
        source, content = str(path), read_file(path, key)
    state = content.state
    refuse_hidden_relatives(content.told, None if isinstance(weights, Mapping) else path)
    names = the_one_naming(state)
    if in_channels is not None:
        state = adapt_channels(state, names, in_channels)
    if names.naming.affine:
        state |= statistics_folded_in(state, names)
    if beside := beside_trunk(state, names):
        state = {name: value for name, value in state.items() if name not in set(beside)}
        warn(f"{source} has entries that are not of the trunk, and were not loaded: {some(beside)}")
    try:
        report = match_all(model.state_dict(), state, names)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}. fpn.from_checkpoint builds the model that it describes") from error
    load_matched(model, state, report)
    entries = {ours: value for name, value in state.items() if (ours := names.ours(name)) is not None}
    trunk = describe_trunk(entries, names.naming, None, 1e-5)
    preprocessing = describe_images(names.naming, trunk) if trunk["in_channels"] == 3 else None
    model.preprocessing = preprocessing  # type: ignore[assignment]
    images = (str(preprocessing),) if preprocessing else ()
    report = replace(report, notes=(f"from {names.naming.source}", *images, *content.notes))
    if unlike := differences(model, state, names):
        warn(f"{source} is from {names.naming.source}, whose models usually have {', '.join(unlike)}")
    logger.info("%s: %s", source, report)
    return report


def differences(model: nn.Module, state: Mapping[str, Tensor], names: Names) -> list[str]:
    """Options that no entry shows and that the usual models of the checkpoint's source have otherwise."""
    entries = {ours: value for name, value in state.items() if (ours := names.ours(name)) is not None}
    usual = {"stride_in_1x1": describe_trunk(entries, names.naming, None, 1e-5)["stride_in_1x1"]}
    blocks = [block for block in model.get_submodule("bottom_up").modules() if isinstance(block, Bottleneck)]
    own: dict[str, object] = {"stride_in_1x1": any(block.conv1.stride != (1, 1) for block in blocks)}
    if names.naming.upsample is not None:
        usual["upsample"], own["upsample"] = names.naming.upsample, model.upsample
    extra = model.get_submodule("extra")
    if isinstance(extra, P6P7):
        usual["relu"], own["relu"] = names.naming.relu, extra.relu
    return [f"{option}={value!r} (here {own[option]!r})" for option, value in usual.items() if value != own[option]]


def warn(message: str) -> None:
    """A warning at the line that called `FPN50` or the like."""
    warnings.warn(message, stacklevel=5)


def some(names: Sequence[str]) -> str:
    """The first five of some names."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def is_name(weights: str | Path) -> bool:
    """Whether it is a name of ImageNet weights, and not the path of a file."""
    return str(weights) == "DEFAULT" or str(weights).startswith("IMAGENET")
