"""Pyramids of any list of scales that torchvision's pooler takes, and boxes of every level of each."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tests.reference.boxes import hostile_boxes, ordinary_boxes
from tests.reference.levels import is_valid, level_of

IMAGES, IMAGE = 2, (96, 128)


def boxes_of_all_sizes() -> Tensor:
    """Tensor[K, 5], float64: valid boxes of an area, image after image, some exactly at a border of two levels."""
    borders = [[1, 4.0, 8.0, 4.0 + side, 8.0 + side] for side in (8, 16, 32, 64)]
    boxes = torch.cat([torch.tensor(borders, dtype=torch.float64), ordinary_boxes(40, IMAGES, *IMAGE)])
    return boxes[boxes[:, 0].argsort(stable=True)]


def boxes_of_all_kinds() -> Tensor:
    """Tensor[K, 5], float64: these, and whatever a detector may produce when it goes wrong."""
    return torch.cat([boxes_of_all_sizes(), hostile_boxes(IMAGES, *IMAGE)])


class Pyramid(NamedTuple):
    """Scales of the levels, and what `boxes_of_all_sizes` belong to.

    Attributes:
        scales: of each level, cells of the map per unit of the boxes.
        canonical: the size of a box, and the level of a box of that size.
        used: the levels that some box belongs to, as indices; None where some box belongs to no level.
    """

    scales: tuple[float, ...]
    canonical: tuple[float, float]
    used: frozenset[int | None]

    def shapes(self, channels: int) -> list[tuple[int, int, int, int]]:
        """(N, C, H, W) of each map."""
        height, width = IMAGE
        return [(IMAGES, channels, math.ceil(height * s), math.ceil(width * s)) for s in self.scales]

    def levels(self, rois: Tensor) -> list[int | None]:
        """Of each box; None: it is on no level, or it is not valid."""
        return [level_of(box, self.scales, self.canonical) if is_valid(box, IMAGES) else None for box in rois.numpy()]

    def takes_no_gradient(self, rois: Tensor) -> Tensor:
        """Tensor[K] of bool: the boxes that are on no level or not valid."""
        return torch.tensor([level is None for level in self.levels(rois)])


PYRAMIDS = {
    "gap": Pyramid((1 / 4, 1 / 16), (32, 3), frozenset({0, 1, None})),
    "gap before the last": Pyramid((1 / 4, 1 / 8, 1 / 64), (16, 3), frozenset({0, 1, 2, None})),
    "equal": Pyramid((1 / 8, 1 / 8), (32, 3), frozenset({0})),
    "MobileNet": Pyramid((1 / 32, 1 / 32, 1 / 64), (32, 6), frozenset({0, 1})),
    "not doubling": Pyramid((1 / 4, 1 / 12), (32, 3), frozenset({0, 1})),
    # As many maps as the kernels take. A level of -1 that went unnoticed would have the size of a huge map.
    "eight maps": Pyramid(
        (1 / 4, 1 / 4, 1 / 8, 1 / 8, 1 / 8, 1 / 16, 1 / 16, 1 / 1024), (64, 10), frozenset({3, 4, 5, 6, 7, None})
    ),
    "no power of two": Pyramid((1 / 3, 1 / 6, 1 / 12), (32, 3), frozenset({0, 1, 2})),
    "no power of two, finer": Pyramid((1 / 12, 1 / 24), (32, 4), frozenset({0, 1})),
    "coarsest first": Pyramid((1 / 16, 1 / 4), (32, 3), frozenset({None})),
}
