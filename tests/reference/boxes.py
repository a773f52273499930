"""Boxes for RoI operators: ordinary ones, those of a detector that goes wrong, those of a region proposal network."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def ordinary_boxes(count: int, images: int, height: float, width: float, *, seed: int = 0) -> Tensor:
    """Tensor[count, 5], float64: valid boxes in and around an image of height x width, half on a grid of 0.5."""
    generator = torch.Generator().manual_seed(seed)
    extent = torch.tensor([width, height, width, height], dtype=torch.float64)
    corners = (torch.rand(count, 2, 2, dtype=torch.float64, generator=generator) * 1.4 - 0.2).sort(dim=1).values
    boxes = corners.flatten(1) * extent
    boxes[::2] = (boxes[::2] * 2).round() / 2
    index = torch.randint(images, (count, 1), generator=generator).double()
    return torch.cat([index, boxes], dim=1)


def hostile_boxes(images: int, height: float, width: float) -> Tensor:
    """Tensor[K, 5], float64: whatever a detector may produce when it goes wrong."""
    nan, inf = float("nan"), float("inf")
    whole = [0.0, 0.0, width - 1, height - 1]
    coordinates = [
        whole,
        [width - 1, height - 1, 0.0, 0.0],  # reversed
        [4.0, 4.0, 3.0, 3.0],  # reversed by one cell, at scale 1
        [2.0, 3.0, 2.0, 3.0],  # a point
        [-0.0, -0.0, -0.0, -0.0],
        [-50.0, -50.0, -40.0, -40.0],  # off the map on each side
        [width + 5, 1.0, width + 9, 4.0],
        [1.0, height + 5, 4.0, height + 9],
        [-1e6, -1e6, 1e6, 1e6],
        [-1e30, -1e30, 1e30, 1e30],
        [1e30, 1e30, -1e30, -1e30],
        [-1e30, 1.0, 3.0, 1e30],
        [-3e38, -3e38, 3e38, 3e38],
        [-1e30, -1e30, 3.0 * 2**28, 3.0 * 2**28],  # at scale 1, an edge of 7 or 14 bins is on the map: saturation shows
        [1e-45, 1e-40, 4.0, 4.0],  # subnormal in float32
        [0.5, 0.5, 1.5, 2.5],  # halves
        [-0.5, -1.5, 2.5, 3.5],
        [0.49999997, 0.49999997, 3.4999998, 3.4999998],
        [nan, 0.0, 4.0, 4.0],
        [0.0, nan, 4.0, 4.0],
        [0.0, 0.0, inf, 4.0],
        [0.0, 0.0, 4.0, -inf],
    ]
    indices = [-1.0, -0.5, -0.0, 0.5, float(images), 1e30, -1e30, nan, inf, -inf]
    rows = [[float(i % images), *box] for i, box in enumerate(coordinates)]
    rows += [[index, *box] for index, box in itertools.product(indices, (whole, [1.0, 1.0, 3.0, 3.0]))]
    return torch.tensor(rows, dtype=torch.float64)


def rpn_like(count: int, images: int, height: int, width: int, *, seed: int = 0) -> Tensor:
    """Tensor[count, 5], float32: boxes as a region proposal network gives them, image after image.

    Centres are uniform, the square root of the area is log-uniform in 32 … 512 pixels and the aspect in 1/2 … 2; boxes
    are clipped to the image, whose right edge x2 = width rounds to a cell past the map.
    """
    generator = torch.Generator().manual_seed(seed)
    x, y, size, aspect = torch.rand(4, count, dtype=torch.float64, generator=generator)
    side = 32 * 16**size
    stretch = 2 ** (aspect - 0.5)  # the square root of the aspect
    x, y = x * width, y * height
    half_width, half_height = side * stretch / 2, side / stretch / 2
    left, right = (x - half_width).clamp(0, width), (x + half_width).clamp(0, width)
    top, bottom = (y - half_height).clamp(0, height), (y + half_height).clamp(0, height)
    image = torch.arange(count) * images // max(count, 1)
    return torch.stack([image.double(), left, top, right, bottom], dim=1).float()
