"""The inference form of a pyramid: batch norm and activations in the convolutions, maps in channels_last memory."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fpn._activation import activation_of
from fpn._changes import Changes
from fpn._recognition import (
    all_is_watched,
    class_name,
    conv_obstacle,
    is_batch_norm,
    is_identity,
    is_sequence,
    is_touched,
    is_watched,
    norm_obstacle,
    obstacle,
    own_method,
    plain_activation,
)
from fpn._tracing import is_recorded, is_traced
from fpn.inference.fused_conv import FusedConv2d
from fpn.levels import P6P7
from fpn.resnet import BasicBlock, Bottleneck, ResNet

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


def fuse(model: Model, kind: type[nn.Module]) -> tuple[Model, Changes]:
    """`FPN.fuse`.

    Args:
        model: the pyramid.
        kind: `FPN`, whose forward pass the model has to have.

    Returns:
        The inference form, in eval mode, and what was fused and what was left.
    """
    training = [
        name or "the model"
        for name, module in model.named_modules()
        if module.training and activation_of(module) is None and type(module) is not nn.Identity  # these have one mode
    ]
    if training:
        raise ValueError(f"fuse() needs eval mode, and {training[0]} is in training mode; call eval() first")
    fused = copied(model).requires_grad_(False).to(memory_format=torch.contiguous_format)
    fuser = Fuser()
    trunk = fused.get_submodule("bottom_up")
    fuser.fuse_trunk(trunk, "bottom_up")
    fuser.fuse_pyramid(fused, kind)
    fused_stem = type(getattr(trunk, "conv1", None)) is FusedConv2d
    if not fused_stem and to_channels_last not in trunk._forward_pre_hooks.values():
        trunk.register_forward_pre_hook(to_channels_last)
    changes = Changes(fuser.replaced, fuser.left)
    logger.log(logging.WARNING if fuser.left else logging.INFO, "%s", changes)
    return fused.eval(), changes


def to_channels_last(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """A forward pre-hook: the images in the layout that convolutions hand on, and are fastest in."""
    images, *others = inputs
    if type(images) is not Tensor or images.dim() != 4 or is_recorded():
        return None
    return images.contiguous(memory_format=torch.channels_last), *others


def copied(model: Model) -> Model:
    """A copy of the model; of a tensor that was computed, such as a weight before pruning's hook, its value."""
    computed = {
        id(tensor): tensor.detach().clone()
        for module in model.modules()
        for tensor in tensors_in([value for name, value in vars(module).items() if name != "_modules"])
        if not tensor.is_leaf
    }
    try:
        return copy.deepcopy(model, cast("dict[int, Any]", computed))
    except Exception as error:  # whatever is in the way of copying what somebody has put into the model
        raise RuntimeError(f"fuse() works on a copy of the model, which cannot be copied: {error}") from error


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors in plain containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


class Fuser:
    """Makes the inference form of what it recognises, and keeps account.

    Args:
        sequences: classes whose modules call one child after the other and do nothing else.

    Attributes:
        replaced: name of a part -> what is there now.
        left: name of a part that computes as before -> why.
    """

    def __init__(self, sequences: tuple[type[nn.Module], ...] = (nn.Sequential,)) -> None:
        self.sequences = sequences
        self.replaced: dict[str, str] = {}
        self.left: dict[str, str] = {}

    def fuse_trunk(self, trunk: nn.Module, name: str) -> None:
        """The stem of a trunk, and the blocks of its stages, in their places."""
        if not computes_as(trunk, ResNet):
            self.left[name] = f"it is {class_name(trunk)}, which does not compute as fpn.resnet.ResNet"
            return
        stem = ("conv1", "bn1", "relu")
        fused = self.fuse_chain([(f"{name}.{key}", trunk.get_submodule(key)) for key in stem])
        for key, module in zip(stem, fused, strict=True):
            setattr(trunk, key, module)
        for key in ("layer1", "layer2", "layer3", "layer4"):
            setattr(trunk, key, self.fuse_stage(trunk.get_submodule(key), f"{name}.{key}"))

    def fuse_pyramid(self, model: nn.Module, kind: type[nn.Module]) -> None:
        """The lateral and smoothing convolutions, and those of P6 and P7, in their places."""
        if not computes_as(model, kind):
            self.left["the pyramid"] = f"it is {class_name(model)}, which does not compute as fpn.{kind.__name__}"
            return
        for name in ("lateral", "smooth"):
            layers = children_of(model.get_submodule(name))
            fused = [self.fuse_layer(layer, f"{name}.{key}") for key, layer in layers]
            setattr(model, name, nn.ModuleList(fused))
        if type(model.extra) is P6P7 and not is_touched(model.extra):
            for name in ("p6", "p7"):
                setattr(model.extra, name, self.fuse_layer(model.extra.get_submodule(name), f"extra.{name}"))

    def fuse_stage(self, stage: nn.Module, name: str) -> nn.Module:
        """The stage with the inference form of its blocks; one of another class or with a forward of its own stays."""
        if type(stage) not in (nn.Sequential, FusedStage) or own_method(stage):
            wrong = f"it is {class_name(stage)}, not nn.Sequential"
            self.left[name] = wrong if type(stage) not in (nn.Sequential, FusedStage) else str(own_method(stage))
            return stage
        blocks = OrderedDict((key, self.fuse_block(block, f"{name}.{key}")) for key, block in children_of(stage))
        if is_touched(stage):  # its hooks see what goes into it and comes out, and stay with it
            fused = copy.copy(stage)
            fused._modules = cast("dict[str, nn.Module | None]", blocks)
            return fused
        return FusedStage(blocks)

    def fuse_block(self, block: nn.Module, name: str) -> nn.Module:
        """The inference form of a residual block; one of another class, with other layers or with hooks as it is."""
        if type(block) is FusedBlock:
            return block
        why = block_obstacle(block)
        if why is None:
            relu = block.get_submodule("relu")
            activation = plain_activation(relu)
            try:
                pairs = cast("BasicBlock | Bottleneck", block).layers
                layers = [FusedConv2d(conv, None if is_identity(norm) else norm, activation) for conv, norm in pairs]
            except ValueError as error:
                why = str(error)
        if why is not None:
            self.left[name] = why
            return block
        downsample = block.downsample
        if isinstance(downsample, nn.Module):
            downsample = self.fuse_layer(downsample, f"{name}.downsample")
        if activation is None and not is_identity(relu):
            self.left[f"{name}.relu"] = reason(relu)
        self.replaced[name] = "a residual block of fused convolutions"
        return FusedBlock(layers, None if activation is not None or is_identity(relu) else relu, downsample)

    def fuse_layer(self, layer: nn.Module, name: str) -> nn.Module:
        """A convolution, or a sequence that has some, each with the norm and the activation after it."""
        (fused,) = self.fuse_chain([(name, layer)])
        return fused

    def fuse_chain(self, chain: Sequence[tuple[str, nn.Module]]) -> list[nn.Module]:
        """What takes the place of named modules that are called one after the other; `nn.Identity` where nothing is."""
        leaves = [leaf for name, module in chain for leaf in self.leaves_of(module, name)]
        fused = iter(self.fuse_leaves(leaves))
        return [self.rebuilt(module, fused) for _, module in chain]

    def leaves_of(self, module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        if is_sequence(module, self.sequences):
            for key, child in children_of(module):
                yield from self.leaves_of(child, f"{name}.{key}")
        else:
            yield name, module

    def rebuilt(self, module: nn.Module, leaves: Iterator[nn.Module]) -> nn.Module:
        """The module with those leaves. A sequence is a new one: the old one may be in use elsewhere too."""
        if not is_sequence(module, self.sequences):
            return next(leaves)
        children = {key: self.rebuilt(child, leaves) for key, child in children_of(module)}
        rest = [child for child in children.values() if not is_identity(child)]
        if len(rest) == 1 and type(rest[0]) is FusedConv2d:
            return rest[0]
        sequence = copy.copy(module)
        sequence._modules = cast("dict[str, nn.Module | None]", children)
        return sequence

    def fuse_leaves(self, leaves: Sequence[tuple[str, nn.Module]]) -> list[nn.Module]:
        """The same for modules that are not taken apart."""
        fused = [module for _, module in leaves]
        candidate = False  # whether the leaf comes after a convolution that would take it
        for index, (name, module) in enumerate(leaves):
            if fused[index] is not module or is_identity(module):
                continue
            if type(module) is not nn.Conv2d or is_touched(module):
                known = type(module) is nn.GroupNorm  # which depends on the map, and is no part of a convolution
                if is_touched(module) or isinstance(module, nn.Conv2d | _BatchNorm) or (candidate and not known):
                    self.left.setdefault(name, reason(module))
                candidate = False
                continue
            if (why := conv_obstacle(module)) is not None:
                self.left[name], candidate = why, False
                continue
            following = [other for other in range(index + 1, len(leaves)) if not is_identity(leaves[other][1])]
            norm = activation = None
            taken = []
            if following and is_norm_of(leaves[following[0]][1], module):
                taken.append(following.pop(0))
                norm = leaves[taken[0]][1]
            if following:
                activation = plain_activation(leaves[following[0]][1])
                taken += following[:1] if activation else []
            try:
                fused[index] = FusedConv2d(module, norm, activation)
            except ValueError as error:
                self.left[leaves[taken[0]][0]] = str(error)
                fused[index], taken = FusedConv2d(module), []
            for other in taken:
                fused[other] = nn.Identity()
            candidate = activation is None
            self.replaced[name] = " and ".join(["a fused convolution", *(leaves[other][0] for other in taken)])
        return fused


def is_norm_of(module: nn.Module, conv: nn.Conv2d) -> bool:
    """Whether it is batch norm for as many channels as the convolution gives."""
    return is_batch_norm(module) and cast(Any, module).running_var.shape == (conv.out_channels,)


def reason(module: nn.Module) -> str:
    """Why a module is not fused."""
    if why := obstacle(module):
        return why
    if isinstance(module, nn.Conv2d):
        return conv_obstacle(module) or "it is not fused"
    if isinstance(module, _BatchNorm):
        return norm_obstacle(module) or "no convolution of as many channels comes before it"
    return f"it is {class_name(module)}, which is not fused"


def block_obstacle(block: nn.Module) -> str | None:
    """Why it is no residual block of plain convolutions with batch norm; None where it is one."""
    if type(block) is not BasicBlock and type(block) is not Bottleneck:
        return f"it is {class_name(block)}, no block of fpn.resnet"
    if why := obstacle(block):
        return why
    if held := [*block._parameters, *block._buffers]:
        return f"it has {held[0]} of its own"
    numbers = (1, 2) if type(block) is BasicBlock else (1, 2, 3)
    expected = {"relu", *(f"{word}{number}" for word in ("conv", "bn") for number in numbers)}
    if block._modules.keys() - {"downsample"} != expected:
        return f"its parts are {', '.join(block._modules)}"
    for number in numbers:
        conv, norm = block.get_submodule(f"conv{number}"), block.get_submodule(f"bn{number}")
        if why := conv_obstacle(conv):
            return f"its conv{number}: {why}"
        if not (is_identity(norm) or is_norm_of(norm, cast(nn.Conv2d, conv))):
            return f"its bn{number}: {reason(norm)}"
    return None


def computes_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether its forward pass is that of the class `kind`, whatever else a subclass adds."""
    own = type(module)
    same = isinstance(module, kind) and own.forward is kind.forward and own.__call__ is nn.Module.__call__
    return same and "forward" not in vars(module)


def children_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """All of them, one that is there twice twice."""
    return [(key, child) for key, child in module._modules.items() if child is not None]


class FusedBlock(nn.Module):
    """A residual block in its inference form.

    Args:
        layers: convolutions with their norms, and with the activation after each if it can be fused.
        relu: the activation where it cannot be fused, which is called after each layer; else None.
        downsample: what the shortcut goes through; None where it is the input.
    """

    def __init__(self, layers: Sequence[FusedConv2d], relu: nn.Module | None, downsample: Any) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.relu = relu
        self.downsample = downsample

    def forward(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """The map.

        Args:
            x: the input.
            overwrite: whether the memory of `x` may be used for the output.
        """
        shortcut = x
        if self.downsample is not None:
            shortcut = self.downsample(x)
            # The map of a convolution of ours is new; of any other module it may be known elsewhere.
            overwrite = (
                type(self.downsample) is FusedConv2d and not is_watched(self.downsample) and not all_is_watched()
            )
        *first, last = self.layers
        y = x
        for layer in first:
            y = layer(y) if self.relu is None else self.relu(layer(y))
        y = last(y, shortcut, overwrite)
        return y if self.relu is None else cast(Tensor, self.relu(y))


class FusedStage(nn.Sequential):
    """Blocks of which each may write into the map that the block before it made, if nobody else can have seen it."""

    def forward(self, x: Tensor) -> Tensor:
        if is_traced() or all_is_watched():
            return cast(Tensor, super().forward(x))  # type: ignore[no-untyped-call]
        private = False  # whether this pass has made x
        for block in self:
            plain = type(block) is FusedBlock and not is_watched(block)
            x = block(x, True) if plain and private else block(x)
            private = plain and block.relu is None
        return x
