"""Which level of a pyramid a box belongs to: Lin et al., Feature Pyramid Networks (2017), section 4.2, equation 1."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

EPSILON = 1e-6  # that a box of exactly a level's size is not put on the one below by rounding


def map_levels(rois: Tensor, scales: Sequence[float], canonical_scale: int, canonical_level: int) -> Tensor:
    """Tensor[K] of int64: the index in `scales` of each of Tensor[K, 5] `rois`.

    k = floor(canonical_level + log2(sqrt(w·h) / canonical_scale)), in the dtype of `rois`; the level of stride 2^k, or
    the nearest there is. A box without an area, or with a negative one, belongs to the finest level.

    Args:
        scales: cells per unit of the boxes, of each level: powers of two, each half of the one before.
        canonical_scale: the size of a box, in its units, that belongs to `canonical_level`.
    """
    finest, coarsest = -math.log2(scales[0]), -math.log2(scales[-1])
    x1, y1, x2, y2 = rois[:, 1:].unbind(1)
    size = ((x2 - x1) * (y2 - y1)).sqrt()
    level = torch.floor(canonical_level + torch.log2(size / canonical_scale) + EPSILON)
    return (level.nan_to_num(nan=finest).clamp(finest, coarsest) - finest).to(torch.int64)
