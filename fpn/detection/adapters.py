"""Our pyramids under the protocols of torchvision's and detectron2's detectors; neither has to be installed."""

# Annotations are not postponed: torch.fx writes those of forward() into its graphs, as names and not strings.

import math
from collections import OrderedDict
from typing import NamedTuple, Protocol

from torch import Tensor, nn
from torch.nn import functional as F

from fpn.levels import MaxPoolLevel
from fpn.pyramid import FPN
from fpn.simple_pyramid import SimpleFeaturePyramid


class _NamedLevels(nn.Module):
    """The levels of an FPN, and P6 by `MaxPoolLevel`'s subsampling where the FPN has none above P5."""

    def __init__(self, fpn: FPN | SimpleFeaturePyramid) -> None:
        super().__init__()
        if not isinstance(fpn, FPN | SimpleFeaturePyramid):
            raise TypeError(f"fpn must be an fpn.FPN or an fpn.SimpleFeaturePyramid; got {type(fpn).__name__}")
        self.fpn = fpn
        self.out_channels = fpn.out_channels
        self.strides = fpn.strides if fpn.extra.strides else (*fpn.strides, 2 * fpn.strides[-1])

    def levels(self, images: Tensor) -> tuple[Tensor, ...]:
        levels: tuple[Tensor, ...] = self.fpn(images)
        return levels if self.fpn.extra.strides else (*levels, F.max_pool2d(levels[-1], kernel_size=1, stride=2))


def level_names(fpn: FPN | SimpleFeaturePyramid) -> tuple[str, ...]:
    """torchvision's names of the levels, "pool" included where the pyramid has none above its coarsest."""
    made_of_maps = len(fpn.strides) - len(fpn.extra.strides)
    above = [f"p{round(math.log2(stride))}" for stride in fpn.strides[made_of_maps:]]
    if not fpn.extra.strides or isinstance(fpn.extra, MaxPoolLevel):
        above = ["pool"]
    return (*map(str, range(made_of_maps)), *above)


class NamedStrides(Protocol):
    """A backbone whose levels have names and strides, finest first."""

    names: tuple[str, ...]
    strides: tuple[int, ...]


def scales_of(backbone: NamedStrides) -> dict[str, float]:
    return {name: 1 / stride for name, stride in zip(backbone.names, backbone.strides, strict=True)}


class TorchvisionBackbone(_NamedLevels):
    """An FPN as the backbone of torchvision's FasterRCNN, MaskRCNN, KeypointRCNN, RetinaNet and FCOS.

        FasterRCNN(TorchvisionBackbone(FPN101()), num_classes=91)
        RetinaNet(TorchvisionBackbone(FPN(resnet50(returned_layers=(2, 3, 4)), extra="p6p7")), num_classes=91)

    An FPN without extra levels gets "pool", as torchvision's own, so that there are five levels for its anchors.

    Args:
        fpn: the pyramid, an `fpn.FPN` or an `fpn.SimpleFeaturePyramid`.

    Attributes:
        out_channels: channels of every level.
        strides: pixels of the image per cell of every level.
        names: of the levels, finest first: "0", "1", … for those with a lateral; above them "pool" for `MaxPoolLevel`,
            else "p6", "p7", by stride.

    Raises:
        TypeError: `fpn` is neither.
    """

    def __init__(self, fpn: FPN | SimpleFeaturePyramid) -> None:
        super().__init__(fpn)
        self.names = level_names(fpn)

    @property
    def spatial_scales(self) -> dict[str, float]:
        """Of each level by its name, cells per pixel: what `roi.MultiScaleRoIAlign(spatial_scales=)` takes."""
        return scales_of(self)

    def fuse(self) -> "TorchvisionBackbone":
        """The inference form, as `FPN.fuse`.

        Raises:
            ValueError: a part is in training mode, or the pyramid has no such form.
        """
        if not isinstance(self.fpn, FPN):
            raise ValueError(f"{type(self.fpn).__name__} has no fused form")
        return TorchvisionBackbone(self.fpn.fuse()).eval()

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Images Tensor[N, 3, H, W] -> name: Tensor[N, out_channels, ceil(H / stride), ceil(W / stride)]."""
        return OrderedDict(zip(self.names, self.levels(images), strict=True))


class ShapeSpec(NamedTuple):
    """Channels and stride of a map, as detectron2's class of this name has them."""

    channels: int | None = None
    height: int | None = None
    width: int | None = None
    stride: int | None = None


class Detectron2Backbone(_NamedLevels):
    """An FPN under detectron2's `Backbone` protocol: its levels in a dict, "p2" and so on by stride.

    detectron2's models take it. `build_backbone` asserts that it got a `Backbone`; call
    `detectron2.modeling.Backbone.register(Detectron2Backbone)` before. An FPN without extra levels gets P6 by
    subsampling, as detectron2's own. Images are in detectron2's order and scale if the weights are, as `FPN.report`
    says.

    Args:
        fpn: the pyramid, an `fpn.FPN` or an `fpn.SimpleFeaturePyramid`.

    Raises:
        TypeError: `fpn` is neither.
        ValueError: its strides are not different powers of two.
    """

    def __init__(self, fpn: FPN | SimpleFeaturePyramid) -> None:
        super().__init__(fpn)
        if len(set(self.strides)) < len(self.strides) or any(stride & (stride - 1) for stride in self.strides):
            raise ValueError(f"fpn must have strides that are different powers of two; got {self.strides}")
        self.names = tuple(f"p{stride.bit_length() - 1}" for stride in self.strides)

    @property
    def size_divisibility(self) -> int:
        """What detectron2 pads height and width to a multiple of: the stride of the coarsest level with a lateral."""
        return self.fpn.strides[-1 - len(self.fpn.extra.strides)]

    @property
    def padding_constraints(self) -> dict[str, int]:
        """Empty: `size_divisibility` is all that an FPN needs."""
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
