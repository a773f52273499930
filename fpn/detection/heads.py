"""torchvision's heads in their inference form."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSRegressionHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.retinanet import RetinaNetClassificationHead, RetinaNetRegressionHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import Conv2dNormActivation

from fpn._recognition import class_name, is_untouched
from fpn.detection.box_head import FusedTwoMLPHead
from fpn.detection.conversion import check_untouched
from fpn.inference.fuse import Fuser, children_of
from roi import MultiScaleRoIAlign

CONV_HEADS: tuple[type[nn.Module], ...] = (
    FastRCNNConvFCHead,
    FCOSClassificationHead,
    FCOSRegressionHead,
    KeypointRCNNHeads,
    MaskRCNNHeads,
    RetinaNetClassificationHead,
    RetinaNetRegressionHead,
    RPNHead,
)
# Of torchvision's classes, those that call one child after the other and do nothing else.
SEQUENCES = (nn.Sequential, Conv2dNormActivation, FastRCNNConvFCHead, KeypointRCNNHeads, MaskRCNNHeads)


def fuse_conv_heads(model: nn.Module) -> tuple[dict[nn.Module, nn.Module], dict[str, str]]:
    """The fused form of each head of torchvision's inside `model`; the names of those that stay, and why."""
    fused, left = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, CONV_HEADS) and module is not model:
            fuser = Fuser(SEQUENCES)
            try:
                fused[module] = fuse_conv_head(module, name, fuser)
            except ValueError as reason:
                left[name] = str(reason)
            left |= fuser.left
    return fused, left


def fuse_conv_head(head: nn.Module, name: str, fuser: Fuser) -> nn.Module:
    """A copy with fused convolutions.

    Raises:
        ValueError: it is not torchvision's own, or in training mode; the message says so.
    """
    if type(head) not in CONV_HEADS:
        raise ValueError(f"it is {class_name(head)}, not torchvision's")
    check_untouched(head)
    if any(layer.training for layer in head.modules()):
        raise ValueError("it is in training mode")
    fused = copy.deepcopy(head).requires_grad_(False)
    children = [(f"{name}.{key}", child) for key, child in children_of(fused)]
    if type(head) in SEQUENCES:
        layers = fuser.fuse_chain(children)
    else:
        layers = [fuser.fuse_layer(child, path) for path, child in children]
    for (key, _), layer in zip(children_of(fused), layers, strict=True):
        setattr(fused, key, layer)
    return fused.eval()


def fuse_box_heads(model: nn.Module) -> dict[nn.Module, FusedTwoMLPHead]:
    """The fused form of every `TwoMLPHead` inside `model` that our pooler feeds. Heads of other classes have none."""
    fused = {}
    for module in model.modules():
        if isinstance(module, RoIHeads) and isinstance(module.box_roi_pool, MultiScaleRoIAlign):
            head, (height, width) = module.box_head, module.box_roi_pool.output_size
            if is_plain(head) and head.fc6.in_features % (height * width) == 0:
                fused[head] = FusedTwoMLPHead(head, height, width).eval()
    return fused


def is_plain(head: Any) -> bool:
    """Whether it is torchvision's own, of linear layers."""
    plain = type(head) is TwoMLPHead and type(head.fc6) is nn.Linear and type(head.fc7) is nn.Linear
    return plain and is_untouched(head)
