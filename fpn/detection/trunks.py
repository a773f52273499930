"""torchvision's classifiers, by name, as trunks: ConvNeXt, Swin, EfficientNet, ViT, …"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fpn.preprocessing import IMAGENET

# Children of a classifier that come after its maps, or beside them.
HEADS = ("avgpool", "classifier", "fc", "head", "heads", "norm", "permute", "flatten", "dropout")
BESIDE = ("aux1", "aux2", "AuxLogits")
PROBE = 224  # pixels; MaxViT takes no other size


class TorchvisionTrunk(nn.Module):
    """A classifier of torchvision's without its head, for `fpn.FPN`. State keys are torchvision's.

    Args:
        model: the classifier: modules called one after the other. They are taken out of it.
        strides: of the maps that are returned, finest first.

    Attributes:
        feature_info: channels and stride of each map, and the module that gives it, as timm announces them.
        output_fmt: "NHWC" for Swin, else "NCHW".
    """

    def __init__(self, model: nn.Module, strides: Sequence[int]) -> None:
        super().__init__()
        chain = chain_of(model)
        maps, self.output_fmt = probe(model, chain)
        last = {stride: (name, channels) for name, stride, channels in maps}  # of each stride the last
        if not strides or any(stride not in last for stride in strides) or sorted({*strides}) != list(strides):
            raise ValueError(f"strides must be some of {sorted(last)}, rising; got {tuple(strides)}")
        self.feature_info = [
            {"num_chs": last[stride][1], "reduction": stride, "module": last[stride][0]} for stride in strides
        ]
        self.chain = tuple(chain[: chain.index(last[strides[-1]][0]) + 1])
        for name, child in model.named_children():
            inside = [part for part in self.chain if part == name or part.startswith(f"{name}.")]
            if inside and inside != [name]:
                for part in [part for part, _ in child.named_children() if f"{name}.{part}" not in inside]:
                    delattr(child, part)
            if inside:
                self.add_module(name, child)
        # GoogLeNet and Inception take images in another scale where their weights are given.
        self.rescale = bool(getattr(model, "transform_input", False))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps of Tensor[N, 3, H, W], finest first: Tensor[N, C, h, w], or Tensor[N, h, w, C] for "NHWC"."""
        wanted = {info["module"] for info in self.feature_info}
        maps, x = [], rescaled(images) if self.rescale else images
        for name in self.chain:
            x = self.get_submodule(name)(x)
            if name in wanted:
                maps.append(x)
        return maps


def rescaled(images: Tensor) -> Tensor:
    """Images normalised by ImageNet's means and deviations, as (pixel - 0.5) / 0.5."""
    mean, deviation = (images.new_tensor(values)[:, None, None] for values in (IMAGENET.mean, IMAGENET.std))
    return (images * deviation + mean - 0.5) / 0.5


class TorchvisionViT(nn.Module):
    """A vision transformer of torchvision's, its tokens as one map, for `fpn.SimpleFeaturePyramid`. State keys are
    torchvision's.

    Args:
        model: `torchvision.models.VisionTransformer`. Its parts are taken out of it.
    """

    output_fmt = "NCHW"

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.image_size: int = model.image_size
        self.class_token = model.class_token
        self.conv_proj = model.conv_proj
        self.encoder = model.encoder
        self.feature_info = [{"num_chs": model.hidden_dim, "reduction": model.patch_size, "module": "encoder.ln"}]

    def forward(self, images: Tensor) -> list[Tensor]:
        """The map of Tensor[N, 3, image_size, image_size], alone in a list.

        Raises:
            ValueError: the images have another size: the embeddings of positions are for that one.
        """
        if images.shape[2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"images must be {self.image_size} × {self.image_size}; got {tuple(images.shape[2:])}. Another size "
                "is torchvision_trunk(name, image_size=...)"
            )
        patches = self.conv_proj(images)
        tokens = patches.flatten(2).transpose(1, 2)
        tokens = torch.cat((self.class_token.expand(len(tokens), -1, -1), tokens), dim=1)
        return [self.encoder(tokens)[:, 1:].transpose(1, 2).reshape(patches.shape)]


def torchvision_trunk(
    name: str, weights: str | None = None, *, strides: Sequence[int] | None = None, **options: Any
) -> TorchvisionTrunk | TorchvisionViT:
    """A classifier of torchvision's as a trunk.

        FPN(torchvision_trunk("convnext_tiny", weights="DEFAULT"))
        SimpleFeaturePyramid(torchvision_trunk("vit_b_16"))

    Args:
        name: as `torchvision.models.get_model` takes it.
        weights: as there: None for random ones, "IMAGENET1K_V1", "DEFAULT".
        strides: of the maps that are returned, finest first. None: those of 4, 8, 16 and 32 that there are.
        options: of the model: `norm_layer`, `stochastic_depth_prob`, `image_size`, ….

    Returns:
        The trunk; for `vit_*` it has one map, for `SimpleFeaturePyramid`. In train mode, like any new module.

    Raises:
        ImportError, RuntimeError: torchvision does not import.
        ValueError: there is no model of that name, it has no maps of such strides, or it is no chain of layers.
    """
    from torchvision import models

    model = models.get_model(name, weights=weights, **options)
    if isinstance(model, models.VisionTransformer):
        if strides is not None:
            raise ValueError(f"{name} has one map: strides has no meaning; got {tuple(strides)}")
        return TorchvisionViT(model)
    if strides is None:
        maps, _ = probe(model, chain_of(model))
        strides = sorted({stride for _, stride, _ in maps} & {4, 8, 16, 32})
    return TorchvisionTrunk(model, strides)


def chain_of(model: nn.Module) -> list[str]:
    """The names of the modules that turn images into the last map, in the order of their calls."""
    chain: list[str] = []
    for name, child in model.named_children():
        if name in HEADS:
            break
        if name in BESIDE:
            continue
        inside = [part for part, _ in child.named_children()]
        containers = name in ("features", "layers", "blocks", "trunk_output")
        chain += [f"{name}.{part}" for part in inside] if containers else [name]
    if not chain:
        raise ValueError(f"{type(model).__name__} is no chain of layers before its head")
    return chain


def probe(model: nn.Module, chain: Sequence[str]) -> tuple[list[tuple[str, int, int]], str]:
    """Name, stride and channels of what each module of the chain gives, and the layout of their maps."""
    twin = copy.deepcopy(model).to("meta").eval()
    shapes = []
    with torch.no_grad():
        x = torch.empty(1, 3, PROBE, PROBE, device="meta")
        for name in chain:
            x = twin.get_submodule(name)(x)
            shapes.append((name, tuple(x.shape)))
    layout = "NCHW" if all(height == width for _, (_, _, height, width) in shapes) else "NHWC"
    axis = layout.index("C")
    return [(name, 2 ** round(math.log2(PROBE / shape[2])), shape[axis]) for name, shape in shapes], layout
