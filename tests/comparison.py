"""How the tests compare tensors, and the random weights that they compare on."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖ in float64; NaN anywhere gives NaN, which is below no tolerance."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))


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


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    """Of one dtype and shape and equal in every bit, the sign of zero included; a NaN equals a NaN."""
    actual, expected = actual.cpu(), expected.cpu()
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    both_nan = actual.isnan() & expected.isnan()
    return bool(((actual.view(integer) == expected.view(integer)) | both_nan).all())


def unmatched(found: dict[str, Tensor], expected: dict[str, Tensor]) -> int:
    """How many of `found` have no twin in `expected`: of the same label, within 1e-2 pixel and 1e-4 of the score."""
    offsets = (found["boxes"][:, None] - expected["boxes"]).abs().amax(2)
    scores = (found["scores"][:, None] - expected["scores"]).abs()
    twins = (offsets < 1e-2) & (scores < 1e-4) & (found["labels"][:, None] == expected["labels"])
    return int((~twins.any(1)).sum())
