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

from fpn.detection.box_head import FusedTwoMLPHead
from fpn.detection.conversion import check_untouched, class_name, convert_all
from fpn.fuse import is_batch_norm, is_plain_conv, is_untouched
from fpn.fused_conv import FusedConv2d
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


def fuse_conv_heads(model: nn.Module) -> tuple[dict[nn.Module, nn.Module], dict[str, str]]:
    """Every head of torchvision's inside `model` with fused convolutions, and, by name, why there is none."""
    return convert_all(model, CONV_HEADS, fuse_conv_head)


def fuse_conv_head(head: nn.Module) -> nn.Module:
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
    fuse_convolutions(fused)
    return fused.eval()


def fuse_convolutions(module: nn.Module) -> None:
    for name, child in module.named_children():
        fused = fuse_layer(child)
        if fused is not child:
            setattr(module, name, fused)
        elif not isinstance(child, FusedConv2d):
            fuse_convolutions(child)


def fuse_layer(layer: Any) -> nn.Module:
    """One convolution with the batch norm and the ReLU after it; any other module as it is."""
    if is_plain_conv(layer):
        return FusedConv2d(layer)
    if type(layer) is Conv2dNormActivation and is_plain_conv(layer[0]) and type(layer[-1]) is nn.ReLU:
        if len(layer) == 2:
            return FusedConv2d(layer[0], relu=True)
        if len(layer) == 3 and is_batch_norm(layer[1]):
            return FusedConv2d(layer[0], layer[1], relu=True)
    return layer  # type: ignore[no-any-return]


def fuse_box_heads(model: nn.Module) -> dict[nn.Module, FusedTwoMLPHead]:
    """The fused form of every `TwoMLPHead` inside `model` that is fed by our pooler; of what differs there is none."""
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
