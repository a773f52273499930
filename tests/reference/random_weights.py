"""Random weights for models that are compared with others."""

from __future__ import annotations

import torch
from torch import nn


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random affine terms and statistics in every norm layer, of the size that training leaves there."""
    generator = torch.Generator().manual_seed(seed)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d | nn.GroupNorm) or hasattr(norm, "running_var"):
            for name, low, high in (
                ("weight", 0.5, 1.2),
                ("bias", -0.5, 0.5),
                ("running_mean", -0.3, 0.3),
                ("running_var", 0.5, 2.0),
            ):
                value = getattr(norm, name, None)
                if value is not None:
                    value.data.uniform_(low, high, generator=generator)
    return module
