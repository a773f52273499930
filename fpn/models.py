"""FPN18 … FPN152: pyramids over ResNets, built, loaded and frozen."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, cast

from torch import nn

from fpn._freezing import freeze
from fpn.levels import ExtraFactory
from fpn.norm import NormLayer
from fpn.pyramid import FPN
from fpn.resnet import ResNet, build
from fpn.weights import load_weights

Options = ParamSpec("Options")


def build_fpn(
    variant: str,
    weights: str | Path | Mapping[str, Any] | None = None,
    *,
    trainable_layers: int = 5,
    norm_layer: NormLayer | type[nn.GroupNorm] = nn.BatchNorm2d,
    neck_norm_layer: NormLayer | type[nn.GroupNorm] | None = None,
    out_channels: int = 256,
    upsample: Literal["bilinear", "nearest"] = "bilinear",
    smooth_top: bool = False,
    extra: Literal["maxpool", "p6p7", "p6p7_on_p5"] | ExtraFactory | None = None,
    trunk: Mapping[str, Any] | None = None,
    weights_key: str | None = None,
    adapt_channels: bool = False,
) -> FPN:
    """An FPN over the trunk `variant` of `fpn.resnet.VARIANTS`.

    Args:
        weights: None for random weights; a name of torchvision's for the trunk's ImageNet weights
            ("IMAGENET1K_V1", "IMAGENET1K_V2", "DEFAULT"); the path of a checkpoint, or its state dict. A classifier's
            checkpoint fills the trunk. One of a whole FPN or of a detector must fit the model; `fpn.from_checkpoint`
            builds the model that fits.
        trainable_layers: 0 to 5: how many of layer4, layer3, layer2, layer1 and the stem are trained, from the top.
            The parameters and batch norm of the others are frozen, as torchvision's `trainable_backbone_layers`
            says. Default 5.
        norm_layer: `channels -> module`, the norm of the trunk, as in torchvision's `resnet_fpn_backbone`:
            `nn.BatchNorm2d` (which small batches train badly), `fpn.norm.FrozenBatchNorm2d`, `nn.SyncBatchNorm` or
            `nn.GroupNorm`.
        neck_norm_layer: `channels -> module` after every lateral and smoothing convolution; None for none.
        out_channels: channels of every level.
        upsample, smooth_top, extra: as `FPN`.
        trunk: further options of `fpn.resnet.ResNet`, e.g. `{"stride_in_1x1": True}`.
        weights_key: which of several models in a checkpoint, as `fpn.weights.read_checkpoint` takes it: "model_ema".
        adapt_channels: whether weights for three channels go into a trunk for another number (`trunk={"in_channels":
            4}`): their sum for one channel, else the weights again and again, times 3 / `in_channels`, as timm has it.

    Returns:
        The model, Tensor[N, 3, H, W] -> (P2, P3, P4, P5), and the levels of `extra`.

    Raises:
        ValueError: an option or a name is unknown, or the checkpoint does not fit (`fpn.weights.CheckpointError`).
        OSError: the weights are not there and cannot be downloaded.
    """
    model = FPN(
        build(ResNet, variant, **{"norm_layer": norm_layer, **(trunk or {})}),
        out_channels=out_channels,
        upsample=upsample,
        smooth_top=smooth_top,
        extra=extra,
        norm_layer=neck_norm_layer,
    )
    if weights is not None:
        channels = cast(nn.Conv2d, model.bottom_up.get_submodule("conv1")).in_channels if adapt_channels else None
        model.report = load_weights(model, weights, variant, weights_key, channels)
    model.freezing = freeze(model.bottom_up, trainable_layers)
    return model


def constructor(build: Callable[Concatenate[str, Options], FPN], name: str, variant: str) -> Callable[Options, FPN]:
    """`build` for one variant: a function of that name, with the signature and the help of `build`."""

    def construct(*args: Options.args, **options: Options.kwargs) -> FPN:
        return build(variant, *args, **options)

    signature = inspect.signature(build)
    _, *parameters = signature.parameters.values()
    function: Any = construct
    function.__name__ = function.__qualname__ = name  # pickle finds it by them
    function.__signature__ = signature.replace(parameters=parameters)
    function.__doc__ = (build.__doc__ or "").replace("the trunk `variant` of `fpn.resnet.VARIANTS`", f"`{variant}`")
    return construct


FPN18 = constructor(build_fpn, "FPN18", "resnet18")
FPN34 = constructor(build_fpn, "FPN34", "resnet34")
FPN50 = constructor(build_fpn, "FPN50", "resnet50")
FPN101 = constructor(build_fpn, "FPN101", "resnet101")
FPN152 = constructor(build_fpn, "FPN152", "resnet152")
