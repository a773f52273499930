"""RoIAlign and the position-sensitive operators of the CUDA path, each with its reference, and problems for them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.flat_calls import CUPY as cupy_path
from tests.reference import weighted_pool
from tests.reference.boxes import hostile_boxes, ordinary_boxes
from tests.reference.maps import numbers
from tests.reference.weighted_pool import WeightedPool


@dataclass(frozen=True)
class Operator:
    """A function of the CUDA path and its reference."""

    name: str
    options: tuple[Any, ...]
    reference: Callable[..., WeightedPool]

    def forward(self, input: Tensor, rois: Tensor, scale: float, size: tuple[int, int]) -> Tensor:
        output: Tensor = getattr(cupy_path, self.name)(input, rois, scale, *size, *self.options)
        return output

    def backward(self, grad: Tensor, rois: Tensor, scale: float, shape: tuple[int, ...], channels_last: bool) -> Tensor:
        options = (*self.options, *shape, channels_last)
        gradient: Tensor = getattr(cupy_path, f"{self.name}_backward")(grad, rois, scale, *options)
        return gradient

    def input_channels(self, channels: int, size: tuple[int, int]) -> int:
        return channels * size[0] * size[1] if self.name.startswith("ps_") else channels

    def expected(self, size: tuple[int, int]) -> WeightedPool:
        return self.reference(size, *self.options)


ADAPTIVE = Operator("roi_align", (-1, False), weighted_pool.roi_align)
ALIGNED = Operator("roi_align", (-1, True), weighted_pool.roi_align)
SAMPLING_2 = Operator("roi_align", (2, True), weighted_pool.roi_align)
SAMPLING_11 = Operator("roi_align", (11, False), weighted_pool.roi_align)
PS_ADAPTIVE = Operator("ps_roi_align", (0,), weighted_pool.ps_roi_align)
PS_SAMPLING_3 = Operator("ps_roi_align", (3,), weighted_pool.ps_roi_align)
PS_POOL = Operator("ps_roi_pool", (), weighted_pool.ps_roi_pool)

Case = tuple[Operator, tuple[int, int, int, int], tuple[int, int], float]
# Operator; N, channels of the output, H, W; output size; scale. 8 and 16 channels take the vector accesses.
CASES: list[Case] = [
    (ADAPTIVE, (2, 8, 9, 13), (7, 7), 0.25),
    (ADAPTIVE, (1, 3, 40, 2), (2, 3), 1.0),
    (ALIGNED, (2, 5, 12, 7), (3, 2), 1 / 16),
    (ALIGNED, (2, 1, 1, 30), (1, 1), 0.125),
    (SAMPLING_2, (1, 16, 6, 6), (2, 5), 1.0),
    (SAMPLING_2, (3, 3, 5, 17), (1, 1), 0.5),
    (SAMPLING_11, (2, 4, 8, 8), (14, 3), 1.0),
    (PS_ADAPTIVE, (2, 3, 9, 13), (3, 2), 0.25),
    (PS_SAMPLING_3, (1, 2, 6, 6), (2, 5), 1.0),
    (PS_POOL, (2, 2, 9, 13), (3, 4), 0.25),
    (PS_POOL, (1, 5, 12, 7), (1, 2), 1 / 16),
    (PS_POOL, (2, 1, 4, 1), (7, 3), 1.0),
]


def boxes_for(shape: tuple[int, ...], scale: float, dtype: torch.dtype) -> Tensor:
    height, width = shape[2] / scale, shape[3] / scale
    return torch.cat([hostile_boxes(shape[0], height, width), ordinary_boxes(20, shape[0], height, width)]).to(dtype)


@functools.cache
def problem(case: Case, coordinates: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of a case: input, boxes, output, a gradient of it, that of the input; in float64 but for the boxes."""
    operator, (images, channels, height, width), size, scale = case
    shape = (images, operator.input_channels(channels, size), height, width)
    input, rois = numbers(shape), boxes_for(shape, scale, coordinates)
    expected = operator.expected(size)
    output = torch.from_numpy(expected.forward([input.numpy()], rois.numpy(), [scale]))
    grad = numbers(tuple(output.shape), seed=1)
    (gradient,) = expected.backward(grad.numpy(), [input.numpy()], rois.numpy(), [scale])
    return input, rois, output, grad, torch.from_numpy(gradient)


# --- A pyramid

SIZES, SCALES, CANONICAL = [(16, 20), (8, 10), (4, 5)], [1 / 4, 1 / 8, 1 / 16], (32.0, 3.0)


def pyramid(dtype: torch.dtype, layout: torch.memory_format) -> list[Tensor]:
    shapes = [(2, 4, *size) for size in SIZES]
    return [numbers(shape, seed).to(dtype).contiguous(memory_format=layout) for seed, shape in enumerate(shapes)]


def pyramid_boxes(coordinates: torch.dtype) -> Tensor:
    """Of every size; some exactly at the border of two levels."""
    borders = torch.tensor([[1, 4.0, 8.0, 4.0 + side, 8.0 + side] for side in (16, 32, 64)], dtype=torch.float64)
    return torch.cat([borders, hostile_boxes(2, 64, 80), ordinary_boxes(30, 2, 64, 80)]).to(coordinates)
