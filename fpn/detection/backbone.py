"""The backbone that `accelerate` puts in: our computation, in torchvision's module tree and under its state keys."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from fpn._changes import Changes
from fpn._recognition import is_sequence
from fpn.detection.adapters import level_names, scales_of
from fpn.pyramid import FPN, top_down


class TorchvisionNeck(nn.Module):
    """The part of an FPN above the trunk, its layers named as in `torchvision.ops.FeaturePyramidNetwork`."""

    _version = 2  # as torchvision's, whose files before 0.13 lack the ".0" of a convolution without norm

    def __init__(self, fpn: FPN) -> None:
        super().__init__()
        self.upsample = fpn.upsample
        self.inner_blocks = nn.ModuleList(as_block(layer) for layer in reversed(fpn.lateral))
        self.layer_blocks = nn.ModuleList(as_block(layer) for layer in reversed(fpn.smooth))
        self.extra_blocks = fpn.extra
        for module in (self, self.inner_blocks, self.layer_blocks):
            module.training = fpn.training

    def forward(self, maps: tuple[Tensor, ...]) -> list[Tensor]:
        levels = top_down(maps, list(self.inner_blocks)[::-1], list(self.layer_blocks)[::-1], self.upsample)
        return [*levels, *self.extra_blocks(maps[-1], levels[-1])]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for blocks in ("inner_blocks", "layer_blocks"):
            for index in range(len(self.inner_blocks)):
                for leaf in ("weight", "bias"):
                    old = f"{prefix}{blocks}.{index}.{leaf}"
                    if old in state_dict:
                        state_dict[f"{prefix}{blocks}.{index}.0.{leaf}"] = state_dict.pop(old)
        super()._load_from_state_dict(state_dict, prefix, *args)


class AcceleratedBackbone(nn.Module):
    """A pyramid of torchvision's kind in the place of `torchvision.models.detection.backbone_utils.BackboneWithFPN`.

    `body`, `fpn.inner_blocks`, `fpn.layer_blocks` and `fpn.extra_blocks` have the same places and the same order as in
    torchvision's: state dicts, names of parameters and the state of optimizers are interchangeable. The fused form has
    other weights with other names.

    Args:
        fpn: over a ResNet, with nearest upsampling, smoothing of the coarsest level and levels above. Its layers are
            taken.

    Attributes:
        out_channels: channels of every level.
        strides: pixels of the image per cell of every level.
        names: of the levels, finest first.
        fusion: of what `fuse` has made: what was fused, and what computes as before and why; else None.
    """

    def __init__(self, fpn: FPN) -> None:
        super().__init__()
        self.body = fpn.bottom_up
        self.fpn = TorchvisionNeck(fpn)
        self.out_channels = fpn.out_channels
        self.strides = fpn.strides
        self.names = level_names(fpn)
        self.fusion: Changes | None = None if fpn.fusion is None else renamed(fpn.fusion, len(fpn.lateral))
        self.training = fpn.training

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Images Tensor[N, 3, H, W] -> name: Tensor[N, out_channels, ceil(H / stride), ceil(W / stride)]."""
        return OrderedDict(zip(self.names, self.fpn(self.body(images)), strict=True))

    @property
    def spatial_scales(self) -> dict[str, float]:
        """Of each level by its name, cells per pixel: what `roi.MultiScaleRoIAlign(spatial_scales=)` takes."""
        return scales_of(self)

    def pyramid(self) -> FPN:
        """An FPN with these layers."""
        neck = self.fpn
        with torch.device("meta"):
            fpn = FPN(
                self.body,
                out_channels=self.out_channels,
                upsample="nearest",
                smooth_top=True,
                extra=lambda c5_channels, out_channels: neck.extra_blocks,
            )
        fpn.lateral = nn.ModuleList(as_layer(block) for block in reversed(neck.inner_blocks))
        fpn.smooth = nn.ModuleList(as_layer(block) for block in reversed(neck.layer_blocks))
        for module in (fpn, fpn.lateral, fpn.smooth):
            module.training = self.training
        return fpn

    def fuse(self) -> AcceleratedBackbone:
        """The inference form, as `FPN.fuse`."""
        return AcceleratedBackbone(self.pyramid().fuse()).eval()


def as_block(layer: nn.Module) -> nn.Module:
    """A convolution of our neck as torchvision holds it: in a Sequential, also where no norm follows."""
    return nn.Sequential(layer).train(layer.training) if isinstance(layer, nn.Conv2d) else layer


def as_layer(block: nn.Module) -> nn.Module:
    return next(block.children()) if is_sequence(block) and len(list(block.children())) == 1 else block


def renamed(fusion: Changes, laterals: int) -> Changes:
    """The report on an FPN of so many lateral convolutions, with the names of the parts of an `AcceleratedBackbone`."""

    def own_name(name: str) -> str:
        part, *rest = name.split(".")
        if part == "bottom_up":
            return ".".join(["body", *rest])
        if part == "extra":
            return ".".join(["fpn.extra_blocks", *rest])
        blocks = {"lateral": "inner_blocks", "smooth": "layer_blocks"}[part]
        return ".".join(["fpn", blocks, str(laterals - 1 - int(rest[0])), *rest[1:]])

    replaced = {own_name(name): what for name, what in fusion.replaced.items()}
    return Changes(replaced, {own_name(name): why for name, why in fusion.left.items()})
