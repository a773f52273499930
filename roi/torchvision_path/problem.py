"""The calls that torchvision's operators do not take."""

from __future__ import annotations

import torch

from roi._problem import Maps, Pooling

MAX_ELEMENTS = 2**31  # its kernels index with 32 bits


class OperatorLimitError(ValueError):
    """torchvision's operators do not take tensors of this size or dtype; the torch path does."""


def check_limits(maps: Maps, pooling: Pooling, count: int, dtype: torch.dtype, coordinates: torch.dtype) -> None:
    """Whether torchvision's operators take such maps of `dtype` and so many boxes of `coordinates`."""
    if torch.promote_types(dtype, torch.float32) != coordinates:
        raise OperatorLimitError(
            f"torchvision's operators take boxes of the features' dtype; got {coordinates} boxes and {dtype} features"
        )
    outputs = count * pooling.output_channels(maps.channels) * pooling.bins
    if max(outputs, *(maps.batch * maps.channels * height * width for height, width in maps.sizes)) >= MAX_ELEMENTS:
        raise OperatorLimitError("torchvision's operators take tensors of fewer than 2**31 elements")


def check_deterministic() -> None:
    """Raise where the gradient must be the same in every run: torchvision adds in any order."""
    if torch.are_deterministic_algorithms_enabled():
        raise OperatorLimitError("torchvision's gradients are not deterministic, and torch is told that they must be")
