"""Our backbones and poolers in torchvision's and detectron2's detectors; neither has to be installed to import this."""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fpn.checkpoint import export_state_dict
from fpn.fuse import FusedConv2d
from fpn.norm import FrozenBatchNorm2d
from fpn.pyramid import FPN, P6P7, MaxPoolLevel
from fpn.resnet import BasicBlock, Bottleneck, ResNet
from roi import MultiScaleRoIAlign

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)

TRUNK_LAYERS = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")


class _NamedLevels(nn.Module):
    """The levels of an FPN, and P6 by `MaxPoolLevel`'s subsampling where the FPN has none above P5."""

    def __init__(self, fpn: FPN) -> None:
        super().__init__()
        if not isinstance(fpn, FPN):
            raise TypeError(f"fpn must be an fpn.FPN; got {type(fpn).__name__}")
        self.fpn = fpn
        self.out_channels = fpn.out_channels
        self.strides = fpn.strides if fpn.extra.strides else (*fpn.strides, 2 * fpn.strides[-1])

    def levels(self, images: Tensor) -> tuple[Tensor, ...]:
        levels: tuple[Tensor, ...] = self.fpn(images)
        return levels if self.fpn.extra.strides else (*levels, F.max_pool2d(levels[-1], kernel_size=1, stride=2))


class TorchvisionBackbone(_NamedLevels):
    """An FPN as the backbone of torchvision's FasterRCNN, MaskRCNN, KeypointRCNN, RetinaNet and FCOS.

        FasterRCNN(TorchvisionBackbone(FPN101()), num_classes=91)
        RetinaNet(TorchvisionBackbone(FPN(resnet50(returned_layers=(2, 3, 4)), extra="p6p7")), num_classes=91)

    An FPN without extra levels gets "pool", as torchvision's own, so that there are five levels for its anchors.

    Args:
        fpn: the pyramid.

    Attributes:
        out_channels: channels of every level.
        strides: pixels of the image per cell of every level.
        names: of the levels, finest first: "0", "1", … for those with a lateral; above them "pool" for `MaxPoolLevel`,
            else "p6", "p7", by stride.

    Raises:
        TypeError: `fpn` is not an `FPN`.
    """

    def __init__(self, fpn: FPN) -> None:
        super().__init__(fpn)
        laterals = len(fpn.lateral)
        above = [f"p{round(math.log2(stride))}" for stride in self.strides[laterals:]]
        if not fpn.extra.strides or isinstance(fpn.extra, MaxPoolLevel):
            above = ["pool"]
        self.names = (*map(str, range(laterals)), *above)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Images Tensor[N, 3, H, W] -> name: Tensor[N, out_channels, ceil(H / stride), ceil(W / stride)]."""
        return OrderedDict(zip(self.names, self.levels(images), strict=True))


class ShapeSpec(NamedTuple):
    """What detectron2's class of that name says of a map."""

    channels: int | None = None
    height: int | None = None
    width: int | None = None
    stride: int | None = None


class Detectron2Backbone(_NamedLevels):
    """An FPN under detectron2's `Backbone` protocol: a dict "p2", "p3", … by stride, and what it is like.

    detectron2's models take it as it is. `build_backbone` asserts that it got a `Backbone`, which it is after
    `detectron2.modeling.Backbone.register(Detectron2Backbone)`. An FPN without extra levels gets P6 by subsampling,
    as detectron2's own. Images are in detectron2's order and scale if the weights are (`FPN.report` says so).

    Args:
        fpn: the pyramid.

    Raises:
        TypeError: `fpn` is not an `FPN`.
        ValueError: its strides are not different powers of two.
    """

    def __init__(self, fpn: FPN) -> None:
        super().__init__(fpn)
        if len(set(self.strides)) < len(self.strides) or any(stride & (stride - 1) for stride in self.strides):
            raise ValueError(f"fpn must have strides that are different powers of two; got {self.strides}")
        self.names = tuple(f"p{stride.bit_length() - 1}" for stride in self.strides)

    @property
    def size_divisibility(self) -> int:
        """What detectron2 pads height and width to a multiple of: the stride of the coarsest level with a lateral."""
        return self.strides[len(self.fpn.lateral) - 1]

    @property
    def padding_constraints(self) -> dict[str, int]:
        """None beside `size_divisibility`."""
        return {}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each level by name."""
        return {
            name: ShapeSpec(channels=self.out_channels, stride=stride)
            for name, stride in zip(self.names, self.strides, strict=True)
        }

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images Tensor[N, 3, H, W] -> name: Tensor[N, out_channels, ceil(H / stride), ceil(W / stride)]."""
        return dict(zip(self.names, self.levels(images), strict=True))


@dataclass(frozen=True)
class Acceleration:
    """What `accelerate` did to a model.

    Attributes:
        replaced: name of a module in the model -> what is there now.
        left: name of a module that is as it was -> why.
    """

    replaced: Mapping[str, str]
    left: Mapping[str, str]

    def __str__(self) -> str:
        replaced = [f"replaced {name}: {what}" for name, what in self.replaced.items()]
        left = [f"left {name} as it was: {why}" for name, why in self.left.items()]
        return "\n".join([*replaced, *left]) or "there was nothing to replace"


def accelerate(model: Model, *, fuse: bool = False) -> Model:
    """Puts our backbone and poolers in the place of torchvision's in a detector: the same detections, in less time.

        model = accelerate(fasterrcnn_resnet50_fpn(weights="DEFAULT").eval(), fuse=True)
        print(model.acceleration)

    Replaced are every ResNet-FPN of torchvision's (`resnet_fpn_backbone`'s, in FasterRCNN, MaskRCNN, KeypointRCNN,
    RetinaNet, FCOS or a model of yours), by `TorchvisionBackbone`, and every `torchvision.ops.MultiScaleRoIAlign`, by
    `roi.MultiScaleRoIAlign`. What is not exactly as torchvision builds it (another trunk, other blocks, hooks, names
    of levels of your own) is left as it is.

    The new backbone has the very layers and parameters of the old one: an optimizer made before stays valid, and
    dtype, device, memory format, `requires_grad` and train or eval mode are what they were. Only their names in the
    state dict change: load a checkpoint of torchvision's before, and see `torchvision_state_dict` for the way back.

    Args:
        model: the detector; it is changed in place.
        fuse: for inference: the backbone in the form that `FPN.fuse` gives. Its weights are new, take no gradient and
            have no way back to torchvision's names.

    Returns:
        `model`. Its new attribute `acceleration` is the report, an `Acceleration`, which is also logged: at level
        INFO, or WARNING where something was left.

    Raises:
        TypeError: `model` is not a module.
        ImportError: torchvision does not import.
        ValueError: `fuse` and the backbone is in training mode; nothing has been changed then.
    """
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.ops import MultiScaleRoIAlign as TorchvisionPooler

    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a detector, an nn.Module; got {type(model).__name__}")
    replacements: dict[nn.Module, nn.Module] = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        try:
            if isinstance(module, BackboneWithFPN):
                replacements[module] = our_backbone(module)
            elif isinstance(module, TorchvisionPooler):
                replacements[module] = our_pooler(module)
            elif isinstance(module, TorchvisionBackbone) and fuse:
                replacements[module] = module
        except ValueError as reason:
            left[name] = str(reason)
    if fuse:
        for module, ours in replacements.items():
            if isinstance(ours, TorchvisionBackbone):
                replacements[module] = TorchvisionBackbone(ours.fpn.fuse()).eval()
    backbone: Any = getattr(model, "backbone", None)
    if isinstance(backbone, nn.Module) and not isinstance(backbone, BackboneWithFPN | TorchvisionBackbone):
        left["backbone"] = f"it is {class_name(backbone)}, not torchvision's BackboneWithFPN"

    replaced: dict[str, str] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in replacements:
            model.set_submodule(name, replacements[module])
            replaced[name] = described(replacements[module])
    report = Acceleration(replaced, left)
    model.acceleration = report  # type: ignore[assignment]
    logger.log(logging.WARNING if left else logging.INFO, "%s", report)
    return model


def torchvision_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a detector under the names that it had before `accelerate`, of the same tensors.

    Raises:
        ValueError: torchvision has no names for the backbone: it is fused, or it computes what theirs does not.
    """
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, TorchvisionBackbone):
            prefix = f"{name}." if name else ""
            backbone = export_state_dict(module.fpn, "torchvision", prefix)
            state = {key: value for key, value in state.items() if not key.startswith(f"{prefix}fpn.")} | backbone
    return state


@cache
def torchvision_classes() -> dict[type[nn.Module], type[nn.Module]]:
    """Ours -> torchvision's class of the same children and the same computation."""
    from torchvision import models, ops
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

    return {
        MultiScaleRoIAlign: ops.MultiScaleRoIAlign,
        TorchvisionBackbone: BackboneWithFPN,
        FPN: ops.FeaturePyramidNetwork,
        MaxPoolLevel: LastLevelMaxPool,
        P6P7: LastLevelP6P7,
        ResNet: IntermediateLayerGetter,
        BasicBlock: models.resnet.BasicBlock,
        Bottleneck: models.resnet.Bottleneck,
        FrozenBatchNorm2d: ops.FrozenBatchNorm2d,
    }


def check_same(where: str, theirs: nn.Module, ours: type[nn.Module]) -> None:
    """Raise unless `theirs` computes what its class in torchvision, the counterpart of `ours`, says."""
    expected = torchvision_classes().get(ours, ours)
    if type(theirs) is not expected:
        raise ValueError(f"{where} is {class_name(theirs)}, not {expected.__module__}.{expected.__qualname__}")
    hooks = (theirs._forward_hooks, theirs._forward_pre_hooks, theirs._backward_hooks, theirs._backward_pre_hooks)
    if any(hooks) or "forward" in vars(theirs):
        raise ValueError(f"{where} has hooks or a forward of its own")


def our_pooler(pooler: Any) -> MultiScaleRoIAlign:
    """Ours for an instance of `torchvision.ops.MultiScaleRoIAlign`."""
    check_same("it", pooler, MultiScaleRoIAlign)
    levels = {"canonical_scale": pooler.canonical_scale, "canonical_level": pooler.canonical_level}
    ours = MultiScaleRoIAlign(pooler.featmap_names, pooler.output_size, pooler.sampling_ratio, **levels)
    return ours.train(pooler.training)


def our_backbone(backbone: Any) -> TorchvisionBackbone:
    """Our pyramid with the layers of an instance of torchvision's `BackboneWithFPN`, which keeps them too.

    Raises:
        ValueError: it is not what torchvision builds over a ResNet; the message says where.
    """
    check_same("it", backbone, TorchvisionBackbone)
    check_same("fpn", backbone.fpn, FPN)
    neck = backbone.fpn
    with torch.device("meta"):  # the weights will all be theirs
        fpn = sketch(backbone).train(backbone.training)
    fpn.bottom_up = adopted(fpn.bottom_up, backbone.body, "body")
    for name, own, theirs in (("inner", fpn.lateral, neck.inner_blocks), ("layer", fpn.smooth, neck.layer_blocks)):
        for index, block in enumerate(theirs):
            top, where = len(own) - 1 - index, f"fpn.{name}_blocks.{index}"
            own[top] = adopted(own[top], plain(block, where), where)
    if isinstance(fpn.extra, P6P7):
        adopted(fpn.extra, neck.extra_blocks, "fpn.extra_blocks")
    ours = TorchvisionBackbone(fpn)
    ours.training = backbone.training
    return ours


def sketch(backbone: Any) -> FPN:
    """An FPN with the structure of torchvision's, as its first layers tell it, and `nn.Identity` for every norm."""
    body, neck = backbone.body, backbone.fpn
    children = dict(body.named_children())
    if children.keys() != set(TRUNK_LAYERS):
        raise ValueError(f"its trunk is no ResNet: it has the layers {some(children)}")
    stages = [list(children[name].children()) for name in TRUNK_LAYERS[-4:]]
    first: Any = stages[0][0] if stages[0] else None
    block = next((ours for ours in (BasicBlock, Bottleneck) if type(first) is torchvision_classes()[ours]), None)
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
    extra: Literal["maxpool", "p6p7", "p6p7_on_p5"]
    if isinstance(neck.extra_blocks, torchvision_classes()[P6P7]):
        extra = "p6p7_on_p5" if neck.extra_blocks.use_P5 else "p6p7"
    else:
        check_same("fpn.extra_blocks", neck.extra_blocks, MaxPoolLevel)
        extra = "maxpool"
    trunk = ResNet(
        block,
        [len(stage) for stage in stages],
        in_channels=conv1.in_channels,
        groups=conv2.groups,
        width_per_group=conv2.out_channels // conv2.groups,
        norm_layer=no_norm,
        returned_layers=returned,
    )
    has_norm = len(list(neck.inner_blocks[0].children())) > 1
    return FPN(
        trunk,
        out_channels=backbone.out_channels,
        upsample="nearest",
        smooth_top=True,
        extra=extra,
        norm_layer=no_norm if has_norm else None,
    )


def no_norm(channels: int) -> nn.Module:
    return nn.Identity()


def adopted(own: nn.Module, theirs: Any, where: str) -> nn.Module:
    """`own` with the layers of `theirs`, its counterpart: convolutions, norms, ReLUs and pooling as they are.

    Raises:
        ValueError: `theirs` differs from `own` in more than the norm.
    """
    if isinstance(own, nn.Identity):
        return our_norm(theirs)
    children = dict(own.named_children())
    if not children:
        if repr(own) != repr(theirs):
            raise ValueError(f"{where} is {theirs}, not {own}")
        return cast(nn.Module, theirs)
    check_same(where, theirs, type(own))
    others = dict(theirs.named_children())
    if children.keys() != others.keys():
        raise ValueError(f"{where} has the layers {some(others)}, not {some(children)}")
    for name, child in children.items():
        setattr(own, name, adopted(child, others[name], f"{where}.{name}"))
    return own


def our_norm(norm: Any) -> nn.Module:
    """Our frozen batch norm, which is faster, for torchvision's, with its tensors; any other norm as it is."""
    try:
        check_same("it", norm, FrozenBatchNorm2d)
    except ValueError:
        return cast(nn.Module, norm)
    ours = FrozenBatchNorm2d(len(norm.weight), norm.eps).train(norm.training)
    for name, value in norm.named_buffers():
        ours.register_buffer(name, value)
    return ours


def plain(block: Any, where: str) -> nn.Module:
    """A convolution of torchvision's neck, with its norm if it has one, as our necks hold them."""
    from torchvision.ops import Conv2dNormActivation

    layers = list(block.children())
    if type(block) is not Conv2dNormActivation or len(layers) > 2:
        raise ValueError(f"{where} is {class_name(block)} of {len(layers)} layers, not a convolution and its norm")
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)


def described(ours: nn.Module) -> str:
    if not isinstance(ours, TorchvisionBackbone):
        return repr(ours)
    fused = "fused " if any(isinstance(module, FusedConv2d) for module in ours.modules()) else ""
    return f"{fused}fpn.FPN, levels {', '.join(ours.names)}"


def class_name(module: object) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:5]) + (", …" if len(listed) > 5 else "") or "none"
