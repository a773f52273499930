"""How results are compared: in every bit, by a relative error, as sums of many terms, as detections."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖ in float64; NaN anywhere gives NaN, which is below no tolerance."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))


def largest_relative_error(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The worst tensor's."""
    return max(relative_error(a, b) for a, b in zip(actual, expected, strict=True))


def largest_deviation(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Relative to the largest value of its tensor; NaN anywhere gives NaN, which is below no tolerance."""
    errors = [0.0]
    for a, b in zip(actual, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if b.numel():
            errors.append(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)))
    return float(torch.tensor(errors).max())


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    """Of one dtype and shape and equal in every bit, the sign of zero included; a NaN equals a NaN."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    actual, expected = actual.cpu(), expected.cpu()
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    both_nan = actual.isnan() & expected.isnan()
    return bool(((actual.view(integer) == expected.view(integer)) | both_nan).all())


def assert_sums_close(actual: Tensor, expected: Tensor) -> None:
    """Sums are float64, or float32, of up to some hundred terms that are at most 1, rounded to the dtype once."""
    actual = actual.cpu()
    if actual.dtype == torch.float64:
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12, equal_nan=True)
    else:
        rounding = torch.finfo(actual.dtype).eps / 2
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5 + rounding, atol=1e-5, equal_nan=True)


def unmatched(found: dict[str, Tensor], expected: dict[str, Tensor]) -> int:
    """How many of `found` have no twin in `expected`: of the same label, within 1e-2 pixel and 1e-4 of the score."""
    offsets = (found["boxes"][:, None] - expected["boxes"]).abs().amax(2)
    scores = (found["scores"][:, None] - expected["scores"]).abs()
    twins = (offsets < 1e-2) & (scores < 1e-4) & (found["labels"][:, None] == expected["labels"])
    return int((~twins.any(1)).sum())
