"""The FPN that a checkpoint of another framework describes, and our FPNs under other frameworks' names."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fpn.files import CheckpointError, read_checkpoint, state_dict_in
from fpn.freezing import freeze_norms
from fpn.namings import Names, Naming, detectron2, recognise, torchvision
from fpn.norm import GROUP_NORM_GROUPS, FrozenBatchNorm2d
from fpn.pyramid import FPN, P6P7, ExtraFactory
from fpn.resnet import STAGE_CHANNELS, BasicBlock, Block, Bottleneck, ResNet
from fpn.weights import COUNTER, Report, load_matched, match_by_name

logger = logging.getLogger(__name__)

NORM_EPS = 1e-5
# torchvision trained these with eps 0 and sets it when it loads them.
NORM_EPS_0 = (
    "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth",
    "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth",
    "keypointrcnn_resnet50_fpn_coco-fc266e95.pth",
    "retinanet_resnet50_fpn_coco-eeacb38b.pth",
)

Entries = Mapping[str, Tensor]  # of a checkpoint, by our names
Extra = Literal["maxpool", "p6p7", "p6p7_on_p5"] | ExtraFactory | None


def from_checkpoint(
    checkpoint: str | Path | Mapping[str, Any],
    *,
    stride_in_1x1: bool | None = None,
    channel_order: Literal["rgb", "bgr"] | None = None,
    upsample: Literal["bilinear", "nearest"] | None = None,
    extra: Extra | Literal["auto"] = "auto",
    norm_eps: float | None = None,
) -> FPN:
    """The FPN that a checkpoint describes, built and loaded strictly, in train mode as any new module.

    The source is recognised by its names: torchvision's detectors, detectron2's, mmdetection's, kuangliu/pytorch-fpn,
    plain ResNet classifiers (torchvision's, timm's, detectron2's ImageNet files) and our own state dicts, with any
    prefix. Blocks, widths, groups, levels, channels and the kind of norm are read off names and shapes. Of a partly
    frozen model the frozen batch norm is frozen again; all parameters take a gradient (see `fpn.weights.freeze`).
    Entries of a detector's heads are left out; a classifier has no pyramid, and gets `FPN`'s default with random
    weights.

    Some of a model is in no name and no shape. For that there are the arguments; what was assumed is in `model.report`
    and logged at level INFO.

    Args:
        checkpoint: the path of a `.pth`, `.pkl` or `.safetensors` file (`fpn.files.read_checkpoint`), or what such a
            file holds: a mapping of names to tensors or arrays, or one that has it under "state_dict" or "model".
        stride_in_1x1: whether bottlenecks have their stride in the 1×1 convolution. Default: True for detectron2's with
            frozen batch norm and no groups (the MSRA models), else False; mmdetection's `style="caffe"` needs True.
        channel_order: in which order you will give the images' channels. Default: as the source takes them, and the
            weights stay as they are: BGR for detectron2 and with `stride_in_1x1` (Caffe's models), else RGB. The other
            order reverses the first convolution's input channels.
        upsample: as `FPN`. Default: "bilinear" for kuangliu's, "nearest" for the frameworks'; for ours and for a
            classifier "nearest" where the coarsest level is smoothed, else "bilinear".
        extra: as `FPN`. "auto": P6 and P7 where the checkpoint has them, without a ReLU between them for mmdetection's;
            else "maxpool" for torchvision's, detectron2's and mmdetection's, and None for the others.
        norm_eps: added to the variance in every norm. Default 1e-5, and 0.0 for torchvision's COCO_V1 files by name.

    Returns:
        The model; its attribute `report` is the `fpn.weights.Report`.

    Raises:
        FileNotFoundError, ImportError: as `read_checkpoint`.
        CheckpointError: the file cannot be read, its source is not known, an entry is missing, unexpected, of another
            shape or not a number, or there are several models in it.
        ValueError: an argument does not fit the model.
    """
    if channel_order not in (None, "rgb", "bgr"):
        raise ValueError(f"channel_order must be 'rgb', 'bgr' or None; got {channel_order!r}")
    file = Path(checkpoint) if isinstance(checkpoint, str | Path) else None
    state = state_dict_in(checkpoint) if file is None else read_checkpoint(file)
    names = the_one_naming(state)
    if names.naming.affine:
        state |= statistics_folded_in(state, names)
    entries = {ours: value for name, value in state.items() if (ours := names.ours(name)) is not None}

    if norm_eps is None:
        norm_eps = 0.0 if file is not None and file.name in NORM_EPS_0 else NORM_EPS
    trunk = describe_trunk(entries, names.naming, stride_in_1x1, norm_eps)
    pyramid = describe_pyramid(entries, names.naming, upsample, extra, norm_eps)
    try:
        with torch.device("meta"):  # what a hostile file claims costs no memory before it is found to be there
            sketch = FPN(ResNet(**trunk), **pyramid)
    except RuntimeError as error:
        raise CheckpointError(f"its shapes are those of no model: {error}") from error
    report = match_all(sketch.state_dict(), state, names)

    model = FPN(ResNet(**trunk), **pyramid)
    load_matched(model, state, report)
    frozen = freeze_uncounted(model, report)
    source_order = names.naming.channel_order or ("bgr" if trunk["stride_in_1x1"] else "rgb")
    if channel_order not in (None, source_order):
        reverse_channels(model)
    told_extra = f"P6P7(relu={model.extra.relu})" if isinstance(model.extra, P6P7) else pyramid["extra"]
    model.report = replace(
        report,
        notes=(
            f"from {names.naming.source}" + (f", under {names.prefix!r}" if names.prefix else ""),
            f"{trunk['block'].__name__} × {tuple(trunk['layers'])}, {trunk['groups']} × {trunk['width_per_group']} "
            f"wide, {trunk['norm_layer'].func.__name__}",
            *(() if names.naming.has_pyramid else ("the pyramid is new: random weights",)),
            *((f"batch norm without a counter is frozen, as the checkpoint's: {frozen}",) if frozen else ()),
            f"not told by the keys: stride_in_1x1={trunk['stride_in_1x1']}, upsample={model.upsample!r}, "
            f"extra={told_extra}, norm_eps={norm_eps}, images in {(channel_order or source_order).upper()} "
            f"where the source has {source_order.upper()}",
        ),
    )
    logger.info("%s", model.report)
    return model


def freeze_uncounted(model: FPN, report: Report) -> str:
    """Freezes the batch norm whose counter the checkpoint lacks, which was frozen there; says where that is."""
    uncounted = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.BatchNorm2d and f"{name}.{COUNTER}" not in report.matched
    }
    freeze_norms(model, list(uncounted.values()))
    return ", ".join(dict.fromkeys(".".join(name.split(".")[:2]) for name in uncounted))


def the_one_naming(state: Entries) -> Names:
    found = recognise(state)
    if not found:
        raise CheckpointError(
            "not the checkpoint of a ResNet-FPN or of a plain ResNet in the naming of any known source: its "
            f"{len(state)} names begin with {', '.join(list(state)[:3])}"
        )
    if len(found) > 1:
        raise CheckpointError(
            "there are several models in it: pass the entries of one, by their prefix "
            + " or ".join(repr(names.prefix) for names in found)
        )
    return found[0]


def statistics_folded_in(state: Entries, names: Names) -> dict[str, Tensor]:
    """The statistics that make batch norm the scale and shift that it has come as, as far as they are missing."""
    folded = {}
    for name, value in state.items():
        ours = names.ours(name)
        if ours is not None and ours.endswith(".bias"):
            for word, fill in (("running_mean", torch.zeros_like), ("running_var", torch.ones_like)):
                theirs = names.theirs(ours.removesuffix("bias") + word)
                if theirs is not None and theirs not in state:
                    folded[theirs] = fill(value)
    return folded


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
    """Which stages have a lateral convolution, told by the channels that it takes."""
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
    """The numbers that the pattern's group is in those names that it fits."""
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
    """Batch norm with its counter, frozen batch norm without, group norm without statistics."""
    words = {name.rpartition(".")[2] for name in entries if name.startswith(prefix)}
    if COUNTER in words:
        return partial(nn.BatchNorm2d, eps=eps)
    if "running_mean" in words or "running_var" in words:
        return partial(FrozenBatchNorm2d, eps=eps)
    return partial(nn.GroupNorm, GROUP_NORM_GROUPS, eps=eps)


def match_all(own: Entries, state: Entries, names: Names) -> Report:
    """Every entry of the model with the checkpoint's, and every one of the checkpoint's but for its heads'.

    Raises:
        CheckpointError: there is any that has no counterpart, or one of another shape.
    """
    theirs = {name: names.theirs(name) for name in own}
    expected = {other: own[name] for name, other in theirs.items() if other is not None}
    inside = {name: value for name, value in state.items() if not names.is_head(name)}
    report = match_by_name(expected, inside)
    unnamed = [name for name, other in theirs.items() if other is None]
    if names.naming.has_pyramid and unnamed:
        raise CheckpointError(
            f"{names.naming.source} has no names for {', '.join(unnamed)}, which the arguments ask for"
        )
    if not report.complete or report.unexpected:
        raise CheckpointError(f"its names are those of {names.naming.source}, but it is no such model: {report}")
    return replace(
        report,
        matched={name: other for name, other in theirs.items() if other in report.matched},
        unexpected=tuple(name for name in state if name not in inside),
    )


def reverse_channels(model: FPN) -> None:
    """Makes a model that takes RGB take BGR, and the other way round."""
    conv = model.bottom_up.get_submodule("conv1")
    assert isinstance(conv, nn.Conv2d)
    if conv.in_channels != 3:
        raise ValueError(f"channel_order is for images of 3 channels; the checkpoint's have {conv.in_channels}")
    with torch.no_grad():
        conv.weight.copy_(conv.weight.flip(1))


def export_state_dict(
    model: FPN, naming: Literal["torchvision", "detectron2"], prefix: str = "backbone."
) -> dict[str, Tensor]:
    """The state dict of an FPN over one of our ResNets, under the names of torchvision or detectron2.

    What `from_checkpoint` makes of it is the same model, and what it made of theirs comes back entry for entry (in
    torchvision's present names where they were those of before 0.13).

    Args:
        model: the FPN.
        naming: "torchvision" or "detectron2".
        prefix: stands before all names. "backbone." is where their detectors have the FPN.

    Raises:
        ValueError: `naming` is neither, or the model computes what that framework's does not.
    """
    namings = {
        "torchvision": (torchvision(conv=".0"), torchvision(conv=".0", norm=".1")),
        "detectron2": (detectron2(), detectron2(norm=".norm")),
    }
    if naming not in namings:
        raise ValueError(f"naming must be one of {list(namings)}; got {naming!r}")
    state = model.state_dict()
    names = Names(namings[naming]["lateral.0.1.weight" in state], prefix, len(model.lateral))
    theirs = {name: names.theirs(name) for name in state}
    unlike = [f"the entry {name}" for name, other in theirs.items() if other is None]
    if model.upsample != "nearest":
        unlike.append(f"upsample={model.upsample!r}")
    if isinstance(model.smooth[0], nn.Identity):
        unlike.append("smooth_top=False")
    if isinstance(model.extra, P6P7) and not model.extra.relu:
        unlike.append("no ReLU between P6 and P7")
    if naming == "torchvision" and any(
        isinstance(module, Bottleneck) and module.conv1.stride != (1, 1) for module in model.bottom_up.modules()
    ):
        unlike.append("stride_in_1x1=True")
    if unlike:
        raise ValueError(f"{naming}'s FPN has no {', no '.join(unlike[:5])}")
    return {other: state[name] for name, other in theirs.items() if other is not None}
