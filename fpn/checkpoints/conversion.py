"""The FPN that a checkpoint describes, built and loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fpn._freezing import freeze_norms
from fpn._report import Report
from fpn.checkpoints.content import find_state_dict
from fpn.checkpoints.description import Extra, describe_images, describe_pyramid, describe_trunk
from fpn.checkpoints.errors import CheckpointError
from fpn.checkpoints.files import read_file
from fpn.checkpoints.input_channels import adapt_channels
from fpn.checkpoints.matching import COUNTER
from fpn.checkpoints.namings import OURS
from fpn.checkpoints.recognition import beside_trunk, match_all, statistics_folded_in, the_one_naming
from fpn.checkpoints.relatives import refuse_hidden_relatives
from fpn.checkpoints.transfer import load_matched
from fpn.levels import P6P7
from fpn.pyramid import FPN
from fpn.resnet import ResNet

logger = logging.getLogger(__name__)

NORM_EPS = 1e-5
# torchvision trained these with eps 0 and sets it when it loads them.
NORM_EPS_0 = (
    "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth",
    "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth",
    "keypointrcnn_resnet50_fpn_coco-fc266e95.pth",
    "retinanet_resnet50_fpn_coco-eeacb38b.pth",
)


def from_checkpoint(
    checkpoint: str | Path | Mapping[str, Any],
    *,
    stride_in_1x1: bool | None = None,
    channel_order: Literal["rgb", "bgr"] | None = None,
    upsample: Literal["bilinear", "nearest"] | None = None,
    extra: Extra | Literal["auto"] = "auto",
    norm_eps: float | None = None,
    key: str | None = None,
    in_channels: int | None = None,
) -> FPN:
    """The FPN that a checkpoint describes, built and loaded strictly, in train mode as any new module.

    The source is recognised by its names: torchvision's detectors, detectron2's, mmdetection's, kuangliu/pytorch-fpn,
    plain ResNets (torchvision's, timm's, detectron2's ImageNet files, the trunk of any other model, an `nn.Sequential`
    of its children) and our own state dicts, with any prefix. Blocks, widths, groups, levels, channels and the kind of
    norm are read off names and shapes. Batch norm that was frozen in the source is frozen again; all parameters take a
    gradient (see `fpn.weights.freeze`). Entries of heads and of other parts of a model are left out; a trunk has no
    pyramid, and gets `FPN`'s default with random weights.

    Some options are in no name and no shape. The arguments set them; what was assumed is in `model.report`
    and logged at level INFO.

    Args:
        checkpoint: the path of a `.pth`, `.pkl` or `.safetensors` file (`fpn.weights.read_checkpoint`), or what such a
            file holds: a mapping of names to tensors or arrays, or one that has it under "state_dict" or the like.
        stride_in_1x1: whether bottlenecks have their stride in the 1×1 convolution. Default: True for detectron2's with
            frozen batch norm and no groups (the MSRA models), else False; mmdetection's `style="caffe"` needs True.
        channel_order: in which order you will give the images' channels. Default: as the source takes them, and the
            weights stay as they are: BGR for detectron2 and with `stride_in_1x1` (Caffe's models), else RGB. The other
            order reverses the first convolution's input channels.
        upsample: as `FPN`. Default: "bilinear" for kuangliu's, "nearest" for the frameworks'; for ours and for a
            classifier "nearest" where the coarsest level is smoothed, else "bilinear".
        extra: as `FPN`. "auto": P6 and P7 where the checkpoint has them, without a ReLU between them for mmdetection's;
            else "maxpool" for torchvision's, detectron2's and mmdetection's, and for ours in an R-CNN of torchvision's;
            None for the others.
        key: which of several models in the file: the keys that lead to its state dict, such as "model_ema"; see
            `fpn.weights.read_checkpoint`.
        in_channels: channels of your images. Default: as the checkpoint's. Other than 3, the first convolution gets the
            sum of its weights (1), or the weights again and again, times 3 / `in_channels`, as timm has it.
        norm_eps: added to the variance in every norm. Default 1e-5, and 0.0 for torchvision's COCO_V1 files by name.

    Returns:
        The model. Its attribute `report` is the `fpn.weights.Report`, and `preprocessing` makes its input of images.

    Raises:
        FileNotFoundError, ImportError: as `read_checkpoint`.
        CheckpointError: the file cannot be read, its source is not known, an entry is missing, unexpected, of another
            shape or not a number, or there are several models in it.
        ValueError: an argument does not fit the model.
    """
    if channel_order not in (None, "rgb", "bgr"):
        raise ValueError(f"channel_order must be 'rgb', 'bgr' or None; got {channel_order!r}")
    file = Path(checkpoint) if isinstance(checkpoint, str | Path) else None
    content = find_state_dict(checkpoint, key) if file is None else read_file(file, key)
    state = content.state
    refuse_hidden_relatives(content.told, file)
    names = the_one_naming(state)
    beside = beside_trunk(state, names)
    state = {name: value for name, value in state.items() if name not in set(beside)}
    if in_channels is not None:
        state = adapt_channels(state, names, in_channels)
    if names.naming.affine:
        state |= statistics_folded_in(state, names)
    entries = {ours: value for name, value in state.items() if (ours := names.ours(name)) is not None}

    if extra == "auto" and names.naming is OURS and in_rcnn(state) and not any(e.startswith("extra.") for e in entries):
        extra = "maxpool"
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
    model.preprocessing = describe_images(names.naming, trunk) if trunk["in_channels"] == 3 else None
    if channel_order not in (None, source_order):
        reverse_channels(model)
        model.preprocessing = describe_images(names.naming, trunk).reversed()
    told_extra = f"P6P7(relu={model.extra.relu})" if isinstance(model.extra, P6P7) else pyramid["extra"]
    model.report = replace(
        report,
        notes=(
            f"from {names.naming.source}" + (f", under {names.prefix!r}" if names.prefix else ""),
            f"{trunk['block'].__name__} × {tuple(trunk['layers'])}, {trunk['groups']} × {trunk['width_per_group']} "
            f"wide, {trunk['norm_layer'].func.__name__}",
            *content.notes,
            *((str(model.preprocessing),) if model.preprocessing else ()),
            *((f"not of the trunk, and left out: {', '.join(group_names(beside))}",) if beside else ()),
            *(() if names.naming.has_pyramid else ("the pyramid is new: random weights",)),
            *((f"batch norm without a counter is frozen, as the checkpoint's: {frozen}",) if frozen else ()),
            f"assumed: stride_in_1x1={trunk['stride_in_1x1']}, upsample={model.upsample!r}, "
            f"extra={told_extra}, norm_eps={norm_eps}, images in {(channel_order or source_order).upper()} "
            f"where the source has {source_order.upper()}",
        ),
    )
    logger.info("%s", model.report)
    return model


def in_rcnn(state: Mapping[str, Tensor]) -> bool:
    """Whether it is the state dict of torchvision's R-CNN, which takes a P6; no entry shows a max-pooled one."""
    return any(name.startswith("rpn.") for name in state)


def group_names(names: list[str]) -> list[str]:
    """The modules of some entries: of "decoder.0.weight" and "decoder.1.weight" it is "decoder"."""
    return list(dict.fromkeys(name.partition(".")[0] for name in names))


def freeze_uncounted(model: FPN, report: Report) -> str:
    """Freezes the batch norm that has no counter in the checkpoint, since it was frozen there; returns its names."""
    uncounted = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.BatchNorm2d and f"{name}.{COUNTER}" not in report.matched
    }
    freeze_norms(model, list(uncounted.values()))
    return ", ".join(dict.fromkeys(".".join(name.split(".")[:2]) for name in uncounted))


def reverse_channels(model: FPN) -> None:
    """Makes a model that takes RGB take BGR, and the other way round."""
    conv = model.bottom_up.get_submodule("conv1")
    assert isinstance(conv, nn.Conv2d)
    if conv.in_channels != 3:
        raise ValueError(f"channel_order is for images of 3 channels; the checkpoint's have {conv.in_channels}")
    with torch.no_grad():
        conv.weight.copy_(conv.weight.flip(1))
