"""torchvision's ResNet-FPN and pooler as ours: our modules around the very layers and parameters of theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal, TypeVar, cast

import torch
from torch import nn
from torchvision import models, ops
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from fpn._recognition import class_name, obstacle
from fpn.detection.backbone import AcceleratedBackbone
from fpn.levels import P6P7
from fpn.norm import FrozenBatchNorm2d
from fpn.pyramid import FPN
from fpn.resnet import BasicBlock, Block, Bottleneck, ResNet
from roi import MultiScaleRoIAlign, MultiScaleRoIPool

Ours = TypeVar("Ours", bound=nn.Module)

TRUNK_LAYERS = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")

BLOCKS: dict[type[nn.Module], Block] = {models.resnet.BasicBlock: BasicBlock, models.resnet.Bottleneck: Bottleneck}

# Our class -> torchvision's class with the same children and the same computation.
THEIRS: dict[type[nn.Module], type[nn.Module]] = {
    ResNet: IntermediateLayerGetter,
    P6P7: LastLevelP6P7,
    nn.Sequential: nn.Sequential,
} | {ours: theirs for theirs, ours in BLOCKS.items()}


def convert_backbones(model: nn.Module) -> tuple[dict[nn.Module, AcceleratedBackbone], dict[str, str]]:
    """Our backbone for each `BackboneWithFPN` inside `model`, and the names of those without one, with the reason."""
    return convert_all(model, BackboneWithFPN, convert_backbone)


def convert_poolers(
    model: nn.Module, scales: Mapping[str, float]
) -> tuple[dict[nn.Module, MultiScaleRoIAlign], dict[str, str]]:
    """Our pooler for each `torchvision.ops.MultiScaleRoIAlign` inside `model`; the names of those without one, and why.

    Args:
        scales: of the maps that they pool, by name; empty where they are not known.
    """
    return convert_all(model, ops.MultiScaleRoIAlign, partial(convert_pooler, scales=scales))


def convert_all(
    model: nn.Module, theirs: type[nn.Module] | tuple[type[nn.Module], ...], convert: Callable[[Any], Ours]
) -> tuple[dict[nn.Module, Ours], dict[str, str]]:
    converted, reasons = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, theirs) and module is not model and not isinstance(module, MultiScaleRoIAlign):
            try:
                converted[module] = convert(module)
            except ValueError as reason:
                reasons[name] = str(reason)
    return converted, reasons


def convert_pooler(pooler: Any, scales: Mapping[str, float]) -> MultiScaleRoIAlign:
    """Our pooler for one of torchvision's. It keeps its scales; where it has none, it gets those given.

    Raises:
        ValueError: it is not torchvision's own; the message says how.
    """
    check_class("it", pooler, ops.MultiScaleRoIAlign)
    check_untouched(pooler)
    levels = {"canonical_scale": pooler.canonical_scale, "canonical_level": pooler.canonical_level}
    ours = MultiScaleRoIAlign(pooler.featmap_names, pooler.output_size, pooler.sampling_ratio, **levels)
    give_scales(ours, scales)
    if pooler.scales is not None and pooler.map_levels is not None:  # else it infers both
        ours.scales, ours.map_levels = pooler.scales, pooler.map_levels
    return ours.train(pooler.training)


def give_scales(pooler: MultiScaleRoIAlign | MultiScaleRoIPool, scales: Mapping[str, float]) -> None:
    """The scales of the maps that it pools, if they are known and it has none."""
    known = [scale for name, scale in scales.items() if name in pooler.featmap_names]
    if known and (pooler.scales is None or pooler.map_levels is None):
        pooler.set_scales(known)


def convert_backbone(backbone: Any) -> AcceleratedBackbone:
    """Our backbone, with the layers of torchvision's, which keeps them too.

    Raises:
        ValueError: it is not what torchvision builds over a ResNet; the message says where.
    """
    neck = backbone.fpn
    check_class("it", backbone, BackboneWithFPN)
    check_class("fpn", neck, ops.FeaturePyramidNetwork)
    check_untouched(backbone)
    with torch.device("meta"):  # the weights will all be theirs
        fpn = sketch(backbone).train(backbone.training)
    fpn.bottom_up = adopt(fpn.bottom_up, backbone.body, "body")
    for name, own, theirs in (("inner", fpn.lateral, neck.inner_blocks), ("layer", fpn.smooth, neck.layer_blocks)):
        for index, block in enumerate(theirs):
            top, where = len(own) - 1 - index, f"fpn.{name}_blocks.{index}"
            own[top] = adopt(own[top], unwrap(block, where), where)
    if isinstance(fpn.extra, P6P7):
        adopt(fpn.extra, neck.extra_blocks, "fpn.extra_blocks")
    return AcceleratedBackbone(fpn)


def sketch(backbone: Any) -> FPN:
    """An FPN with the structure of torchvision's, read off its first layers. Every norm is `nn.Identity`."""
    body, neck = backbone.body, backbone.fpn
    children = dict(body.named_children())
    if tuple(children) != TRUNK_LAYERS:
        raise ValueError(f"its trunk is no ResNet with layer1 to layer4: it has {some(children)}")
    first: Any = next(children["layer1"].children(), None)
    block = BLOCKS.get(type(first))
    if block is None:
        raise ValueError(f"body.layer1.0 is {class_name(first)}, not torchvision's BasicBlock or Bottleneck")
    conv1, conv2 = children["conv1"], first.conv2
    if not (isinstance(conv1, nn.Conv2d) and isinstance(conv2, nn.Conv2d)):
        raise ValueError(f"its convolutions are {class_name(conv1)} and {class_name(conv2)}")
    returned = [stage for stage in (1, 2, 3, 4) if f"layer{stage}" in body.return_layers]
    if body.return_layers != {f"layer{stage}": str(index) for index, stage in enumerate(returned)}:
        raise ValueError(f"its levels are not called 0, 1, … but {some(body.return_layers.values())}")
    if not len(neck.inner_blocks) == len(neck.layer_blocks) == len(returned):
        raise ValueError(f"it has {len(neck.inner_blocks)} inner and {len(neck.layer_blocks)} layer blocks")
    extra: Literal["maxpool", "p6p7", "p6p7_on_p5"] = "maxpool"
    if isinstance(neck.extra_blocks, LastLevelP6P7):
        extra = "p6p7_on_p5" if neck.extra_blocks.use_P5 else "p6p7"
    else:
        check_class("fpn.extra_blocks", neck.extra_blocks, LastLevelMaxPool)
    trunk = ResNet(
        block,
        [len(list(children[name].children())) for name in TRUNK_LAYERS[-4:]],
        in_channels=conv1.in_channels,
        groups=conv2.groups,
        width_per_group=conv2.out_channels // conv2.groups,
        norm_layer=no_norm,
        returned_layers=returned,
    )
    return FPN(
        trunk,
        out_channels=backbone.out_channels,
        upsample="nearest",
        smooth_top=True,
        extra=extra,
        norm_layer=no_norm if len(list(neck.inner_blocks[0].children())) > 1 else None,
    )


def no_norm(channels: int) -> nn.Module:
    return nn.Identity()


def adopt(own: nn.Module, theirs: Any, where: str) -> nn.Module:
    """`own` with the layers of `theirs`, its counterpart: convolutions, norms, ReLUs and pooling.

    Raises:
        ValueError: `theirs` differs from `own` in more than the norm.
    """
    if isinstance(own, nn.Identity):
        return adopt_norm(theirs)
    children = dict(own.named_children())
    if not children:
        if type(own) is not type(theirs) or repr(own) != repr(theirs):
            raise ValueError(f"{where} is {theirs}, not {own}")
        return theirs
    check_class(where, theirs, THEIRS[type(own)])
    others = dict(theirs.named_children())
    if children.keys() != others.keys():
        raise ValueError(f"{where} has the layers {some(others)}, not {some(children)}")
    for name, child in children.items():
        setattr(own, name, adopt(child, others[name], f"{where}.{name}"))
    return own


def adopt_norm(norm: Any) -> nn.Module:
    """Our frozen batch norm, which is faster, around the tensors of torchvision's; any other norm as it is."""
    if type(norm) is not ops.FrozenBatchNorm2d:
        return cast(nn.Module, norm)
    ours = FrozenBatchNorm2d(len(norm.weight), norm.eps).train(norm.training)
    for name, value in norm.named_buffers():
        ours.register_buffer(name, value)
    return ours


def unwrap(block: Any, where: str) -> nn.Module:
    """A convolution of torchvision's neck, with its norm if it has one, as our necks hold them."""
    layers = list(block.children())
    if type(block) is not ops.Conv2dNormActivation or len(layers) not in (1, 2):
        raise ValueError(f"{where} is {class_name(block)} of {len(layers)} layers, not a convolution and its norm")
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)


def check_class(where: str, module: object, expected: type[nn.Module]) -> None:
    """Raise unless `module` is exactly of that class: a subclass may compute anything."""
    if type(module) is not expected:
        raise ValueError(f"{where} is {class_name(module)}, not {expected.__module__}.{expected.__qualname__}")


def check_untouched(module: nn.Module) -> None:
    """Raise where a part of `module` has hooks or a method of its own, which would be lost."""
    for name, part in module.named_modules():
        if why := obstacle(part):
            raise ValueError(f"{name}: {why}" if name else why)


def some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:5]) + (", …" if len(listed) > 5 else "") or "none"
