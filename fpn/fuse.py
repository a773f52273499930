"""The inference form of a pyramid: batch norm folded into the convolutions, everything in channels_last memory."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from fpn.fused_conv import FusedConv2d
from fpn.resnet import BasicBlock, Bottleneck, ResNet

if TYPE_CHECKING:
    from fpn.pyramid import FPN


def fuse(model: FPN) -> FPN:
    """`FPN.fuse`."""
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(f"fuse() needs eval mode, and {training[0]} is in training mode; call eval() first")
    fused = copy.deepcopy(model).requires_grad_(False)
    if isinstance(fused.bottom_up, ResNet):
        fuse_trunk(fused.bottom_up)
    fused.lateral = nn.ModuleList(fuse_neck(layer) for layer in fused.lateral)
    fused.smooth = nn.ModuleList(fuse_neck(layer) for layer in fused.smooth)
    return fused.eval().to(memory_format=torch.channels_last)


def fuse_trunk(trunk: ResNet) -> None:
    """Puts the inference form of the stem and of the blocks in their places."""
    if isinstance(trunk.conv1, nn.Conv2d) and is_batch_norm(trunk.bn1):
        trunk.conv1 = FusedConv2d(trunk.conv1, trunk.bn1, relu=True)
        trunk.bn1 = trunk.relu = nn.Identity()
    for stage in (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4):
        for index, block in enumerate(stage):
            stage[index] = fuse_block(block)


def fuse_block(block: nn.Module) -> nn.Module:
    """The inference form of a residual block; one of another class or with another norm than batch norm stays."""
    if type(block) is BasicBlock or type(block) is Bottleneck:
        norms = [norm for _, norm in block.layers] + ([] if block.downsample is None else [block.downsample[1]])
        if all(is_batch_norm(norm) for norm in norms):
            return FusedBlock(block)
    return block


def fuse_neck(layer: nn.Module) -> nn.Module:
    """The inference form of a lateral or smoothing convolution; one with another norm than batch norm stays."""
    if isinstance(layer, nn.Conv2d):
        return FusedConv2d(layer)
    if isinstance(layer, nn.Sequential) and isinstance(layer[0], nn.Conv2d) and is_batch_norm(layer[1]):
        return FusedConv2d(layer[0], layer[1])
    return layer


def is_batch_norm(module: nn.Module) -> bool:
    """Whether it is batch norm, plain, synchronised or frozen (ours, torchvision's, detectron2's), with statistics."""
    known = isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) or type(module).__name__ == "FrozenBatchNorm2d"
    return known and module.running_var is not None


class FusedBlock(nn.Module):
    """A residual block in its inference form. On the CPU it may overwrite its input."""

    def __init__(self, block: BasicBlock | Bottleneck) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(FusedConv2d(conv, norm, relu=True) for conv, norm in block.layers))
        self.downsample = None if block.downsample is None else FusedConv2d(*block.downsample)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return cast(Tensor, self.layers[-1](self.layers[:-1](x), shortcut))
