"""The convolutions of torchvision's heads in their inference form."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSRegressionHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.retinanet import RetinaNetClassificationHead, RetinaNetRegressionHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import Conv2dNormActivation

from fpn.detection.conversion import is_untouched
from fpn.fuse import is_batch_norm
from fpn.fused_conv import FusedConv2d

HEADS: tuple[type[nn.Module], ...] = (
    FastRCNNConvFCHead,
    FCOSClassificationHead,
    FCOSRegressionHead,
    KeypointRCNNHeads,
    MaskRCNNHeads,
    RetinaNetClassificationHead,
    RetinaNetRegressionHead,
    RPNHead,
)


def fuse_conv_heads(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """A copy with fused convolutions of every head of torchvision's inside `model`; of what differs there is none."""
    fused = {}
    for module in model.modules():
        if type(module) in HEADS and is_untouched(module) and not (is_fused(module) or is_training(module)):
            fused[module] = copy.deepcopy(module).requires_grad_(False).eval()
            fuse_convolutions(fused[module])
    return fused


def is_fused(module: nn.Module) -> bool:
    return any(isinstance(layer, FusedConv2d) for layer in module.modules())


def is_training(module: nn.Module) -> bool:
    return any(layer.training for layer in module.modules())


def fuse_convolutions(module: nn.Module) -> None:
    for name, child in module.named_children():
        fused = fuse_layer(child)
        if fused is child:
            fuse_convolutions(child)
        else:
            setattr(module, name, fused)


def fuse_layer(layer: Any) -> nn.Module:
    """One convolution with the batch norm and the ReLU after it; any other module as it is."""
    if type(layer) is nn.Conv2d:
        return FusedConv2d(layer)
    if type(layer) is Conv2dNormActivation and type(layer[0]) is nn.Conv2d and type(layer[-1]) is nn.ReLU:
        if len(layer) == 2:
            return FusedConv2d(layer[0], relu=True)
        if len(layer) == 3 and is_batch_norm(layer[1]):
            return FusedConv2d(layer[0], layer[1], relu=True)
    return layer  # type: ignore[no-any-return]
