"""`accelerate` puts our backbone and poolers into an existing torchvision detector, and reports what it did."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from fpn._changes import Changes
from fpn._recognition import class_name, obstacle
from fpn.checkpoints.export import export_state_dict
from fpn.detection.adapters import TorchvisionBackbone
from fpn.detection.backbone import AcceleratedBackbone
from fpn.detection.box_head import FusedTwoMLPHead
from fpn.inference.fused_conv import FusedConv2d
from fpn.pyramid import FPN

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


class Acceleration(Changes):
    """The report of `accelerate`: the parts that it replaced, by name, and the parts that it left, with the reason."""


def accelerate(model: Model, *, fuse: bool = False) -> Model:
    """Replaces the backbone and the poolers of a torchvision detector by ours. Detections stay, and take less time.

        model = accelerate(fasterrcnn_resnet50_fpn(weights="DEFAULT").eval(), fuse=True)
        print(model.acceleration)

    Every ResNet-FPN of torchvision's becomes ours, in the same module tree: `resnet_fpn_backbone`'s, in FasterRCNN,
    MaskRCNN, KeypointRCNN, RetinaNet, FCOS or a model of yours. Every `torchvision.ops.MultiScaleRoIAlign` becomes
    `roi.MultiScaleRoIAlign`. A part that is not exactly as torchvision builds it stays: another trunk, other blocks,
    hooks, levels with names of your own. A pooler gets the strides of the new backbone, or of an existing
    `TorchvisionBackbone`, so that images may have any size. Beside any other backbone it infers them, as torchvision's
    does. Scales that were set or inferred before stay.

    The new backbone has the parameters of the old one, the same objects under the same names and in the same order. An
    optimizer that exists stays valid. dtype, device, `requires_grad` and train or eval mode stay. Checkpoints of the
    detector, of its optimizer and of its average load into torchvision's detector, and the reverse. On the CPU the
    detector's weights become channels_last, and so do its features, which makes convolutions and RoI operators faster.

    Args:
        model: the detector; it is changed in place.
        fuse: for inference: the backbone gets the form that `FPN.fuse` gives, and so do the convolutions of
            torchvision's heads; a head in training mode or with hooks stays. A `TwoMLPHead` after our pooler reads
            channels_last RoIs without a copy. The fused weights are new, take no gradient and cannot be renamed to
            torchvision's: load a checkpoint, and save one, before. Loading torchvision's checkpoint after is an error
            that says so.

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
    from fpn.detection.conversion import convert_backbones, convert_poolers, give_scales
    from fpn.detection.heads import fuse_box_heads, fuse_conv_heads
    from roi import MultiScaleRoIAlign, MultiScaleRoIPool

    ours_already = TorchvisionBackbone | AcceleratedBackbone
    own = {module: module for module in model.modules() if isinstance(module, ours_already)}
    backbones, left = convert_backbones(model)
    backbone = getattr(model, "backbone", None)
    if isinstance(backbone, nn.Module) and not (backbone in own or backbone in backbones or "backbone" in left):
        left["backbone"] = f"it is {class_name(backbone)}, not torchvision's BackboneWithFPN"
    scales = known_scales([*own.values(), *backbones.values()], everything=not left)
    poolers, left_poolers = convert_poolers(model, scales)
    replacements: dict[nn.Module, nn.Module] = {**backbones, **poolers}
    if fuse:
        unfused = {old: why for old, ours in (own | backbones).items() if (why := fusing_obstacle(ours))}
        left |= {name: unfused[module] for name, module in model.named_modules() if module in unfused}
        replacements |= {old: ours.fuse() for old, ours in (own | backbones).items() if old not in unfused}
    left |= left_poolers
    for module in model.modules():
        if isinstance(module, MultiScaleRoIAlign | MultiScaleRoIPool):
            give_scales(module, scales)

    replaced = put(model, replacements)
    for name in replaced:
        part = model.get_submodule(name)
        if fuse and isinstance(part, AcceleratedBackbone) and part.fusion is not None:
            left |= {f"{name}.{inner}": why for inner, why in part.fusion.left.items()}
        elif fuse and isinstance(part, TorchvisionBackbone) and isinstance(part.fpn, FPN) and part.fpn.fusion:
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


def known_scales(backbones: Sequence[TorchvisionBackbone | AcceleratedBackbone], everything: bool) -> dict[str, float]:
    """The scales of the maps that poolers see, by name; empty if they are not all known or not all the same.

    Args:
        everything: whether these are all the backbones that there are.
    """
    found = [backbone.spatial_scales for backbone in backbones]
    return found[0] if everything and found and all(scales == found[0] for scales in found) else {}


def fusing_obstacle(backbone: TorchvisionBackbone | AcceleratedBackbone) -> str | None:
    """Why the whole backbone has no inference form; None where it has one."""
    if isinstance(backbone, TorchvisionBackbone):
        parts: list[nn.Module] = [backbone]
        if not isinstance(backbone.fpn, FPN):
            return f"{type(backbone.fpn).__name__} has no fused form"
    else:
        parts = [backbone, backbone.fpn, backbone.fpn.inner_blocks, backbone.fpn.layer_blocks]
    return next((why for part in parts if (why := obstacle(part))), None)


def put(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> dict[str, str]:
    """Replaces modules inside `model`. Returns the name of each place and what is there now."""
    replaced = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in replacements:
            model.set_submodule(name, replacements[module])
            replaced[name] = described(replacements[module])
    return replaced


def described(ours: nn.Module) -> str:
    if type(ours).__module__.startswith("roi."):
        return f"roi.{ours!r}"
    fused = any(isinstance(module, FusedConv2d) for module in ours.modules())
    if isinstance(ours, TorchvisionBackbone | AcceleratedBackbone):
        return f"{'fused ' if fused else ''}fpn.FPN, levels {', '.join(ours.names)}"
    return f"{type(ours).__name__}, its convolutions fused" if fused else type(ours).__name__


def torchvision_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a detector under torchvision's names, of the same tensors.

    That of an accelerated detector has them anyway; this is for one around a `TorchvisionBackbone`.

    Raises:
        ValueError: torchvision has no names for a part of it: it is fused, or its backbone computes what theirs does
            not.
    """
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, TorchvisionBackbone):
            prefix = f"{name}." if name else ""
            if not isinstance(module.fpn, FPN):
                raise ValueError(f"torchvision has no names for {type(module.fpn).__name__}")
            backbone = export_state_dict(module.fpn, "torchvision", prefix)
            state = {key: value for key, value in state.items() if not key.startswith(f"{prefix}fpn.")} | backbone
        elif isinstance(module, (FusedConv2d, FusedTwoMLPHead)):
            raise ValueError(
                f"{name} is fused: its weights are not those that torchvision has under that name. Save the state dict "
                "before fuse() or accelerate(fuse=True), or of a copy that is not fused"
            )
    return state
