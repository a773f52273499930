"""`accelerate`: our backbone and poolers in a torchvision detector that is there, and the report of what was done."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from fpn.changes import Changes
from fpn.checkpoint import export_state_dict
from fpn.detection.adapters import TorchvisionBackbone
from fpn.detection.box_head import FusedTwoMLPHead
from fpn.fused_conv import FusedConv2d
from fpn.recognition import class_name
from roi import MultiScaleRoIAlign

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


class Acceleration(Changes):
    """What `accelerate` did to a model: by name what is there now, and what is as it was and why."""


def accelerate(model: Model, *, fuse: bool = False) -> Model:
    """Puts our backbone and poolers in the place of torchvision's in a detector: the same detections, in less time.

        model = accelerate(fasterrcnn_resnet50_fpn(weights="DEFAULT").eval(), fuse=True)
        print(model.acceleration)

    Replaced are every ResNet-FPN of torchvision's (`resnet_fpn_backbone`'s, in FasterRCNN, MaskRCNN, KeypointRCNN,
    RetinaNet, FCOS or a model of yours), by `TorchvisionBackbone`, and every `torchvision.ops.MultiScaleRoIAlign`, by
    `roi.MultiScaleRoIAlign`. What is not exactly as torchvision builds it (another trunk, other blocks, hooks, levels
    with names of your own) is left as it is, and so are the poolers beside it: ours need strides that double from
    level to level, and those of MobileNet's pyramids do not.

    The new backbone has the very parameters of the old one: an optimizer made before stays valid, and dtype, device,
    `requires_grad` and train or eval mode are what they were. On the CPU the detector's weights become channels_last,
    and so do its features: convolutions and RoI operators are faster with that. The parameters' names in the state
    dict change: load a checkpoint of torchvision's before, and see `torchvision_state_dict` for the way back.

    Args:
        model: the detector; it is changed in place.
        fuse: for inference: the backbone in the form that `FPN.fuse` gives, the convolutions of torchvision's heads
            in the same form (a head in training mode or with hooks is left), and after our pooler a `TwoMLPHead` that
            reads channels_last RoIs as they lie. Their weights are new, take no gradient and have no way back to
            torchvision's names.

    Returns:
        `model`. Its new attribute `acceleration` is the report, an `Acceleration`, which is also logged: at level
        INFO, or WARNING where something was left.

    Raises:
        TypeError: `model` is not a module.
        ImportError, RuntimeError: torchvision does not import.
        ValueError: `fuse` and a backbone is in training mode; nothing has been changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a detector, an nn.Module; got {type(model).__name__}")
    from fpn.detection.conversion import convert_backbones, convert_poolers
    from fpn.detection.heads import fuse_box_heads, fuse_conv_heads

    own = {module: module for module in model.modules() if isinstance(module, TorchvisionBackbone)}
    backbones, left = convert_backbones(model)
    backbone = getattr(model, "backbone", None)
    if isinstance(backbone, nn.Module) and not (backbone in own or backbone in backbones or "backbone" in left):
        left["backbone"] = f"it is {class_name(backbone)}, not torchvision's BackboneWithFPN"
    poolers, left_poolers = convert_poolers(model)
    if left or not (own or backbones):
        reason = "the backbone is not ours, and its levels may have any strides"
        left_poolers |= {name: reason for name, module in model.named_modules() if module in poolers}
        poolers = {}
    replacements: dict[nn.Module, nn.Module] = {**backbones, **poolers}
    if fuse:
        replacements |= {old: TorchvisionBackbone(ours.fpn.fuse()).eval() for old, ours in (own | backbones).items()}
    left |= left_poolers

    replaced = put(model, replacements)
    for name in replaced:
        part = model.get_submodule(name)
        if fuse and isinstance(part, TorchvisionBackbone) and part.fpn.fusion is not None:
            left |= {f"{name}.fpn.{inner}": why for inner, why in part.fpn.fusion.left.items()}
    if fuse:
        heads, left_heads = fuse_conv_heads(model)
        replaced |= put(model, {**fuse_box_heads(model), **heads})
        left |= left_heads
    if backbones and all(parameter.device.type == "cpu" for parameter in model.parameters()):
        model.to(memory_format=torch.channels_last)
    report = Acceleration(replaced, left)
    model.acceleration = report  # type: ignore[assignment]
    logger.log(logging.WARNING if left else logging.INFO, "%s", report)
    return model


def put(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> dict[str, str]:
    """Puts the replacements of modules inside `model` in their places: by name, what is there now."""
    replaced = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in replacements:
            model.set_submodule(name, replacements[module])
            replaced[name] = described(replacements[module])
    return replaced


def described(ours: nn.Module) -> str:
    if isinstance(ours, MultiScaleRoIAlign):
        return f"roi.{ours!r}"
    fused = any(isinstance(module, FusedConv2d) for module in ours.modules())
    if isinstance(ours, TorchvisionBackbone):
        return f"{'fused ' if fused else ''}fpn.FPN, levels {', '.join(ours.names)}"
    return f"{type(ours).__name__}, its convolutions fused" if fused else type(ours).__name__


def torchvision_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a detector under the names that it had before `accelerate`, of the same tensors.

    Raises:
        ValueError: torchvision has no names for a part of it: it is fused, or its backbone computes what theirs does
            not.
    """
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, TorchvisionBackbone):
            prefix = f"{name}." if name else ""
            backbone = export_state_dict(module.fpn, "torchvision", prefix)
            state = {key: value for key, value in state.items() if not key.startswith(f"{prefix}fpn.")} | backbone
        elif isinstance(module, (FusedConv2d, FusedTwoMLPHead)):
            raise ValueError(f"{name} is fused: its weights are not those that torchvision has under that name")
    return state
