"""Which level of a pyramid a box belongs to: Lin et al., Feature Pyramid Networks (2017), section 4.2, equation 1."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from roi._boxes import valid_rows
from roi._problem import LEVEL_EPSILON, Pooling, level_range

Rows = NDArray[Any] | slice  # some RoIs: their indices, or all from one to another


class OnLevel(NamedTuple):
    """The boxes of one level.

    Attributes:
        boxes: [k, 5] of (batch index, x1, y1, x2, y2), finite, of an image of the batch.
        places: where they are among all boxes.
    """

    level: int
    boxes: NDArray[Any]
    places: Rows


class Assigned(NamedTuple):
    """All boxes: those of each level that has some, and the indices of those that are on no level or not valid."""

    levels: list[OnLevel]
    on_none: NDArray[np.int64]
    invalid: NDArray[np.int64]

    def fill_rest(self, output: Tensor) -> None:
        """Give the rows of `output` that no level fills what they are: 0, or NaN where the box is not valid."""
        for rows, value in ((self.on_none, 0.0), (self.invalid, math.nan)):
            if len(rows):
                output[torch.from_numpy(rows).to(output.device)] = value


def map_levels(rois: Tensor, pooling: Pooling) -> Tensor:
    """Tensor[K] of int64: the level of each of Tensor[K, 5] `rois`, counted from the first one.

    Where scales do not double, there may be fewer levels than the result says: such a box is on none.
    """
    canonical = pooling.canonical_scale, pooling.canonical_level
    return level_of(rois[:, 1:], *level_range(pooling.scales), *canonical, LEVEL_EPSILON)


def level_of(
    boxes: Tensor, finest: int, coarsest: int, canonical_scale: float, canonical_level: float, epsilon: float
) -> Tensor:
    """Tensor[K] of int64: the level of each of Tensor[K, 4] `boxes`, counted from the finest.

    k = floor(canonical_level + log2(sqrt(w·h) / canonical_scale) + epsilon), in the dtype of `boxes`, clamped to
    `finest` … `coarsest`. A box without an area, or with a negative one, belongs to the finest level.
    """
    x1, y1, x2, y2 = boxes.unbind(1)
    size = ((x2 - x1) * (y2 - y1)).sqrt()
    level = torch.floor(canonical_level + torch.log2(size / canonical_scale) + epsilon)
    return level.nan_to_num(nan=finest).clamp(finest, coarsest).to(torch.int64) - finest


def assign(rois: Tensor, batch: int, pooling: Pooling) -> Assigned:
    """The level of each of Tensor[K, 5] `rois`, which are read back from a device."""
    boxes = rois.detach().cpu().numpy()
    valid = valid_rows(boxes, batch)
    count, all_valid = len(pooling.scales), bool(valid.all())
    none = np.empty(0, np.int64)
    if count == 1 and all_valid:
        return Assigned([OnLevel(0, boxes, slice(0, len(boxes)))] if len(boxes) else [], none, none)
    level = map_levels(torch.from_numpy(boxes), pooling).numpy() if count > 1 else np.zeros(len(boxes), np.int64)
    levels = []
    for index in range(count):
        places = np.flatnonzero((level == index) & valid)
        if len(places):
            levels.append(OnLevel(index, boxes[places], places))
    on_none = np.flatnonzero(((level < 0) | (level >= count)) & valid)
    return Assigned(levels, on_none, none if all_valid else np.flatnonzero(~valid))


def put(output: Tensor, places: Rows, values: Tensor) -> None:
    """The channels of bins, Tensor[k, h, w, C] or flat, as the rows `places` of Tensor[K, C, h, w] `output`."""
    target = output.permute(0, 2, 3, 1)
    values = values.view(-1, *target.shape[1:])
    if isinstance(places, slice):
        target[places].copy_(values)
    else:
        target[torch.from_numpy(places).to(target.device)] = values.to(target.dtype)


def taken(rois: Rows, some: Rows) -> Rows:
    """Those of some RoIs that are at `some` places among them."""
    if isinstance(rois, slice):
        return slice(rois.start + some.start, rois.start + some.stop) if isinstance(some, slice) else rois.start + some
    return rois[some]
