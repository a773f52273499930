"""Bottom-up pathway: ResNet trunks that return (C2, C3, C4, C5), or some of them.

Residual networks: He et al., Deep Residual Learning for Image Recognition (2015). ResNeXt: Xie et al. (2016).
Wide ResNet: Zagoruyko & Komodakis (2016). State keys are torchvision's without `fc`.
"""

# Annotations are not postponed: torch.fx writes those of forward() into its graphs, as names and not strings.

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

from torch import Tensor, nn
from torch.fx import Proxy

from fpn._changes import Changes
from fpn._checkpointing import checkpointing_of, run_stage
from fpn.norm import NormLayer, resolve_norm_layer

STAGE_CHANNELS = (64, 128, 256, 512)  # before a block's expansion


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(
        in_channels, out_channels, 3, stride, padding=dilation, dilation=dilation, groups=groups, bias=False
    )


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


class BlockOptions(NamedTuple):
    """What every block of one trunk shares."""

    norm_layer: NormLayer
    groups: int
    width_per_group: int
    stride_in_1x1: bool


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut (He et al. 2015, fig. 5 left)."""

    expansion: ClassVar[int] = 1

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        dilation: int,
        downsample: nn.Sequential | None,
        options: BlockOptions,
    ) -> None:
        super().__init__()
        if options.groups != 1 or options.width_per_group != 64:
            raise ValueError("BasicBlock takes only groups=1 and width_per_group=64; use Bottleneck")
        if options.stride_in_1x1:
            raise ValueError("BasicBlock has no 1×1 convolution: stride_in_1x1 is for Bottleneck")
        if dilation != 1:
            raise ValueError("BasicBlock takes no dilation; use Bottleneck with replace_stride_with_dilation")
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn1 = options.norm_layer(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = options.norm_layer(channels)
        self.downsample = downsample

    @property
    def layers(self) -> list[tuple[nn.Conv2d, nn.Module]]:
        """The convolutions on the way, each with its norm."""
        return [(self.conv1, self.bn1), (self.conv2, self.bn2)]

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += shortcut
        return cast(Tensor, self.relu(y))


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 convolutions and a shortcut (He et al. 2015, fig. 5 right).

    The stride is in the 3×3 convolution as in torchvision ("ResNet v1.5"), or, with `stride_in_1x1`, in the first
    1×1 as in the paper and the Caffe and MSRA checkpoints.
    """

    expansion: ClassVar[int] = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        dilation: int,
        downsample: nn.Sequential | None,
        options: BlockOptions,
    ) -> None:
        super().__init__()
        width = channels * options.width_per_group // 64 * options.groups
        stride_1x1, stride_3x3 = (stride, 1) if options.stride_in_1x1 else (1, stride)
        self.conv1 = conv1x1(in_channels, width, stride_1x1)
        self.bn1 = options.norm_layer(width)
        self.conv2 = conv3x3(width, width, stride_3x3, options.groups, dilation)
        self.bn2 = options.norm_layer(width)
        self.conv3 = conv1x1(width, channels * self.expansion)
        self.bn3 = options.norm_layer(channels * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    @property
    def layers(self) -> list[tuple[nn.Conv2d, nn.Module]]:
        """The convolutions on the way, each with its norm."""
        return [(self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)]

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += shortcut
        return cast(Tensor, self.relu(y))


Block = type[BasicBlock] | type[Bottleneck]


class ResNet(nn.Module):
    """ResNet trunk: images in, (C2, C3, C4, C5) out.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        layers: blocks in each of the four stages, e.g. (3, 4, 23, 3) for ResNet-101.
        in_channels: channels of the images.
        groups: groups of the 3×3 convolutions (ResNeXt's cardinality).
        width_per_group: channels per group in the first stage.
        replace_stride_with_dilation: for C3, C4 and C5, whether dilation takes the place of the stride of 2.
        zero_init_residual: start the last norm of each block at zero, so that blocks begin as the identity
            (Goyal et al. 2017).
        norm_layer: `channels -> module`; `nn.BatchNorm2d`, `FrozenBatchNorm2d`, `nn.SyncBatchNorm`, or
            `nn.GroupNorm` (32 groups).
        stride_in_1x1: Caffe's variant of `Bottleneck`.
        returned_layers: which of layer1 … layer4 give the maps that are returned, finest first; the last is 4. Default
            all of them, C2 to C5; (2, 3, 4) is RetinaNet's and FCOS's choice.
        checkpoint_stages: for C2, C3, C4 and C5, whether the backward pass computes what is inside the stage's blocks
            again instead of keeping it (Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016). Gradients,
            running statistics and other buffers are the same, and so are random numbers. Hooks inside the blocks run
            twice. `checkpointing` says what is computed again, and what is not and why.

    Attributes:
        in_channels: channels of the images.
        out_channels: channels of the maps, by default of C2, C3, C4, C5.
        strides: pixels of the image per cell of the maps.
        feature_info: the same as timm announces it: a dict with `num_chs`, `reduction`, `module` for each map.

    Raises:
        ValueError: an option does not fit the block, or a list has the wrong length.
    """

    output_fmt: ClassVar[str] = "NCHW"  # of the maps, as timm's models announce it
    conv1: nn.Module
    bn1: nn.Module
    relu: nn.Module
    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        block: Block,
        layers: Sequence[int],
        *,
        in_channels: int = 3,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] = (False, False, False),
        zero_init_residual: bool = False,
        norm_layer: NormLayer | type[nn.GroupNorm] = nn.BatchNorm2d,
        stride_in_1x1: bool = False,
        returned_layers: Sequence[int] = (1, 2, 3, 4),
        checkpoint_stages: Sequence[bool] = (False, False, False, False),
    ) -> None:
        super().__init__()
        if tuple(returned_layers) != tuple(sorted({*returned_layers, 4} & {1, 2, 3, 4})):
            raise ValueError(f"returned_layers must be numbers from 1 to 4, rising, 4 the last; got {returned_layers}")
        if len(layers) != 4 or min(layers) < 1:
            raise ValueError(f"layers must be four numbers of blocks, each at least 1; got {tuple(layers)}")
        if len(replace_stride_with_dilation) != 3:
            raise ValueError(
                f"replace_stride_with_dilation must be three booleans (C3, C4, C5); got {replace_stride_with_dilation}"
            )
        if len(checkpoint_stages) != 4:
            raise ValueError(f"checkpoint_stages must be four booleans (C2, C3, C4, C5); got {checkpoint_stages}")
        self.checkpoint_stages = tuple(checkpoint_stages)
        options = BlockOptions(resolve_norm_layer(norm_layer), groups, width_per_group, stride_in_1x1)
        self.in_channels = in_channels
        self.conv1 = nn.Conv2d(in_channels, STAGE_CHANNELS[0], 7, stride=2, padding=3, bias=False)
        self.bn1 = options.norm_layer(STAGE_CHANNELS[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)

        channels_in, total_stride, dilation = STAGE_CHANNELS[0], 4, 1
        strides = []
        dilated = (False, *replace_stride_with_dilation)
        for index, (channels, blocks) in enumerate(zip(STAGE_CHANNELS, layers, strict=True)):
            stride = 1 if index == 0 or dilated[index] else 2
            # The first block of a dilated stage keeps the dilation of the stage before it, as in torchvision.
            first_dilation = dilation
            if dilated[index]:
                dilation *= 2
            total_stride *= stride
            stage = make_stage(block, channels_in, channels, blocks, stride, first_dilation, dilation, options)
            setattr(self, f"layer{index + 1}", stage)
            channels_in = channels * block.expansion
            strides.append(total_stride)

        self.returned_layers = tuple(returned_layers)
        self.out_channels = tuple(STAGE_CHANNELS[layer - 1] * block.expansion for layer in self.returned_layers)
        self.strides = tuple(strides[layer - 1] for layer in self.returned_layers)
        self._initialise(zero_init_residual)

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        return [
            {"num_chs": channels, "reduction": stride, "module": f"layer{layer}"}
            for layer, channels, stride in zip(self.returned_layers, self.out_channels, self.strides, strict=True)
        ]

    @property
    def checkpointing(self) -> Changes:
        """Which stages of `checkpoint_stages` are computed again, and how; which are not, and why."""
        stages = {f"layer{number}": self.get_submodule(f"layer{number}") for number in (1, 2, 3, 4)}
        asked = {name for name, wanted in zip(stages, self.checkpoint_stages, strict=True) if wanted}
        return checkpointing_of({name: stage for name, stage in stages.items() if name in asked})

    def _initialise(self, zero_init_residual: bool) -> None:
        """He et al., Delving Deep into Rectifiers (2015), eq. 10, by fan-out; norms start as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, BasicBlock | Bottleneck):
                    _, last_norm = module.layers[-1]
                    nn.init.zeros_(cast(Tensor, last_norm.weight))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Feature maps of the stages.

        Args:
            images: Tensor[N, in_channels, H, W], floating point, H and W at least 1. N may be 0.

        Returns:
            C2, C3, C4, C5, or those of `returned_layers`:
            Tensor[N, out_channels[i], ceil(H / strides[i]), ceil(W / strides[i])].

        Raises:
            TypeError: `images` is not a floating-point tensor.
            ValueError: `images` is not of that shape.
        """
        check_images(images, self.in_channels)
        c1 = self.relu(self.bn1(self.conv1(images)))
        in_c2, in_c3, in_c4, in_c5 = self.checkpoint_stages
        c2 = run_stage(self.layer1, self.maxpool(c1), in_c2)
        c3 = run_stage(self.layer2, c2, in_c3)
        c4 = run_stage(self.layer3, c3, in_c4)
        c5 = run_stage(self.layer4, c4, in_c5)
        return tuple((c2, c3, c4, c5)[layer - 1] for layer in self.returned_layers)


def make_stage(
    block: Block,
    in_channels: int,
    channels: int,
    blocks: int,
    stride: int,
    first_dilation: int,
    dilation: int,
    options: BlockOptions,
) -> nn.Sequential:
    """One stage: the first block changes stride and channels, the others keep them."""
    out_channels = channels * block.expansion
    downsample = None
    if stride != 1 or in_channels != out_channels:
        downsample = nn.Sequential(conv1x1(in_channels, out_channels, stride), options.norm_layer(out_channels))
    first = block(in_channels, channels, stride, first_dilation, downsample, options)
    rest = [block(out_channels, channels, 1, dilation, None, options) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


def check_images(images: Tensor, channels: int) -> None:
    """Raise unless `images` is a floating-point Tensor[N, channels, H ≥ 1, W ≥ 1]."""
    if isinstance(images, Proxy):  # torch.fx records: there are no values yet
        return
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a Tensor[N, {channels}, H, W]; got {type(images).__name__}")
    if images.dim() != 4 or images.shape[1] != channels:
        raise ValueError(f"images must be a Tensor[N, {channels}, H, W]; got shape {tuple(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point (scaled and normalised); got {images.dtype}")
    if images.shape[2] < 1 or images.shape[3] < 1:
        raise ValueError(f"images must be at least 1×1 pixel; got shape {tuple(images.shape)}")


class ResNetClassifier(ResNet):
    """The trunk with global average pooling and `fc`: the form in which ImageNet checkpoints come.

    Args are `ResNet`'s, and `num_classes`, the width of `fc`. State keys are torchvision's, all of them.
    """

    def __init__(self, block: Block, layers: Sequence[int], *, num_classes: int = 1000, **options: Any) -> None:
        super().__init__(block, layers, **options)
        self.fc = nn.Linear(self.out_channels[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """Logits, Tensor[N, num_classes], of images Tensor[N, in_channels, H, W]."""
        c5 = super().forward(images)[-1]
        return cast(Tensor, self.fc(c5.mean(dim=(2, 3))))


class Variant(NamedTuple):
    title: str
    block: Block
    layers: tuple[int, int, int, int]
    groups: int = 1
    width_per_group: int = 64


VARIANTS = {
    "resnet18": Variant("ResNet-18", BasicBlock, (2, 2, 2, 2)),
    "resnet34": Variant("ResNet-34", BasicBlock, (3, 4, 6, 3)),
    "resnet50": Variant("ResNet-50", Bottleneck, (3, 4, 6, 3)),
    "resnet101": Variant("ResNet-101", Bottleneck, (3, 4, 23, 3)),
    "resnet152": Variant("ResNet-152", Bottleneck, (3, 8, 36, 3)),
    "resnext50_32x4d": Variant("ResNeXt-50, 32 groups of width 4", Bottleneck, (3, 4, 6, 3), 32, 4),
    "resnext101_32x8d": Variant("ResNeXt-101, 32 groups of width 8", Bottleneck, (3, 4, 23, 3), 32, 8),
    "resnext101_64x4d": Variant("ResNeXt-101, 64 groups of width 4", Bottleneck, (3, 4, 23, 3), 64, 4),
    "wide_resnet50_2": Variant("Wide ResNet-50, twice the inner width", Bottleneck, (3, 4, 6, 3), 1, 128),
    "wide_resnet101_2": Variant("Wide ResNet-101, twice the inner width", Bottleneck, (3, 4, 23, 3), 1, 128),
}

Trunk = TypeVar("Trunk", bound=ResNet)


def build(form: Callable[..., Trunk], name: str, **options: Any) -> Trunk:
    """The `ResNet` or `ResNetClassifier` of one named variant; `options` are that class's.

    Raises:
        ValueError: `name` is not one of `VARIANTS`.
    """
    if name not in VARIANTS:
        raise ValueError(f"unknown ResNet variant {name!r}; known: {', '.join(VARIANTS)}")
    _, block, layers, groups, width_per_group = VARIANTS[name]
    return form(block, layers, **{"groups": groups, "width_per_group": width_per_group, **options})


def constructor(name: str) -> Callable[..., ResNet]:
    """The function that builds the trunk of one variant."""

    def construct(**options: Any) -> ResNet:
        return build(ResNet, name, **options)

    construct.__name__ = construct.__qualname__ = name  # pickle finds it by them
    construct.__doc__ = f"A trunk: {VARIANTS[name].title}. `options` are those of `ResNet`."
    return construct


resnet18 = constructor("resnet18")
resnet34 = constructor("resnet34")
resnet50 = constructor("resnet50")
resnet101 = constructor("resnet101")
resnet152 = constructor("resnet152")
resnext50_32x4d = constructor("resnext50_32x4d")
resnext101_32x8d = constructor("resnext101_32x8d")
resnext101_64x4d = constructor("resnext101_64x4d")
wide_resnet50_2 = constructor("wide_resnet50_2")
wide_resnet101_2 = constructor("wide_resnet101_2")
