"""What a model expects of its images: the order of the channels, their range, mean and standard deviation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Channels = tuple[float, float, float]


@dataclass(frozen=True)
class Preprocessing:
    """How images become a model's input. It is called with images as they are read.

    Attributes:
        channel_order: of the model's input.
        largest: what 1.0 becomes: 1, or 255.
        mean, std: of each channel of the input, in its order and range.
    """

    channel_order: Literal["rgb", "bgr"] = "rgb"
    largest: float = 1.0
    mean: Channels = (0.485, 0.456, 0.406)
    std: Channels = (0.229, 0.224, 0.225)

    def __call__(self, images: Tensor) -> Tensor:
        """Tensor[..., 3, H, W], floating point, RGB from 0 to 1 -> the model's input, of the same shape and dtype."""
        images = images if self.channel_order == "rgb" else images.flip(-3)
        mean, std = (
            torch.tensor(x, dtype=images.dtype, device=images.device).view(3, 1, 1) for x in (self.mean, self.std)
        )
        return (images * self.largest - mean) / std

    def reversed(self) -> Preprocessing:
        """Of the same model once it takes the channels in the other order."""
        order: Literal["rgb", "bgr"] = "bgr" if self.channel_order == "rgb" else "rgb"
        return replace(self, channel_order=order, mean=self.mean[::-1], std=self.std[::-1])

    def __str__(self) -> str:
        order, mean, std = self.channel_order.upper(), self.mean, self.std
        return f"images in {order}, from 0 to {self.largest:g}, less {mean}, divided by {std}"


IMAGENET = Preprocessing()  # torchvision's, timm's for its ResNets, and in another range mmdetection's
# Detectron's, detectron2's and mmdetection's for the ResNets that Caffe trained.
CAFFE = Preprocessing("bgr", 255.0, (103.53, 116.28, 123.675), (1.0, 1.0, 1.0))
# detectron2's for ResNeXt.
CAFFE_WITH_DEVIATION = replace(CAFFE, std=(57.375, 57.12, 58.395))
