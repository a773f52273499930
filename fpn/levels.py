"""The convolutions of a pyramid, and the levels above its coarsest lateral."""

# Annotations are not postponed: torch.fx writes those of forward() into its graphs, as names and not strings.

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from fpn.norm import NormLayer, resolve_norm_layer


def make_conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
    norm_layer: NormLayer | type[nn.GroupNorm] | None = None,
) -> nn.Module:
    """A "same" convolution, LeCun-uniform as torchvision's and detectron2's necks, and its norm if there is one."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=norm_layer is None)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    if norm_layer is None:
        return conv
    return nn.Sequential(conv, resolve_norm_layer(norm_layer)(out_channels))


class ExtraLevels(nn.Module):
    """Levels above the coarsest lateral; in this base class none.

    Args:
        c5_channels: channels of C5, the coarsest map of the bottom-up pathway.
        out_channels: channels of P5 and of the levels made here.
    """

    strides: tuple[int, ...] = ()  # in cells of P5

    def __init__(self, c5_channels: int, out_channels: int) -> None:
        super().__init__()

    def forward(self, c5: Tensor, p5: Tensor) -> list[Tensor]:
        return []


class MaxPoolLevel(ExtraLevels):
    """P6 as every second cell of P5 (Lin et al. 2017, footnote in section 4.1)."""

    strides = (2,)

    def forward(self, c5: Tensor, p5: Tensor) -> list[Tensor]:
        return [F.max_pool2d(p5, kernel_size=1, stride=2)]


class P6P7(ExtraLevels):
    """P6 and P7 by 3×3 convolutions of stride 2 (Lin et al., Focal Loss, 2017, sec. 4).

    Args:
        c5_channels, out_channels: as `ExtraLevels`.
        on_p5: P6 is made from P5, as in torchvision's first RetinaNet, and not from C5.
        relu: whether a ReLU stands between P6 and P7. In mmdetection only with `relu_before_extra_convs`.
        norm_layer: after both convolutions, as in mmdetection's necks with norm.
    """

    strides = (2, 4)

    def __init__(
        self,
        c5_channels: int,
        out_channels: int,
        *,
        on_p5: bool = False,
        relu: bool = True,
        norm_layer: NormLayer | type[nn.GroupNorm] | None = None,
    ) -> None:
        super().__init__(c5_channels, out_channels)
        self.on_p5 = on_p5
        self.relu = relu
        self.p6 = make_conv(out_channels if on_p5 else c5_channels, out_channels, 3, stride=2, norm_layer=norm_layer)
        self.p7 = make_conv(out_channels, out_channels, 3, stride=2, norm_layer=norm_layer)

    def forward(self, c5: Tensor, p5: Tensor) -> list[Tensor]:
        p6 = self.p6(p5 if self.on_p5 else c5)
        return [p6, self.p7(F.relu(p6) if self.relu else p6)]


ExtraFactory = Callable[[int, int], ExtraLevels]  # channels of C5, channels of the pyramid

EXTRA_LEVELS: dict[str | None, ExtraFactory] = {
    None: ExtraLevels,
    "maxpool": MaxPoolLevel,
    "p6p7": P6P7,
    "p6p7_on_p5": partial(P6P7, on_p5=True),
}
