"""Top-down pathway: Lin et al., Feature Pyramid Networks for Object Detection (2017), section 3 and figure 3."""

# Annotations are not postponed: torch.fx writes those of forward() into its graphs, as names and not strings.

from collections.abc import Iterable, Sequence
from typing import Any, Literal, cast

from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F

from fpn._caller import refuse_bare_use
from fpn._changes import Changes
from fpn._maps import announced, announced_layout, as_maps
from fpn._recognition import all_is_watched, is_watched
from fpn._report import Report
from fpn.inference.fuse import fuse
from fpn.inference.fused_conv import FusedConv2d
from fpn.levels import EXTRA_LEVELS, ExtraFactory, make_conv
from fpn.norm import NormLayer
from fpn.preprocessing import Preprocessing

UPSAMPLE: dict[str, dict[str, Any]] = {
    "bilinear": {"mode": "bilinear", "align_corners": False},
    "nearest": {"mode": "nearest"},
}


class FPN(nn.Module):
    """Feature Pyramid Network over any bottom-up module.

    By default the top-down pathway upsamples bilinearly and leaves the coarsest map unsmoothed;
    `upsample="nearest", smooth_top=True` is the paper's pyramid, and torchvision's, detectron2's and mmdetection's.

    Args:
        bottom_up: images -> feature maps, finest first, as a sequence or a dict: a trunk of `fpn.resnet`, a timm
            `features_only` model, `fpn.detection.torchvision_trunk`, torchvision's `create_feature_extractor`, any
            module of yours. Maps are Tensor[N, C, H, W]; or Tensor[N, H, W, C] where its attribute `output_fmt` is
            "NHWC", as timm's Swin has it, or where it has no such attribute and only that layout fits their shapes.
        in_channels: channels of those maps. None: as `bottom_up.feature_info` announces them (ours and timm's do).
        strides: pixels of the image per cell of those maps. None: as announced.
        out_channels: channels of every level.
        upsample: "bilinear" (align_corners=False) or "nearest", always to the exact size of the finer lateral.
        smooth_top: whether the coarsest level has its 3×3 convolution too.
        extra: levels above: None, "maxpool" (P6), "p6p7" (from C5), "p6p7_on_p5", or what makes them:
            (channels of C5, `out_channels`) -> `ExtraLevels`, e.g. `functools.partial(P6P7, relu=False)`.
        norm_layer: `channels -> module` after every lateral and smoothing convolution, which then have no bias.

    Attributes:
        in_channels: channels of the maps of `bottom_up`.
        out_channels: channels of every level.
        strides: pixels of the image per cell of every level, extra levels included.
        report: how its checkpoint was loaded; None where none was.
        preprocessing: what the source of its checkpoint feeds it, an `fpn.preprocessing.Preprocessing`; else None.
        freezing: what `trainable_layers` has frozen, and what of those layers it has left and why; else None.
        fusion: of a model that `fuse` has made: what was fused, and what computes as before and why; else None.

    Raises:
        ValueError: an option is unknown, or channels and strides are neither announced nor given.
    """

    def __init__(
        self,
        bottom_up: nn.Module,
        in_channels: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
        *,
        out_channels: int = 256,
        upsample: Literal["bilinear", "nearest"] = "bilinear",
        smooth_top: bool = False,
        extra: Literal["maxpool", "p6p7", "p6p7_on_p5"] | ExtraFactory | None = None,
        norm_layer: NormLayer | type[nn.GroupNorm] | None = None,
    ) -> None:
        super().__init__()
        if upsample not in UPSAMPLE:
            raise ValueError(f"upsample must be one of {list(UPSAMPLE)}; got {upsample!r}")
        if not callable(extra) and extra not in EXTRA_LEVELS:
            raise ValueError(f"extra must be one of {list(EXTRA_LEVELS)} or make ExtraLevels; got {extra!r}")
        announced_channels, announced_strides = announced(bottom_up)
        self.in_channels = tuple(in_channels or announced_channels)
        map_strides = tuple(strides or announced_strides)
        if not self.in_channels or len(map_strides) != len(self.in_channels):
            raise ValueError(
                "in_channels and strides must give the channels and the stride of each map of bottom_up, finest "
                f"first, where bottom_up.feature_info does not; got in_channels={in_channels}, strides={strides}, "
                f"announced {announced_channels} and {announced_strides}"
            )

        self.bottom_up = bottom_up
        self.map_layout = announced_layout(bottom_up)
        # Top-down order (C5, C4, C3, C2), the order in which the pathway uses them.
        self.lateral = nn.ModuleList(
            make_conv(channels, out_channels, 1, norm_layer=norm_layer) for channels in reversed(self.in_channels)
        )
        self.smooth = nn.ModuleList(
            make_conv(out_channels, out_channels, 3, norm_layer=norm_layer) for _ in self.in_channels
        )
        if not smooth_top:
            self.smooth[0] = nn.Identity()
        make_extra = extra if callable(extra) else EXTRA_LEVELS[extra]
        self.extra = make_extra(self.in_channels[-1], out_channels)
        self.upsample = upsample
        self.out_channels = out_channels
        self.strides = map_strides + tuple(map_strides[-1] * stride for stride in self.extra.strides)
        self.report: Report | None = None
        self.preprocessing: Preprocessing | None = None
        self.freezing: Changes | None = None
        self.fusion: Changes | None = None

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The pyramid, finest level first: P2, P3, P4, P5, then the extra levels.

        Args:
            images: what `bottom_up` takes; for our trunks Tensor[N, 3, H, W], floating point, any H and W from 1.

        Returns:
            Tensor[N, out_channels, ceil(H / s), ceil(W / s)] for each s of `strides`. N = 0 gives empty maps.

        Raises:
            TypeError, ValueError: `images` is not what `bottom_up` takes, or its maps are not those announced; or the
                model is the backbone of a torchvision detector, which takes a `fpn.detection.TorchvisionBackbone`.
        """
        refuse_bare_use(self)
        maps = as_maps(self.bottom_up(images), self.in_channels, self.map_layout)
        levels = top_down(maps, self.lateral, self.smooth, self.upsample)
        return (*levels, *self.extra(maps[-1], levels[-1]))

    def fuse(self) -> "FPN":
        """The inference form: the same outputs, within rounding, in less time and memory.

        Batch norm, plain or frozen, and the activation after it are put into the convolutions of a trunk of
        `fpn.resnet`, of the neck and of P6 and P7. Every map from the first convolution to the levels is in
        channels_last memory, in which the RoI operators read it without a copy; on a GPU, PyTorch's GroupNorm gives
        contiguous maps. Weights are contiguous, and what `torch.export` makes of the model has no layout of ours.

        A layer is fused if its class, its parameters and its hooks say what it computes: `nn.Conv2d`; `nn.BatchNorm2d`,
        `nn.SyncBatchNorm` and FrozenBatchNorm2d with statistics; ReLU, LeakyReLU, ReLU6, Hardtanh, Hardswish, SiLU and
        GELU, or another activation after the convolution and its norm; `nn.Sequential` of these; blocks and stages
        of `fpn.resnet`. All else computes as before: other classes, subclasses, wrappers, what has hooks, a method of
        its own, a parametrization or pruning. Such parts are named, with the reason, in the new model's `fusion.left`,
        which is also logged, at level WARNING where there are any.

        On the CPU 3×3 convolutions of many channels are computed by Winograd's algorithm (`fpn/inference/winograd.py`).
        float16 and bfloat16 are computed in float32 and rounded after each convolution, where the processor has no
        arithmetic for them. Each convolution keeps its weights also in the forms in which they are used, for Winograd's
        algorithm four times as large: some 220 MB for an `FPN50`. A value that is not finite may spread to outputs four
        cells away, and a ReLU may give 0 for NaN. None of this is done where a gradient is recorded, or in what is
        traced or compiled.

        Returns:
            A new model in eval mode that takes no gradient for its weights; this one is as it was, and it is this
            one whose checkpoints are loaded and saved: `model = FPN50(weights=path).eval().fuse()`.

        Raises:
            ValueError: the model, or a batch norm in it, is in training mode.
            RuntimeError: something that is in the model cannot be copied.
        """
        fused, changes = fuse(self, FPN)
        fused.fusion = changes
        return fused


def top_down(
    maps: Sequence[Tensor], laterals: Iterable[nn.Module], smooths: Iterable[nn.Module], upsample: str
) -> list[Tensor]:
    """The levels that have a lateral, finest first.

    Args:
        maps: of the bottom-up pathway, finest first.
        laterals, smooths: a module for each map, for the coarsest first.
        upsample: one of `UPSAMPLE`.
    """
    (top, c5), *finer = zip(laterals, reversed(maps), strict=True)
    merged = [top(c5)]
    for lateral, c in finer:
        upsampled = F.interpolate(merged[-1], c.shape[-2:], **UPSAMPLE[upsample])
        merged.append(add_lateral(upsampled, lateral, c))
    return [smooth(m) for smooth, m in zip(smooths, merged, strict=True)][::-1]


def add_lateral(upsampled: Tensor, lateral: nn.Module, c: Tensor) -> Tensor:
    """lateral(c) + upsampled, written into `upsampled`, which only a graph of torch.fx may still need."""
    if isinstance(upsampled, Proxy):
        return upsampled + cast(Tensor, lateral(c))
    if type(lateral) is FusedConv2d and lateral.activation is None and not is_watched(lateral):
        return cast(Tensor, lateral(c, upsampled, not all_is_watched()))
    return upsampled.add_(lateral(c))
