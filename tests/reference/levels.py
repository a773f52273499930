"""Which boxes are pooled, and on which level of a pyramid: Lin et al., Feature Pyramid Networks (2017), equation 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

ONE_LEVEL = (1.0, 0.0)  # canonical scale and level, which mean nothing where there is one map


def is_valid(box: Array, images: int) -> bool:
    """Whether a box (batch index, x1, y1, x2, y2) is finite and of an image. The output of another one is NaN."""
    return bool(np.isfinite(box).all() and 0 <= box[0] < images)


def level_of(box: Array, scales: Sequence[float], canonical: tuple[float, float]) -> int | None:
    """The level of a valid box, as an index into `scales`; None: it is on no level, and its output is 0.

    As torchvision's pooler does it: level floor(k0 + log2(√(w·h) / s0) + 1e-6), in the box's dtype, clamped to k_min
    and k_max, less k_min, which are -log2 of the first and of the last scale without their fractions. Where scales do
    not double, there may be no such map. One thing differs: a box of a negative area belongs to the first level, and
    to none in torchvision.

    Args:
        scales: of each level, cells of the map per unit of the boxes.
        canonical: the size s0 of a box, and the level k0 of a box of that size.
    """
    if len(scales) == 1:
        return 0
    number = box.dtype.type
    k_min, k_max = int(-np.log2(scales[0])), int(-np.log2(scales[-1]))
    with np.errstate(all="ignore"):
        side = np.sqrt((box[3] - box[1]) * (box[4] - box[2]))
        level = np.floor(number(canonical[1]) + np.log2(side / number(canonical[0])) + number(1e-6))
    if np.isnan(level):
        level = k_min
    index = int(min(max(level, k_min), k_max)) - k_min
    return index if 0 <= index < len(scales) else None
