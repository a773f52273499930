"""RoIAlign and the position-sensitive operators of the CUDA path, each with its reference, and problems for them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.cuda_on_cpu import reference
from tests.cuda_on_cpu.boxes import hostile_boxes, ordinary_boxes
from tests.cuda_on_cpu.reference import WeightedPool
from tests.flat_calls import CUPY as cupy_path
from tests.flat_calls import ONE_LEVEL


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


ADAPTIVE = Operator("roi_align", (-1, False), reference.roi_align)
ALIGNED = Operator("roi_align", (-1, True), reference.roi_align)
SAMPLING_2 = Operator("roi_align", (2, True), reference.roi_align)
SAMPLING_11 = Operator("roi_align", (11, False), reference.roi_align)
PS_ADAPTIVE = Operator("ps_roi_align", (0,), reference.ps_roi_align)
PS_SAMPLING_3 = Operator("ps_roi_align", (3,), reference.ps_roi_align)
PS_POOL = Operator("ps_roi_pool", (), reference.ps_roi_pool)

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


def numbers(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Float64, and exact in every dtype: quarters from -1 to 1."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).double() / 4


@functools.cache
def problem(case: Case, coordinates: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of a case: input, boxes, output, a gradient of it, that of the input; in float64 but for the boxes."""
    operator, (images, channels, height, width), size, scale = case
    shape = (images, operator.input_channels(channels, size), height, width)
    input, rois = numbers(shape), boxes_for(shape, scale, coordinates)
    expected = operator.expected(size)
    output = torch.from_numpy(expected.forward([input.numpy()], rois.numpy(), [scale], ONE_LEVEL))
    grad = numbers(tuple(output.shape), seed=1)
    arguments = (grad.numpy(), rois.numpy(), [scale], ONE_LEVEL, [shape])
    return input, rois, output, grad, torch.from_numpy(expected.backward(*arguments)[0])


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Sums are float64, or float32, of up to some hundred terms that are at most 1, rounded to the dtype once."""
    actual = actual.cpu()
    if actual.dtype == torch.float64:
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12, equal_nan=True)
    else:
        rounding = torch.finfo(actual.dtype).eps / 2
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5 + rounding, atol=1e-5, equal_nan=True)


# --- A pyramid

SIZES, SCALES, CANONICAL = [(16, 20), (8, 10), (4, 5)], [1 / 4, 1 / 8, 1 / 16], (32.0, 3.0)


def pyramid(dtype: torch.dtype, layout: torch.memory_format) -> list[Tensor]:
    shapes = [(2, 4, *size) for size in SIZES]
    return [numbers(shape, seed).to(dtype).contiguous(memory_format=layout) for seed, shape in enumerate(shapes)]


def pyramid_boxes(coordinates: torch.dtype) -> Tensor:
    """Of every size; some exactly at the border of two levels."""
    borders = torch.tensor([[1, 4.0, 8.0, 4.0 + side, 8.0 + side] for side in (16, 32, 64)], dtype=torch.float64)
    return torch.cat([borders, hostile_boxes(2, 64, 80), ordinary_boxes(30, 2, 64, 80)]).to(coordinates)
