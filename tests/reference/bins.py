"""Whole cells and the bins of a box, in Python's integers: for max and average pooling."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

FARTHEST_CELL = 2**30


def to_cell(coordinate: np.floating, scale: float) -> int:
    """Scaled in the coordinate's dtype, rounded half away from zero, saturated."""
    with np.errstate(over="ignore"):
        scaled = coordinate * coordinate.dtype.type(scale)
    if np.isinf(scaled):
        return FARTHEST_CELL if scaled > 0 else -FARTHEST_CELL
    magnitude = int(abs(Fraction(float(scaled))) + Fraction(1, 2))
    return min(magnitude, FARTHEST_CELL) * (-1 if scaled < 0 else 1)


def bin_slice(start: int, size: int, i: int, bins: int, cells: int) -> slice:
    """The cells of a map's axis in bin `i` of those that cut `size` cells from `start`."""
    begin = start + i * size // bins
    end = start - (-(i + 1) * size // bins)
    return slice(min(max(begin, 0), cells), min(max(end, 0), cells))
