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
    if is_plain_conv(trunk.conv1) and is_batch_norm(trunk.bn1) and not is_touched(trunk.relu):
        trunk.conv1 = FusedConv2d(cast(nn.Conv2d, trunk.conv1), trunk.bn1, relu=True)
        trunk.bn1 = trunk.relu = nn.Identity()
    for stage in (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4):
        for index, block in enumerate(stage):
            stage[index] = fuse_block(block)


def fuse_block(block: nn.Module) -> nn.Module:
    """The inference form of a residual block; one of another class, with other layers or with hooks stays."""
    if (type(block) is BasicBlock or type(block) is Bottleneck) and is_untouched(block):
        pairs = [*block.layers] + ([] if block.downsample is None else [tuple(block.downsample)])
        if all(is_plain_conv(conv) and is_batch_norm(norm) for conv, norm in pairs):
            return FusedBlock(block)
    return block


def fuse_neck(layer: nn.Module) -> nn.Module:
    """The inference form of a lateral or smoothing convolution; one of other layers or with hooks stays."""
    if is_plain_conv(layer):
        return FusedConv2d(cast(nn.Conv2d, layer))
    if type(layer) is nn.Sequential and is_plain_conv(layer[0]) and is_batch_norm(layer[1]) and not is_touched(layer):
        return FusedConv2d(cast(nn.Conv2d, layer[0]), layer[1])
    return layer


def is_plain_conv(module: nn.Module) -> bool:
    """Whether it is `nn.Conv2d` itself, not parametrized, without hooks."""
    return type(module) is nn.Conv2d and not is_touched(module)


def is_batch_norm(module: nn.Module) -> bool:
    """Whether it is batch norm, plain, synchronised or frozen (ours, torchvision's, detectron2's), with statistics."""
    known = isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) or type(module).__name__ == "FrozenBatchNorm2d"
    return known and module.running_var is not None and not is_touched(module)


def is_untouched(module: nn.Module) -> bool:
    return not any(map(is_touched, module.modules()))


def is_touched(module: nn.Module) -> bool:
    """Whether that very module has hooks or a forward of its own, which would be lost with it."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


class FusedBlock(nn.Module):
    """A residual block in its inference form. On the CPU it may overwrite its input."""

    def __init__(self, block: BasicBlock | Bottleneck) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(FusedConv2d(conv, norm, relu=True) for conv, norm in block.layers))
        self.downsample = None if block.downsample is None else FusedConv2d(*block.downsample)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        *first, last = self.layers
        for layer in first:
            x = layer(x)
        return cast(Tensor, last(x, shortcut))
