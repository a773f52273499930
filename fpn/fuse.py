"""The inference form of a pyramid: batch norm folded into the convolutions, everything in channels_last memory."""

from __future__ import annotations

import copy
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

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


class FusedConv2d(nn.Module):
    """relu(conv(x) + addend), with the batch norm that followed the convolution folded into it.

    Args:
        conv: the convolution; its options, dtype and device are kept.
        norm: the batch norm after it (`is_batch_norm`); None where there is none.
        relu: whether a ReLU comes last.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.Module | None = None, *, relu: bool = False) -> None:
        super().__init__()
        self.conv = conv if norm is None else fold(conv, norm)
        self.relu = relu
        self.packed: tuple[object, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"packed": None}  # in a layout that can be neither copied nor saved

    def forward(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        """The map, in channels_last memory.

        Args:
            x: Tensor[N, in_channels, H, W].
            addend: of the output's shape; it may be overwritten.
        """
        x = x.contiguous(memory_format=torch.channels_last)
        if one_pass_fits(self.conv, x, addend):
            return one_pass(self.conv, self.weight_for(x), x, addend, self.relu)
        y: Tensor = self.conv(x)
        if addend is not None:
            y += addend
        return y.relu_() if self.relu else y

    def weight_for(self, x: Tensor) -> Tensor:
        """The weight in the layout that oneDNN works in, and would else bring it to in every call; under autocast cast.

        The layout is that for the first map: for one of another size oneDNN changes it once more, if it has to.
        """
        weight, dtype = self.conv.weight, autocast_dtype(x)
        if weight.dtype != dtype:
            return weight.to(dtype)
        made_of = (weight.data_ptr(), None if weight.is_inference() else weight._version)
        packed = self.packed  # other threads may replace it meanwhile
        if packed is None or packed[0] != made_of:
            packed = self.packed = (made_of, pack(self.conv, x))
        return packed[1]


def pack(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The weight of `conv` in the layout, known to nobody else, that oneDNN takes for maps of the shape of `x`."""
    options = (conv.padding, conv.stride, conv.dilation, conv.groups, list(x.shape))
    return cast(Tensor, torch.ops.mkldnn._reorder_convolution_weight(conv.weight, *options))


def fold(conv: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
    """norm(conv(x)) as one convolution; its weights are computed in float64 and rounded once."""
    device, dtype = conv.weight.device, conv.weight.dtype
    wide = fuse_conv_bn_eval(conv.cpu().double(), cast(nn.BatchNorm2d, norm.cpu().double()))
    return wide.to(device, dtype).requires_grad_(False)


def one_pass(conv: nn.Conv2d, weight: Tensor, x: Tensor, addend: Tensor | None, relu: bool) -> Tensor:
    """relu(conv(x) + addend), in the memory of `addend`: oneDNN adds and clamps what is still in the cache.

    torch.compile turns the pattern into these same operators. They are not documented; hence `one_pass_works`.

    Args:
        weight: that of `conv` in the dtype of the pass, packed or not.
    """
    bias = None if conv.bias is None else conv.bias.to(weight.dtype)
    options = (weight, bias, conv.padding, conv.stride, conv.dilation, conv.groups)
    x = x.to(weight.dtype)
    if addend is None:
        y = torch.ops.mkldnn._convolution_pointwise(x, *options, "relu" if relu else "none", [], "")
    else:
        last = "relu" if relu else None
        y = torch.ops.mkldnn._convolution_pointwise_.binary(addend, x, *options, "add", 1.0, last, [], None)
    return cast(Tensor, y)


def one_pass_fits(conv: nn.Conv2d, x: Tensor, addend: Tensor | None) -> bool:
    """Whether `one_pass` may take the place of the plain operators, which have gradients and can be recorded."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return False
    if torch.is_grad_enabled() and (x.requires_grad or conv.weight.requires_grad):
        return False
    # A 1×1 map has no layout, and without channels_last oneDNN's bfloat16 takes a path that fails.
    if x.device.type != "cpu" or x.numel() == 0 or x.shape[2:].numel() == 1:
        return False
    dtype = autocast_dtype(x)
    weight_fits = torch.is_autocast_enabled("cpu") or conv.weight.dtype == dtype
    return weight_fits and (addend is None or addend.dtype == dtype) and one_pass_works(dtype)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a convolution on the CPU takes `x`."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


@cache
def one_pass_works(dtype: torch.dtype) -> bool:
    """Whether this torch has `one_pass` for that dtype on this processor, and it computes what it should."""
    conv = nn.Conv2d(2, 2, 1, device="meta")
    conv.weight = nn.Parameter(torch.eye(2, dtype=dtype)[:, :, None, None])
    conv.bias = nn.Parameter(torch.ones(2, dtype=dtype))
    with torch.inference_mode():
        x = torch.tensor([-3.0, -1.0, 0.0, 2.0], dtype=dtype).reshape(1, 1, 2, 2).expand(1, 2, 2, 2)
        x = x.contiguous(memory_format=torch.channels_last)
        uses = (
            (None, False, [-2, 0, 1, 3]),
            (None, True, [0, 0, 1, 3]),
            (x.clone(), True, [0, 0, 1, 5]),
            (x.clone(), False, [-5, -1, 1, 5]),
        )
        try:
            weight = pack(conv, x)
            return all(
                one_pass(conv, weight, x, addend, relu)[0, 1].flatten().tolist() == y for addend, relu, y in uses
            )
        except (AttributeError, RuntimeError):
            return False
