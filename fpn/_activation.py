"""Activations that a fused convolution applies itself."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Activation(NamedTuple):
    """An element-wise function, as oneDNN names it among its post-operations.

    Attributes:
        name: "relu", "leaky_relu", "hardtanh", "hardswish", "swish" or "gelu".
        scalars: the negative slope of "leaky_relu"; the least and the largest value of "hardtanh".
        algorithm: of "gelu": "none" or "tanh".
    """

    name: str
    scalars: tuple[float, ...] = ()
    algorithm: str = ""

    def __call__(self, x: Tensor) -> Tensor:
        """The activation of `x`; `x` does not change."""
        match self.name:
            case "relu":
                return F.relu(x)
            case "leaky_relu":
                return F.leaky_relu(x, self.scalars[0])
            case "hardtanh":
                return F.hardtanh(x, self.scalars[0], self.scalars[1])
            case "hardswish":
                return F.hardswish(x)
            case "swish":
                return F.silu(x)
            case _:
                return F.gelu(x, approximate=self.algorithm)

    def apply_(self, x: Tensor) -> Tensor:
        """The activation of `x`, written into `x` (not for "gelu"), without gradient."""
        match self.name:
            case "relu":
                return torch.relu_(x)
            case "leaky_relu":
                return F.leaky_relu(x, self.scalars[0], inplace=True)
            case "hardtanh":
                return F.hardtanh(x, self.scalars[0], self.scalars[1], inplace=True)
            case "hardswish":
                return F.hardswish(x, inplace=True)
            case "swish":
                return F.silu(x, inplace=True)
            case _:
                return F.gelu(x, approximate=self.algorithm)


RELU = Activation("relu")


def activation_of(module: nn.Module) -> Activation | None:
    """The activation that a module computes, if its class is exactly one of these; else None."""
    found: Activation | None = None
    if type(module) is nn.ReLU:
        found = RELU
    elif type(module) is nn.LeakyReLU:
        found = Activation("leaky_relu", (module.negative_slope,))
    elif type(module) is nn.ReLU6 or type(module) is nn.Hardtanh:
        found = Activation("hardtanh", (module.min_val, module.max_val))
    elif type(module) is nn.Hardswish:
        found = Activation("hardswish")
    elif type(module) is nn.SiLU:
        found = Activation("swish")
    elif type(module) is nn.GELU:
        found = Activation("gelu", (), module.approximate)
    if found is None or not all(isinstance(scalar, int | float) for scalar in found.scalars):
        return None
    return found
