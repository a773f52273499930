"""What the names and shapes of a checkpoint say about its model: the arguments of `ResNet` and `FPN`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from torch import nn

from fpn.checkpoints.errors import CheckpointError
from fpn.checkpoints.matching import COUNTER
from fpn.checkpoints.namings import Naming
from fpn.checkpoints.recognition import Entries
from fpn.levels import P6P7, ExtraFactory
from fpn.norm import GROUP_NORM_GROUPS, FrozenBatchNorm2d
from fpn.preprocessing import CAFFE, CAFFE_WITH_DEVIATION, IMAGENET, Preprocessing
from fpn.resnet import STAGE_CHANNELS, BasicBlock, Block, Bottleneck

Extra = Literal["maxpool", "p6p7", "p6p7_on_p5"] | ExtraFactory | None


def describe_trunk(entries: Entries, naming: Naming, stride_in_1x1: bool | None, norm_eps: float) -> dict[str, Any]:
    """The arguments of `ResNet`."""
    layers = []
    for stage in (1, 2, 3, 4):
        blocks = numbers(rf"bottom_up\.layer{stage}\.(\d+)\..*", entries)
        if not blocks or blocks != set(range(len(blocks))):
            raise CheckpointError(f"layer{stage} must have blocks 0, 1, …; it has {sorted(blocks) or 'none'}")
        layers.append(len(blocks))
    block: Block = Bottleneck if "bottom_up.layer1.0.conv3.weight" in entries else BasicBlock
    width, width_per_group = conv_shape(entries, "bottom_up.layer1.0.conv2.weight")
    if width % width_per_group:
        raise CheckpointError(
            f"a 3×3 convolution of layer1 takes {width_per_group} channels per group and gives {width}"
        )
    norm_layer = norm_of(entries, "bottom_up.", norm_eps)
    if stride_in_1x1 is None:
        is_frozen = norm_layer.func is FrozenBatchNorm2d
        stride_in_1x1 = naming.msra and is_frozen and block is Bottleneck and width == width_per_group
    return {
        "block": block,
        "layers": layers,
        "in_channels": conv_shape(entries, "bottom_up.conv1.weight")[1],
        "groups": width // width_per_group,
        "width_per_group": width_per_group,
        "norm_layer": norm_layer,
        "stride_in_1x1": stride_in_1x1,
        "returned_layers": describe_levels(entries, block) if naming.has_pyramid else (1, 2, 3, 4),
    }


def describe_levels(entries: Entries, block: Block) -> tuple[int, ...]:
    """Which stages have a lateral convolution, recognised by its input channels."""
    stages = {channels * block.expansion: stage for stage, channels in enumerate(STAGE_CHANNELS, start=1)}
    laterals = numbers(r"lateral\.(\d+)\..*", entries)
    if laterals != set(range(len(laterals))):
        raise CheckpointError(f"a level lacks its lateral convolution: from the top there are {sorted(laterals)}")
    taken = [conv_shape(entries, f"lateral.{index}.weight")[1] for index in sorted(laterals, reverse=True)]
    layers = tuple(stages.get(channels, 0) for channels in taken)
    if 0 in layers or layers[-1] != 4 or list(layers) != sorted(set(layers)):
        raise CheckpointError(
            f"the laterals take {taken} channels, the trunk has {list(stages)}, the last one included"
        )
    return layers


def describe_pyramid(
    entries: Entries,
    naming: Naming,
    upsample: Literal["bilinear", "nearest"] | None,
    extra: Extra | Literal["auto"],
    norm_eps: float,
) -> dict[str, Any]:
    """The arguments of `FPN` beside the trunk."""
    smooth_top = naming.smooth_top
    if smooth_top is None:
        smooth_top = any(name.startswith("smooth.0.") for name in entries)
    options: dict[str, Any] = {
        "smooth_top": smooth_top,
        "upsample": upsample or naming.upsample or ("nearest" if smooth_top else "bilinear"),
        "extra": naming.extra if extra == "auto" else extra,
    }
    if naming.has_pyramid:
        options["out_channels"] = conv_shape(entries, "lateral.0.weight")[0]
        if "lateral.0.1.weight" in entries:
            options["norm_layer"] = norm_of(entries, "lateral.", norm_eps)
    if extra == "auto" and any(name.startswith("extra.") for name in entries):
        options["extra"] = partial(
            P6P7,
            on_p5=conv_shape(entries, "extra.p6.weight")[1] == options.get("out_channels"),
            relu=naming.relu,
            norm_layer=norm_of(entries, "extra.", norm_eps) if "extra.p6.1.weight" in entries else None,
        )
    return options


def numbers(pattern: str, names: Entries) -> set[int]:
    """The numbers that the pattern's group matches in `names`."""
    return {int(found[1]) for name in names if (found := re.fullmatch(pattern, name))}


def conv_shape(entries: Entries, name: str) -> tuple[int, int]:
    """Output channels, and input channels per group, of a convolution that may have a norm after it."""
    convolution = entries.get(name, entries.get(name.replace(".weight", ".0.weight")))
    if convolution is None:
        raise CheckpointError(f"it has no convolution that would be our {name}")
    if convolution.dim() != 4 or 0 in convolution.shape:
        raise CheckpointError(f"our {name} cannot have the shape {tuple(convolution.shape)}")
    return convolution.shape[0], convolution.shape[1]


def norm_of(entries: Entries, prefix: str, eps: float) -> partial[Any]:
    """Entries with a counter mean batch norm, statistics without one frozen batch norm, no statistics group norm."""
    words = {name.rpartition(".")[2] for name in entries if name.startswith(prefix)}
    if COUNTER in words:
        return partial(nn.BatchNorm2d, eps=eps)
    if "running_mean" in words or "running_var" in words:
        return partial(FrozenBatchNorm2d, eps=eps)
    return partial(nn.GroupNorm, GROUP_NORM_GROUPS, eps=eps)


def describe_images(naming: Naming, trunk: Mapping[str, Any]) -> Preprocessing:
    """What the source feeds such a trunk: Caffe's models, and Detectron's after them, want BGR from 0 to 255."""
    if naming.channel_order is None and not trunk["stride_in_1x1"]:
        return IMAGENET
    return CAFFE_WITH_DEVIATION if trunk["groups"] > 1 else CAFFE
