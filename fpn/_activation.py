"""Activations that a fused convolution applies itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

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
        if self.name == "gelu":
            return F.gelu(x, approximate=self.algorithm)
        return FUNCTIONS[self.name](x, *self.scalars)

    def apply_(self, x: Tensor) -> Tensor:
        """The activation of `x`, written into `x` (not for "gelu"), without gradient."""
        if self.name == "gelu":
            return F.gelu(x, approximate=self.algorithm)
        return FUNCTIONS[self.name](x, *self.scalars, inplace=True)


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "hardtanh": F.hardtanh,
    "hardswish": F.hardswish,
    "swish": F.silu,
}
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
