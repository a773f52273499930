"""Features for RoI operators: with many ties and special values, and such as are exact in every dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def features(shape: tuple[int, int, int, int], dtype: torch.dtype, *, special: bool = True, seed: int = 0) -> Tensor:
    """Features with many ties; `special` sprinkles NaN, infinities, zeros of both signs and subnormal numbers."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-4, 5, shape, generator=generator).to(dtype) / 4
    if special:
        tiny = torch.finfo(dtype).smallest_normal
        palette = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, tiny / 4, -tiny / 4, tiny / 2])
        palette = torch.tensor(palette.tolist(), dtype=torch.float64).to(dtype)
        chosen = torch.randint(len(palette), shape, generator=generator)
        sprinkled = torch.rand(shape, generator=generator) < 0.3
        values = torch.where(sprinkled, palette[chosen], values)
        values[:, :1] = -float("inf")  # a channel in which every maximum is -inf
        values[:, -1:] = palette[chosen[:, -1:] % 3 + 5]  # and one of subnormal numbers only
    return values


def numbers(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Float64, and exact in every dtype: quarters from -1 to 1."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).double() / 4
