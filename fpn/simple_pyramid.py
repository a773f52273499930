"""ViTDet's pyramid from one map: Li et al., Exploring Plain Vision Transformer Backbones (2022), section 3."""

# Annotations are not postponed: torch.fx writes those of forward() into its graphs, as names and not strings.

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

from torch import Tensor, nn

from fpn._caller import refuse_bare_use
from fpn._maps import announced, announced_layout, as_maps
from fpn.levels import EXTRA_LEVELS
from fpn.norm import NormLayer, resolve_norm_layer


class ChannelLayerNorm(nn.LayerNorm):
    """Layer norm over the channels of each cell of Tensor[N, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class NormedConv2d(nn.Conv2d):
    """A convolution that holds its norm, as the published names have it: `weight`, `norm.weight`, `norm.bias`."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, norm: nn.Module | None) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=norm is None)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.norm is None else cast(Tensor, self.norm(y))


class SimpleFeaturePyramid(nn.Module):
    """ViTDet's simple feature pyramid over a trunk with one map, such as a plain ViT.

    The map of stride 16 becomes maps of strides 4, 8, 16 and 32 by transposed convolutions, or by max pooling; each has
    its 1×1 and 3×3 convolution, and there is no top-down pathway. State keys are those of detectron2's ViTDet without
    "backbone.": `simfp_2.0.weight`, …, where the number is the level's, and `net.` for the trunk.

        trunk = timm.create_model("vit_base_patch16_224", features_only=True, out_indices=(-1,), dynamic_img_size=True)
        model = SimpleFeaturePyramid(trunk, extra="maxpool")
        published = read_checkpoint("vitdet.pkl")
        neck = {name[9:]: value for name, value in published.items() if name.startswith("backbone.simfp_")}
        model.load_state_dict(neck, strict=False)  # the trunk has its own names

    Args:
        net: images -> one map, Tensor[N, C, H, W], alone or the last of a sequence or a dict; Tensor[N, H, W, C] as for
            `fpn.FPN`.
        in_channels: of the map. None: as `net.feature_info` announces it.
        stride: pixels of the image per cell of the map, a power of two. None: as announced.
        out_channels: channels of every level.
        scale_factors: of the levels, finest first: some of 4, 2, 1 and 1/2.
        extra: levels above: None, "maxpool" or "p6p7_on_p5", as for `fpn.FPN`.
        norm_layer: `channels -> module` after the convolutions, which then have no bias; None: no norm. Default layer
            norm over the channels, as published.

    Attributes:
        out_channels: channels of every level.
        strides: pixels of the image per cell of every level, extra levels included.

    Raises:
        ValueError: an option is unknown, or channels and stride are neither announced nor given.
    """

    def __init__(
        self,
        net: nn.Module,
        in_channels: int | None = None,
        stride: int | None = None,
        *,
        out_channels: int = 256,
        scale_factors: Sequence[float] = (4.0, 2.0, 1.0, 0.5),
        extra: Literal["maxpool", "p6p7_on_p5"] | None = None,
        norm_layer: NormLayer | type[nn.GroupNorm] | None = ChannelLayerNorm,
    ) -> None:
        super().__init__()
        if extra not in (None, "maxpool", "p6p7_on_p5"):
            raise ValueError(f"extra must be None, 'maxpool' or 'p6p7_on_p5'; got {extra!r}")
        scales = tuple(float(scale) for scale in scale_factors)
        if not scales or not {*scales} <= {4.0, 2.0, 1.0, 0.5} or list(scales) != sorted({*scales}, reverse=True):
            raise ValueError(f"scale_factors must be some of 4, 2, 1 and 0.5, falling; got {scale_factors}")
        announced_channels, announced_strides = announced(net)
        channels = in_channels or (announced_channels or (0,))[-1]
        map_stride = stride or (announced_strides or (0,))[-1]
        if channels < 1 or map_stride < 1:
            raise ValueError(
                "in_channels and stride must give the channels and the stride of net's map where net.feature_info does "
                f"not; got in_channels={in_channels}, stride={stride}"
            )
        if map_stride & (map_stride - 1) or map_stride < scales[0]:
            raise ValueError(
                f"stride must be a power of two, {scales[0]:g} or more: a level's number is its log2; got {map_stride}"
            )
        self.in_channels = channels
        self.out_channels = out_channels
        self.map_layout = announced_layout(net)
        make_norm = None if norm_layer is None else resolve_norm_layer(norm_layer)
        level_strides = tuple(round(map_stride / scale) for scale in scales)
        self.levels = tuple(f"simfp_{int(math.log2(level_stride))}" for level_stride in level_strides)
        for name, scale in zip(self.levels, scales, strict=True):
            self.add_module(name, make_level(channels, out_channels, scale, make_norm))
        self.net = net
        self.extra = EXTRA_LEVELS[extra](channels, out_channels)
        self.strides = level_strides + tuple(level_strides[-1] * above for above in self.extra.strides)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The pyramid, finest level first: P2, P3, P4, P5, then the extra levels.

        Args:
            images: what `net` takes. For a patch size of 16, H and W are to be multiples of it.

        Returns:
            Tensor[N, out_channels, h · scale, w · scale] for a map of h × w cells, rounded up for 1/2.

        Raises:
            TypeError, ValueError: as `fpn.FPN`.
        """
        refuse_bare_use(self)
        (c,) = as_maps([last_map(self.net(images))], (self.in_channels,), self.map_layout)
        levels = [self.get_submodule(name)(c) for name in self.levels]
        return (*levels, *self.extra(c, levels[-1]))


def last_map(output: Any) -> Any:
    """The map of a trunk that returns it alone, or in a sequence or a dict as the last."""
    if isinstance(output, dict):
        return list(output.values())[-1]
    return output[-1] if isinstance(output, (list, tuple)) else output


def make_level(channels: int, out_channels: int, scale: float, norm: NormLayer | None) -> nn.Sequential:
    layers: list[nn.Module] = []
    if scale == 4:
        half = channels // 2
        between = nn.Identity() if norm is None else norm(half)
        layers = [deconv(channels, half), between, nn.GELU(), deconv(half, channels // 4)]
    elif scale == 2:
        layers = [deconv(channels, channels // 2)]
    elif scale == 0.5:
        layers = [nn.MaxPool2d(2, stride=2, ceil_mode=True)]  # a map of an odd side loses no cell
    width = channels // int(max(scale, 1))
    for size in (1, 3):
        layers.append(NormedConv2d(width, out_channels, size, None if norm is None else norm(out_channels)))
        width = out_channels
    return nn.Sequential(*layers)


def deconv(in_channels: int, out_channels: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2)
