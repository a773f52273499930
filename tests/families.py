"""The families of timm's trunks that run through `FPN`, a small member of each. `docs/trunks.md` is their table."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Family(NamedTuple):
    name: str
    options: Mapping[str, Any] = MappingProxyType({})
    size: tuple[int, int] = (96, 64)  # of the images
    layout: str = "NCHW"


FAMILIES: dict[str, Family] = {
    "ConvNeXt": Family("convnext_atto"),
    "ConvNeXt V2": Family("convnextv2_atto"),
    "CSPNet": Family("cspresnet50"),
    "DarkNet": Family("darknet53"),
    "DenseNet": Family("densenet121"),
    "DLA": Family("dla34"),
    "EdgeNeXt": Family("edgenext_xx_small"),
    "EfficientFormerV2": Family("efficientformerv2_s0", size=(224, 224)),
    "EfficientNet": Family("efficientnet_b0"),
    "EfficientNetV2": Family("efficientnetv2_rw_t"),
    "FastViT": Family("fastvit_t8"),
    "FocalNet": Family("focalnet_tiny_srf"),
    "GhostNet": Family("ghostnet_100"),
    "HGNet V2": Family("hgnetv2_b0"),
    "Hiera": Family("hiera_tiny_224", size=(224, 224)),
    "HRNet": Family("hrnet_w18_small"),
    "InceptionNeXt": Family("inception_next_atto"),
    "MaxViT": Family("maxvit_rmlp_pico_rw_256", size=(256, 256)),
    "MobileNetV3": Family("mobilenetv3_small_050"),
    "MobileNetV4": Family("mobilenetv4_conv_small_050"),
    "MobileViT": Family("mobilevit_xxs"),
    "MViTv2": Family("mvitv2_tiny", size=(224, 224)),
    "NFNet": Family("dm_nfnet_f0"),
    "PoolFormer": Family("poolformer_s12"),
    "PVT v2": Family("pvt_v2_b0"),
    "RegNet": Family("regnety_002"),
    "RepVGG": Family("repvgg_a0"),
    "Res2Net": Family("res2net50_26w_4s"),
    "ResNeSt": Family("resnest14d"),
    "ResNet": Family("resnet18"),
    "ResNetV2": Family("resnetv2_50"),
    "SENet": Family("seresnet18"),
    "Swin": Family("swin_tiny_patch4_window7_224", {"img_size": (96, 64)}, layout="NHWC"),
    "Swin V2": Family("swinv2_tiny_window8_256", {"img_size": (96, 64)}, layout="NHWC"),
    "TinyViT": Family("tiny_vit_5m_224", size=(224, 224)),
    "TResNet": Family("tresnet_m"),
    "VGG": Family("vgg11"),
    "VoVNet": Family("ese_vovnet19b_dw"),
    "Xception": Family("xception41"),
}
SLICE = ("Swin", "MobileNetV3", "EdgeNeXt", "ResNet")  # in every run
