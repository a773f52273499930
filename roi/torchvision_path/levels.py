"""The boxes of each level of a pyramid, as tensors on their device."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from roi._problem import Pooling
from roi.torch_path.levels import map_levels


class OnLevel(NamedTuple):
    """Some of the boxes, on one level.

    Attributes:
        rois: Tensor[k, 5], each of an image of the batch and finite.
        places: Tensor[k] of int64, where they are among all boxes; None where they are all.
    """

    level: int
    rois: Tensor
    places: Tensor | None

    def take(self, values: Tensor) -> Tensor:
        """Those of the rows of `values`, one for each box, that belong to these."""
        return values if self.places is None else values.index_select(0, self.places)


class Assigned(NamedTuple):
    """All boxes: those of each level, and which boxes are valid.

    Attributes:
        valid: Tensor[K, 1, 1, 1] of bool. An invalid box is on a level too, as the box 0, 0, 0, 0.
    """

    levels: list[OnLevel]
    valid: Tensor

    def join(self, parts: list[Tensor], rest: float, invalid: float = math.nan) -> Tensor:
        """Tensor[K, …] of the values of each level's boxes.

        Args:
            rest, invalid: what boxes on no level have, and those that are not valid.
        """
        output, places = parts[0], self.levels[0].places
        if places is not None:
            output = parts[0].new_full((len(self.valid), *parts[0].shape[1:]), rest)
            for own, part in zip(self.levels, parts, strict=True):
                assert own.places is not None
                output.index_copy_(0, own.places, part)
        return output.masked_fill_(~self.valid, invalid)


def assign(rois: Tensor, batch: int, pooling: Pooling) -> Assigned:
    """The level of each of Tensor[K, 5] `rois`. With one level nothing is read back from the device."""
    index = rois[:, 0]
    valid = rois.isfinite().all(1) & (index >= 0) & (index < batch)
    safe = rois.where(valid[:, None], rois.new_zeros(()))
    if len(pooling.scales) == 1:
        levels = [OnLevel(0, safe, None)]
    else:
        level = map_levels(safe, pooling)
        places = [torch.where(level == own)[0] for own in range(len(pooling.scales))]
        levels = [OnLevel(own, safe.index_select(0, rows), rows) for own, rows in enumerate(places)]
    return Assigned(levels, valid[:, None, None, None])
